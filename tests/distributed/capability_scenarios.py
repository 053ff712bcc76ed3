"""Capabilities on two processes of the CPU: their saved and restored state.

Each function returns plain data that ``test_capabilities.py`` compares. All run in one start-up::

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m \
        tests.distributed.capability_scenarios FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import schedulefree
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    LearningRateScheduler,
    Linear,
    NormClip,
    StepGuard,
    ZClip,
)
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Batch, Fit
from lightning_bigopt.engine.update import Rejection, Update
from lightning_bigopt.trainer_access.saved_weights import (
    is_sharded,
    read_second_weights,
    with_second_weights,
)
from tests.engine.fake_averaging import FakeAveraging, Looked, copies
from tests.helpers import QUIET, Regression, ResumableLoader, full, loader

STRATEGIES = ("ddp", "fsdp2")


class Sharded(Looked):
    """The network under FSDP2."""

    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[2]):
            if not hasattr(layer, "set_requires_gradient_sync"):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def module(name: str) -> Looked:
    return Looked() if name == "ddp" else Sharded()


def trainer(name: str, *callbacks: Any, whole: bool = False, **options: Any) -> Any:
    strategy: Any = DDPStrategy()
    if name == "fsdp2":
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=not whole
        )
    defaults = {"devices": 2, "strategy": strategy, "callbacks": list(callbacks)}
    return L.Trainer(**{**QUIET, "max_epochs": 2, **defaults, **options})


def numbers(weights: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: full(value.detach()).flatten().tolist() for name, value in weights.items()}


def weights(model: Looked) -> dict[str, list[float]]:
    return numbers(dict(model.named_parameters()))


class Saves(L.Callback):
    """Saves on every process when an update has ended, or in another hook."""

    def __init__(self, path: Path, *, at: int, hook: str = "on_train_batch_end") -> None:
        self.seen: dict[str, Any] = {}

        def save(trainer: Any, module: Any, *arguments: Any) -> None:
            if trainer.global_step == at and not self.seen:
                self.seen = {"weights": weights(module)}
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


# ------------------------------------------------------------------------ second weights


class ShardedAveraging(FakeAveraging):
    """Saves the average as the model, and the training weights as shards or in its own state."""

    def saved_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        assert self.fit is not None
        training = self._training or dict(self.fit.module.named_parameters())
        if is_sharded(state_dict):
            self._saved: dict[str, Tensor] | None = None
            return with_second_weights(
                {**state_dict, **self.average}, training, owner="training weights"
            )
        # One file; only the first process has its contents.
        self._saved = {name: full(value.detach()).clone() for name, value in training.items()}
        average = {name: full(value) for name, value in self.average.items()}
        return {**state_dict, **average} if state_dict else {}

    def saved_state(self) -> dict[str, Any]:
        return {"updates": float(self.updates), "training": self._saved}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        self.updates, self._saved = state["updates"], state["training"]

    @torch.no_grad()
    def start(self, fit: Fit) -> None:
        self.average = copies(fit.module)  # a checkpoint's model is the average
        parameters = {name: p.detach() for name, p in fit.module.named_parameters()}
        self.was_read = read_second_weights(fit.trainer, parameters, owner="training weights")
        for name, value in (vars(self).get("_saved") or {}).items():
            into = parameters[name]
            if isinstance(into, DTensor):
                into.copy_(distribute_tensor(value, into.device_mesh, into.placements))
            else:
                into.copy_(value)


def averaged(out: Path) -> Any:
    """Averages, saves both weights, and resumes; a bare Trainer resumes from the same file."""
    found = {}
    for name, whole in (("ddp", True), ("fsdp2", False), ("fsdp2", True)):
        case = f"{name} {'whole' if whole else 'sharded'}"
        path = out / f"{case}.ckpt"
        options: dict[str, Any] = {"whole": whole, "val_check_interval": 2}
        averaging, straight, saves = ShardedAveraging(), module(name), Saves(path, at=4)
        trainer(name, saves, averaging, **options).fit(
            straight, ResumableLoader(8, 2), loader(4, 2)
        )
        resumed, again = module(name), ShardedAveraging()
        trainer(name, again, **options).fit(
            resumed, ResumableLoader(8, 2), loader(4, 2), ckpt_path=path, weights_only=False
        )
        bare, start = module(name), WeightsAtStart()
        trainer(name, start, **options).fit(
            bare, ResumableLoader(8, 2), loader(4, 2), ckpt_path=path, weights_only=False
        )
        evaluated = module(name)
        trainer(name, **options).validate(
            evaluated, loader(4, 2), ckpt_path=path, weights_only=False, verbose=False
        )
        found[case] = {
            "training": [numbers(each) for each in straight.trained],
            "evaluated": [numbers(each) for each in straight.evaluated],
            "resumed": [numbers(each) for each in resumed.trained],
            "averages": [numbers(averaging.average), numbers(again.average)],
            "updates": [float(averaging.updates), float(again.updates)],
            "was read": again.was_read,
            "bare": [start.seen, len(bare.trained)],
            "validated": weights(evaluated),
            "file": describe(path),
        }
    return found


class WeightsAtStart(L.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen = weights(pl_module)


def describe(path: Path) -> Any:
    """The keys of a file's model part, and for shards the number of each tensor's pieces."""
    torch.distributed.barrier()
    if path.is_file():
        saved = torch.load(path, weights_only=False)
        return {"keys": sorted(saved["state_dict"]), "weights": numbers(saved["state_dict"])}
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    model = {k: v for k, v in stored.items() if k.startswith("state_dict.")}
    pieces = {key: len(value.chunks) for key, value in model.items()}  # type: ignore[union-attr]
    consolidated = _load_distributed_checkpoint(path)
    return {"pieces": pieces, "consolidated": numbers(consolidated["state_dict"])}


def no_second_weights(out: Path) -> Any:
    """A sharded checkpoint of a bare Trainer has none to be read."""
    path = out / "bare shards.ckpt"
    trainer("fsdp2", Saves(path, at=4)).fit(Sharded(), ResumableLoader(8, 2), loader(4, 2))
    averaging = ShardedAveraging()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer("fsdp2", averaging).fit(
            Sharded(), ResumableLoader(8, 2), loader(4, 2), ckpt_path=path, weights_only=False
        )
    fresh = ShardedAveraging()
    trainer("fsdp2", fresh).fit(Sharded(), ResumableLoader(8, 2), loader(4, 2))
    return [averaging.was_read, fresh.was_read]


# ------------------------------------------------------------------------ optimizer modes


class ShardedFree(Sharded):
    def __init__(self) -> None:
        super().__init__(optimizer=schedulefree.AdamWScheduleFree)


class GuidedFree(ShardedFree):
    """Has the hooks that a bare Trainer needs.

    Before torch loads a sharded state, it steps with optimizers whose state is empty.
    """

    def on_fit_start(self) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.train()
        optimizer.state.clear()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.optimizers(use_pl_optimizer=False).train()  # type: ignore[union-attr]


def with_modes(out: Path) -> Any:
    """Trains with a schedule-free optimizer, saves, and resumes with and without this package."""
    found = {}
    for name, whole in (("ddp", True), ("fsdp2", False), ("fsdp2", True)):
        for hook in ("on_train_batch_end", "on_validation_end"):
            case = f"{name} {'whole' if whole else 'sharded'} {hook}"
            path = out / f"modes {case}.ckpt"
            options: dict[str, Any] = {"whole": whole, "val_check_interval": 4}

            def make(kind: str = "", name: str = name) -> Looked:
                if name == "ddp":
                    return Looked(optimizer=schedulefree.AdamWScheduleFree)
                return GuidedFree() if kind == "bare" else ShardedFree()

            data = (ResumableLoader(8, 2), loader(4, 2))
            straight, saves = make(), Saves(path, at=4, hook=hook)
            clipping = GradientClipping(NormClip(1.0))
            trainer(name, saves, clipping, **options).fit(straight, *data)
            resumed, again = make(), GradientClipping(NormClip(1.0))
            trainer(name, again, **options).fit(resumed, *data, ckpt_path=path, weights_only=False)
            found[case] = {
                "training": [numbers(each) for each in straight.trained],
                "evaluated": [numbers(each) for each in straight.evaluated],
                "resumed": [numbers(each) for each in resumed.trained],
                "ends": [weights(straight), weights(resumed)],
                "file": describe(path),
            }
            if name == "fsdp2":
                bare, start = make("bare"), WeightsAtStart()
                trainer(name, start, whole=whole, limit_val_batches=0).fit(
                    bare, *data, ckpt_path=path, weights_only=False
                )
                found[case]["bare"] = [start.seen, len(bare.trained)]
    return found


# ------------------------------------------------------------------------------ snapshots


class RollsBack(Capability):
    """Rolls back to the end of one update at a later one, and records local states of both."""

    owns, rank = "rolls back", 45

    def __init__(self, *, keep: int, at: int) -> None:
        self.keep, self.at = keep, at
        self.states: dict[str, Any] = {}

    def decide(self, update: Update) -> Rejection | None:
        if update.progress.steps != self.at:
            return None
        return Rejection(reason="bad", roll_back=self.taken)

    def end_batch(self, batch: Batch) -> None:
        step = batch.fit.trainer.global_step
        if step == self.keep:
            self.taken = batch.fit.take_snapshot()
            self.states["taken"] = local_state(batch.fit.trainer, batch.fit.module)
        elif step == self.at + 1:
            self.states["before"] = local_state(batch.fit.trainer, batch.fit.module)


class LooksAfter(L.Callback):
    def __init__(self, rolls: RollsBack) -> None:
        self.rolls = rolls

    def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
        if trainer.global_step == self.rolls.at + 1:
            self.rolls.states["restored"] = local_state(trainer, module)


def local_state(trainer: Any, module: Any) -> Any:
    """This process's shards of weights, buffers and optimizer state."""

    def local(value: Any) -> Any:
        if isinstance(value, DTensor):
            value = value.to_local()
        return value.detach().flatten().tolist() if isinstance(value, Tensor) else value

    (optimizer,) = trainer.optimizers
    optimizer = getattr(optimizer, "optim", optimizer)  # inside a ZeroRedundancyOptimizer
    states = [optimizer.state.get(p, {}) for p in module.parameters()]
    return {
        "weights": [local(p) for p in module.parameters()],
        "states": [{key: local(value) for key, value in state.items()} for state in states],
        "random": torch.get_rng_state().tolist(),
    }


def rolled_back(out: Path) -> Any:
    found = {}
    for name in (*STRATEGIES, "zero"):
        strategy = "ddp" if name == "zero" else name
        model, rolls = module(strategy), RollsBack(keep=2, at=5)
        if name == "zero":  # each process has the states of some parameters, in an inner optimizer
            parameters = list(model.parameters())
            from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns

            model.configure_optimizers = lambda parameters=parameters: ZeroRedundancyOptimizer(
                parameters, torch.optim.AdamW, lr=0.05
            )
        own = [LearningRateScheduler(Linear(start=1.0, end=0.0)), StepGuard(), rolls]
        clipping = GradientClipping(ZClip(warmup=2))
        one = trainer(strategy, *own, clipping, LooksAfter(rolls))
        one.fit(model, ResumableLoader(8, 2), loader(4, 2))
        found[name] = {**rolls.states, "steps": one.global_step, "end": weights(model)}
    return found


# -------------------------------------------------------------- saves in any hook, on any process


def own() -> list[Any]:
    return [
        LearningRateScheduler(Linear(start=1.0, end=0.0)),
        GradientClipping(ZClip(warmup=2)),
        StepGuard(),
        FakeAveraging(),
    ]


class Observed(Capability):
    """The learning rate of every update."""

    owns, rank = "observed", 80

    def __init__(self) -> None:
        self.lrs: list[float] = []

    def observe(self, update: Update) -> None:
        self.lrs.append(float(update.optimizer.param_groups[0]["lr"]))


def saved_first(out: Path) -> Any:
    """A callback before those of the package saves on all processes, in several hooks."""
    found = {}
    for name in STRATEGIES:
        callbacks = own() if name == "ddp" else own()[:-1]  # its own state would hold shards
        for hook in ("on_train_batch_end", "on_validation_end"):
            path = out / f"first {name} {hook}.ckpt"
            straight, saves, seen = module(name), Saves(path, at=4, hook=hook), Observed()
            options: dict[str, Any] = {"val_check_interval": 4}
            trainer(name, saves, *callbacks, seen, **options).fit(
                straight, ResumableLoader(8, 2), loader(4, 2)
            )
            resumed, again = module(name), Observed()
            fresh = own() if name == "ddp" else own()[:-1]
            trainer(name, *fresh, again, **options).fit(
                resumed, ResumableLoader(8, 2), loader(4, 2), ckpt_path=path, weights_only=False
            )
            states = [
                [one.saved_state() for one in each if type(one) is not FakeAveraging]
                for each in (callbacks, fresh)
            ]
            found[f"{name} {hook}"] = {
                "lrs": [seen.lrs, again.lrs],
                "trained": [
                    [numbers(each) for each in model.trained] for model in (straight, resumed)
                ],
                "states": [str(each) for each in states],
            }
            callbacks = own() if name == "ddp" else own()[:-1]
    return found


def bare_resumed(out: Path) -> Any:
    """Resumes with callbacks of the package from a checkpoint that was saved without them."""
    found = {}
    for name in STRATEGIES:
        for limits in ({"max_epochs": 2}, {"max_epochs": -1, "max_steps": 8}):
            case = f"{name} {'epochs' if limits['max_epochs'] == 2 else 'steps'}"
            path = out / f"bare {case}.ckpt"
            bare = module(name)
            trainer(name, Saves(path, at=3), **limits).fit(
                bare, ResumableLoader(8, 2), loader(4, 2)
            )
            seen, scheduler = Observed(), LearningRateScheduler(Linear(start=1.0, end=0.0))
            resumed = module(name)
            one = trainer(name, scheduler, GradientClipping(NormClip()), seen, **limits)
            one.fit(
                resumed, ResumableLoader(8, 2), loader(4, 2), ckpt_path=path, weights_only=False
            )
            found[case] = {"lrs": seen.lrs, "steps": one.global_step}
    return found


# -------------------------------------------------------------- buffers of the window's start


class Normalized(L.LightningModule):
    """A network with running statistics, with or without FSDP2."""

    def __init__(self, *, sharded: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.sharded = sharded
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    def configure_model(self) -> None:
        if self.sharded and not hasattr(self.net[0], "set_requires_gradient_sync"):
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def buffer_values(self) -> dict[str, list[float]]:
        return numbers(dict(self.net.named_buffers(prefix="net")))


class SavesBatch(L.Callback):
    """Saves two kinds of files after a loader batch, and records the buffers of every batch."""

    def __init__(self, path: Path, *, batch: int) -> None:
        self.path, self.batch = path, batch
        self.ends: list[dict[str, list[float]]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
        self.ends.append(module.buffer_values())
        if len(self.ends) == self.batch:
            trainer.save_checkpoint(self.path)
            trainer.save_checkpoint(self.path.with_suffix(".weights"), weights_only=True)


def saved_buffers(out: Path) -> Any:
    """Saves after the second of the three micro-batches of an update, and resumes."""
    found = {}
    for case in ("ddp whole", "fsdp2 whole", "fsdp2 sharded"):
        path, name = out / f"buffers {case}.ckpt", case.split()[0]

        def train(
            *own: Any, name: str = name, whole: bool = "whole" in case, **resume: Any
        ) -> Normalized:
            model = Normalized(sharded=name == "fsdp2")
            scheduler = LearningRateScheduler(Linear(start=1.0, end=0.5))
            batches = BatchSizeScheduler(ConstantBatchSize(12))
            data = GlobalBatchLoader(Regression(48), micro_batch_size=2, seed=1)
            trainer(name, scheduler, batches, *own, whole=whole).fit(model, data, **resume)
            return model

        saves = SavesBatch(path, batch=5)
        straight = train(saves)
        resumed = train(ckpt_path=path, weights_only=False)
        found[case] = {
            "ends": saves.ends,
            "files": [saved_values(path), saved_values(path.with_suffix(".weights"))],
            "straight": straight.buffer_values(),
            "resumed": resumed.buffer_values(),
        }
    return found


def saved_values(path: Path) -> dict[str, list[float]]:
    torch.distributed.barrier()
    whole = torch.load(path, weights_only=False) if path.is_file() else None
    saved = (whole or _load_distributed_checkpoint(path))["state_dict"]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return {key: value for key, value in numbers(saved).items() if key.endswith(buffers)}


NAMES = [
    "averaged",
    "no_second_weights",
    "with_modes",
    "rolled_back",
    "saved_first",
    "bare_resumed",
    "saved_buffers",
]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = Path(sys.argv[1])
    results = {name: globals()[name](out) for name in NAMES}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
