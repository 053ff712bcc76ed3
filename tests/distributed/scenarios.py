"""Scenarios on two processes; each function returns plain data that the tests compare."""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DistributedSampler

from lightning_bigopt import (
    AutoClip,
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    GradientNoiseScale,
    Groups,
    LearningRateScheduler,
    Linear,
    LossSpike,
    NonFinite,
    NormClip,
    NormSpike,
    OptimizationMonitor,
    StepGuard,
)
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.engine import Engine
from lightning_bigopt.reporting.runs import read_run
from lightning_bigopt.trainer_access import strategies
from tests.bad_batches import KINDS, BadBatchModule
from tests.gradients.step_problems import ClosureSam
from tests.helpers import QUIET, Probe, Regression, ResumableLoader, cpu_precision, full, loader
from tests.repeated_evaluations import OPTIMIZERS as REPEATED
from tests.repeated_evaluations import Evaluated, without

POLICY = BatchSizeSteps(
    {
        "0%": 4,
        "1 steps": 8,
        "2 steps": 12,
        "3 steps": 20,
        "4 steps": 16,
        "5 steps": 4,
        "6 steps": 16,
        "7 steps": 8,
        "9 steps": 20,
    }
)


class Sharded(Probe):
    """Probe under FSDP2."""

    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[2]):
            if not hasattr(layer, "set_requires_gradient_sync"):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def strategy(name: str) -> Any:
    if name == "ddp":
        return DDPStrategy()
    if name == "fsdp1":
        return FlatShards()
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def module(name: str, **options: Any) -> Probe:
    return (Probe if name == "ddp" else Sharded)(**options)


def fit(
    name: str, model: Probe, data: Any, *callbacks: Any, ckpt: Any = None, **options: Any
) -> Any:
    trainer = L.Trainer(
        **{
            **QUIET,
            "devices": 2,
            "strategy": strategy(name),
            "callbacks": list(callbacks),
            **options,
        }
    )
    trainer.fit(model, data, ckpt_path=ckpt)
    return trainer


def in_order(size: int) -> DistributedSampler[Any]:
    """Returns a sampler of this process's samples without shuffling."""
    rank = int(os.environ["RANK"])
    return DistributedSampler(Regression(size), num_replicas=2, rank=rank, shuffle=False)


def weights(model: Probe) -> list[float]:
    return [v for p in model.net.parameters() for v in full(p.detach()).flatten().tolist()]


def gradient_means(out: Path) -> Any:
    """Records the errors of gradients, with windows of any length and both samplers."""
    found = {}
    for name, precision in itertools.product(("ddp", "fsdp2"), ("32-true", "16-mixed")):
        model = module(name, lr=0.01)
        trainer = fit(
            name,
            model,
            loader(50, 2),
            BatchSizeScheduler(POLICY),
            max_epochs=3,
            **cpu_precision(precision),
        )
        found[f"{name} {precision}"] = {
            "errors": model.errors,
            "windows": [len(w) for w in model.windows],
            "steps": trainer.global_step,
        }
    return found


def global_norms(out: Path) -> Any:
    """Records the clipped norm of the whole gradient, and the weights after training."""
    found = {}
    for name, precision in itertools.product(
        ("ddp", "fsdp2"), ("32-true", "bf16-mixed", "16-mixed")
    ):
        for fused in (False, True):
            model = module(name, lr=0.01, optimizer=torch.optim.AdamW, fused=fused)
            fit(
                name,
                model,
                loader(32, 4, sampler=in_order(32)),
                GradientClipping(NormClip(max_norm=0.5)),
                max_epochs=2,
                use_distributed_sampler=False,
                **cpu_precision(precision),
            )
            found[f"{name} {precision} fused={fused}"] = {
                "norms": model.norms,
                "weights": weights(model),
            }
    return found


def resume(out: Path) -> Any:
    """Compares an uninterrupted run with a resumed one, with four callbacks."""
    found = {}
    for name in ("ddp", "fsdp2"):

        def callbacks() -> list[Any]:
            return [
                LearningRateScheduler(Linear(start=1.0, end=0.1)),
                OptimizationMonitor(),
                GradientClipping(NormClip(max_norm=0.5)),
                BatchSizeScheduler(BatchSizeSteps({"0%": 4, "30%": 8, "60%": 12})),
            ]

        build = functools.partial(module, name, lr=0.01, optimizer=torch.optim.AdamW)
        straight, save = build(), SaveAtSteps(out / name, {2, 5})
        fit(name, straight, ResumableLoader(24, 2), *callbacks(), save, max_epochs=2)
        found[name] = {"straight": [straight.lrs, straight.windows, weights(straight)]}
        for step in (2, 5):
            model = build()
            fit(
                name,
                model,
                ResumableLoader(24, 2),
                *callbacks(),
                max_epochs=2,
                ckpt=out / name / f"{step}.ckpt",
            )
            found[name][str(step)] = [model.lrs, model.windows, weights(model)]
    return found


def resume_with_another_rule(out: Path) -> Any:
    """Resumes with another clipping rule, with and without the state of the first one."""
    path = out / "other_rule"
    save = SaveAtSteps(path, {2})
    first = GradientClipping(AutoClip(percentile=10))
    fit("ddp", module("ddp", lr=0.01), ResumableLoader(24, 2), first, save, max_epochs=1)
    state = torch.load(path / "2.ckpt", weights_only=True)
    del state["callbacks"]["GradientClipping"]
    bare = path / f"bare{os.environ['RANK']}.ckpt"
    torch.save(state, bare)
    found = []
    for ckpt in (path / "2.ckpt", bare):
        model, clipping = module("ddp", lr=0.01), GradientClipping(AutoClip(percentile=60))
        fit("ddp", model, ResumableLoader(24, 2), clipping, max_epochs=1, ckpt=ckpt)
        (report,) = clipping.reports().values()
        found.append([report.updates, report.clipped, clipping.saved_state(), weights(model)])
    return found


class ShardedBadBatchModule(BadBatchModule, Sharded):
    """BadBatchModule under FSDP2."""


POISON = {4: math.nan, 7: 100.0}


def state_of(guard: StepGuard) -> dict[str, Any]:
    """Returns the state of the detectors of the only optimizer."""
    return guard.saved_state()["guarded"][""]["detectors"]


def guarded(out: Path) -> Any:
    """Trains with a NaN and a spike on the second process only."""
    found = {}
    for name, precision, kind, accumulate in itertools.product(
        ("ddp", "fsdp2"), ("32-true", "bf16-mixed", "16-mixed"), KINDS, (1, 3)
    ):
        build = BadBatchModule if name == "ddp" else ShardedBadBatchModule
        model = build(POISON, rank=1, optimizer=torch.optim.AdamW, lr=0.01, **KINDS[kind])
        guard = StepGuard([NonFinite(), NormSpike(armed=3), LossSpike(armed=3, floor=2.0)])
        trainer = fit(
            name,
            model,
            loader(40 * accumulate, 2, sampler=in_order(40 * accumulate)),
            guard,
            GradientClipping(NormClip(max_norm=0.5)),
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            use_distributed_sampler=False,
            **cpu_precision(precision),
        )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        found[f"{name} {precision} {kind} {accumulate}"] = {
            "changed": model.changed,
            "rejected": [[r.update, r.detector, r.rank, str(r.worst)] for r in guard.rejections],
            "weights": weights(model),
            "state": str(guard.saved_state()),
            "losses": state_of(guard)["LossSpike"]["accepted"],
            "scale": scaler.get_scale() if scaler is not None else 0.0,
        }
    return found


class ShardedEvaluated(Evaluated, Sharded):
    """Evaluated under FSDP2."""


def repeated(out: Path) -> Any:
    """Trains SAM with a NaN in second evaluations of the second process only."""
    found: dict[str, Any] = {}
    bad, size = {(0, 1): math.nan, (3, 0): math.nan, (4, 1): math.inf}, 16
    for name in ("ddp", "fsdp2"):
        build = Evaluated if name == "ddp" else ShardedEvaluated
        guard = StepGuard([NonFinite()])
        model = build(bad, rank=1, **REPEATED["SAM"])
        options = {"max_epochs": 1, "use_distributed_sampler": False}
        fit(name, model, ResumableLoader(size, 2), guard, **options)
        plain = build(**REPEATED["SAM"])
        fit(name, plain, without(size, {0, 3, 4}), **options)
        found[name] = {
            "rejected": [r.update for r in guard.rejections],
            "weights": weights(model),
            "plain": weights(plain),
        }
    # Without steps, SAM's first gradients are those of SGD.
    for label, optimizer in (("SAM", ClosureSam), ("SGD", torch.optim.SGD)):
        noise = GradientNoiseScale(minimum_updates=2)
        model = Evaluated(optimizer=optimizer, lr=0.0)
        data = loader(size, 2, sampler=in_order(size))
        fit("ddp", model, data, noise, max_epochs=1, use_distributed_sampler=False)
        found[f"noise {label}"] = noise.saved_state()["estimator"]
    return found


class FlatShards(FSDPStrategy):
    """FSDP1 on the CPU, which Lightning does not allow."""

    def _setup_model(self, module: Any) -> Any:
        return FullyShardedDataParallel(
            module,
            device_id=torch.device("cpu"),
            use_orig_params=True,
            auto_wrap_policy=by_layer,
            sharding_strategy=self.sharding_strategy,
        )


def by_layer(module: Any, recurse: bool, nonwrapped_numel: int) -> bool:
    """Wraps every linear layer separately."""
    return recurse or isinstance(module, torch.nn.Linear)


def flat_shards(out: Path) -> Any:
    """Trains under FSDP1: the global norm, a bad update, and the final weights."""
    found = {}
    for fused, sharding in ((False, "FULL_SHARD"), (True, "FULL_SHARD"), (True, "NO_SHARD")):
        model = BadBatchModule(POISON, rank=1, optimizer=torch.optim.AdamW, lr=0.01, fused=fused)
        guard = StepGuard([NonFinite(), NormSpike(armed=3)])
        clipping = GradientClipping(Groups({"net.0.*": None, "*": NormClip(max_norm=0.1)}))
        totals = Norms()
        trainer = L.Trainer(
            **QUIET,
            devices=2,
            strategy=FlatShards(sharding_strategy=sharding),
            callbacks=[guard, clipping, totals],
            max_epochs=1,
            use_distributed_sampler=False,
        )
        trainer.fit(model, loader(40, 2, sampler=in_order(40)))
        found[f"{sharding}, fused={fused}"] = {
            "norms": totals.norms,
            "rejected": [[r.update, r.detector, r.rank] for r in guard.rejections],
            "names": [name for r in guard.rejections for name, _ in r.parameters],
            "weights": totals.weights,
        }
    return found


class Norms(Capability):
    """Records the norms of every update, and the full weights at the end."""

    owns, rank = "test", 99

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.weights: list[float] = []

    def observe(self, update: Any) -> None:
        self.norms.append(update.norms.value)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        if isinstance(trainer.strategy, FSDPStrategy):
            with FullyShardedDataParallel.summon_full_params(trainer.strategy.model):
                self.weights = weights(module)


class WithoutComparison(Probe):
    """Probe without the comparison of gradients, which flat shards do not allow."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Disabled."""


class SaveAtSteps(L.Callback):
    """Saves checkpoints after given updates."""

    def __init__(self, folder: Path, steps: set[int]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step in self.steps and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def schedules(out: Path) -> Any:
    """Runs the scenarios of ``schedule_scenarios``, which imports this module."""
    from tests.distributed import schedule_scenarios

    own = schedule_scenarios
    rules = (own.end_of_budget, own.every_resume, own.extensions, own.times, own.changes)
    return {
        scenario.__name__: scenario(out) for scenario in (*rules, own.range_tests, own.found_rates)
    }


def gradients(out: Path) -> Any:
    """Runs the scenarios of ``gradient_scenarios``, which imports this module."""
    from tests.distributed import gradient_scenarios

    return {name: getattr(gradient_scenarios, name)(out) for name in gradient_scenarios.NAMES}


def optimizers(out: Path) -> Any:
    """Runs the scenarios of ``optimizer_scenarios``, which imports this module."""
    from tests.distributed import optimizer_scenarios

    return {name: getattr(optimizer_scenarios, name)(out) for name in optimizer_scenarios.NAMES}


def compression(out: Path) -> Any:
    """Runs the scenarios of ``compression_scenarios``, which imports this module."""
    from tests.distributed import compression_scenarios

    return {name: getattr(compression_scenarios, name)(out) for name in compression_scenarios.NAMES}


def monitored(out: Path) -> Any:
    """Returns the values that the monitor logs of layers, and the processes that wrote files."""
    found = {}
    for name in ("ddp", "fsdp2", "fsdp1"):
        logger = TensorBoardLogger(out, name=name, version="monitored")
        build = functools.partial(module, name) if name != "fsdp1" else WithoutComparison
        fit(
            name,
            build(lr=0.01, optimizer=torch.optim.AdamW),
            loader(32, 4, sampler=in_order(32)),
            GradientClipping(NormClip(max_norm=0.5)),
            OptimizationMonitor(
                every=1,
                layers="parameters",
                histograms_every=2,
                report=str(out / f"{name}.html"),
                event_folder=str(events := out / f"{name}-events"),
            ),
            max_epochs=2,
            use_distributed_sampler=False,
            logger=logger,
        )
        folders = (logger.log_dir, events)
        is_first = os.environ["RANK"] == "0"
        curves, beside = (read_run(path).curves if is_first else {} for path in folders)
        files = sum(len(list(Path(path).glob("events*"))) for path in folders)
        reported = (out / f"{name}.html").exists()
        found[name] = {
            "curves": dict(curves),
            "beside": dict(beside),
            "files": files,
            "reported": reported,
        }
    return found


def output_folders(out: Path) -> Any:
    """Trains with folders that one of the processes cannot write to, from the start or later."""
    rank = int(os.environ["RANK"])
    (out / "file").touch()

    def error_of(callback: Any) -> str:
        try:
            fit("ddp", Probe(), loader(32, 4), callback, max_epochs=1, logger=CSVLogger(out))
        except ValueError as error:
            return str(error)
        return ""

    # A folder of each process's own, of which only one is a file.
    own = out / "file" if rank == 1 else out / "folder"
    found: dict[str, Any] = {
        "batches of process 1": error_of(StepGuard(forensics=str(own))),
        "report of process 0": error_of(OptimizationMonitor(report=str(out / "file" / "a.html"))),
        "events of process 0": error_of(OptimizationMonitor(event_folder=str(out / "file"))),
    }
    folder = out / f"of rank {rank}"
    guard = StepGuard([NonFinite()], forensics=str(folder))

    class BreaksFolder(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 1 and rank == 1:
                folder.touch()

    model = BadBatchModule({2: math.nan, 4: math.nan}, rank=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit("ddp", model, loader(64, 4), BreaksFolder(), guard, max_epochs=1)
    found["later"] = {
        "weights": weights(model),
        "files": [update.file is not None for update in guard.rejections],
        "warnings": sum("could not be written" in str(w.message) for w in caught),
    }
    return found


class Bad(Probe):
    """Trains on batches whose loss is NaN; records their first samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.first.append(int(batch[2][0]))
        return self.loss(batch[0], batch[1]) * math.nan

    def on_before_optimizer_step(self, optimizer: Any) -> None: ...


def rejected_batches(out: Path) -> Any:
    """Resumes within a window of three micro-batches; returns the indices of rejected batches."""
    path = out / "within.ckpt"

    class Saves(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            if index == 4:
                trainer.save_checkpoint(path)

    found = []
    for ckpt, more in ((None, [Saves()]), (path, [])):
        model, guard = Bad(), StepGuard(max_consecutive=99)
        data = GlobalBatchLoader(Regression(48), micro_batch_size=2, shuffle="sequential")
        scheduler = BatchSizeScheduler(ConstantBatchSize(12))
        fit("ddp", model, data, guard, scheduler, *more, max_epochs=1, ckpt=ckpt)
        found.append([[i for update in guard.rejections for i in update.batches], model.first])
    return found


def restarted(out: Path) -> Any:
    """Starts a run three times in its TensorBoard folder; returns the logged steps."""
    for steps in (3, 2, 5):
        time.sleep(1 - time.time() % 1)  # event files are sorted by seconds
        logger = TensorBoardLogger(out, name="restarted", version="0")
        monitor = OptimizationMonitor(every=1)
        fit("ddp", Probe(), loader(64, 4), monitor, max_steps=steps, logger=logger)
    if os.environ["RANK"] != "0":
        return None
    events = EventAccumulator(logger.log_dir).Reload()
    return [event.step for event in events.Scalars("grad_norm/total")]


class AnyBatch(Probe):
    """Trains on batches of tensors or texts alike."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(torch.ones(2, 4)).square().mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.lrs.append(optimizer.param_groups[0]["lr"])


def uncounted(out: Path) -> Any:
    """Counts the samples of batches of which one process has one without a tensor."""
    text_on_one = [torch.ones(2), torch.ones(3), torch.ones(1), torch.ones(2)]
    if os.environ["RANK"] == "1":
        text_on_one[2] = "text"  # type: ignore[call-overload]
    found: dict[str, Any] = {}
    for case, callbacks in {
        "needed by none": [LearningRateScheduler(Linear())],
        "optional": [LearningRateScheduler(Linear()), OptimizationMonitor(), StepGuard()],
        "required": [LearningRateScheduler(Linear(), budget="100 samples")],
    }.items():
        reduced: list[float] = []
        keep = strategies.sum_over_data
        strategies.sum_over_data = lambda trainer, value, keep=keep, reduced=reduced: (
            reduced.append(value) or keep(trainer, value)
        )
        model = AnyBatch()
        try:
            trainer = fit("ddp", model, Batches(text_on_one), *callbacks, max_epochs=2)
            clock = next(c for c in trainer.callbacks if isinstance(c, Engine)).clock
            found[case] = {"known": clock.samples_are_known, "samples": clock.samples}
        except ValueError as error:
            found[case] = {"error": str(error)}
        finally:
            strategies.sum_over_data = keep
        found[case] |= {"rates": model.lrs, "collectives": len(reduced)}
    return found


class Batches:
    """A loader without a ``batch_size``."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


NAMES = [
    "gradient_means",
    "global_norms",
    "resume",
    "resume_with_another_rule",
    "guarded",
    "repeated",
    "flat_shards",
    "schedules",
    "gradients",
    "optimizers",
    "compression",
    "monitored",
    "uncounted",
    "output_folders",
    "restarted",
    "rejected_batches",
    "contracts",
]
