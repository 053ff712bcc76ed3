"""Batch sizes on two processes; each function returns plain data that the tests compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GlobalBatchFinder,
    GlobalBatchLoader,
    GradientNoiseScale,
    LearningRateScheduler,
    Linear,
)
from tests.batch_helpers import (
    RAMPED,
    ExactEpochs,
    Normalizes,
    QuadraticNoise,
    Recorder,
    SaveEvery,
    TailRecorder,
    TokenProbe,
    Tokens,
    callbacks_of_tail_recorder,
    noise_loader,
)
from tests.distributed.scenarios import POLICY, Sharded, strategy
from tests.helpers import QUIET, Probe, Regression, cpu_precision, full


def fit(
    name: str, model: Any, data: Any, *callbacks: Any, ckpt: Any = None, **options: Any
) -> L.Trainer:
    devices = int(os.environ["WORLD_SIZE"])
    defaults = {"devices": devices, "strategy": strategy(name), "callbacks": list(callbacks)}
    trainer = L.Trainer(**{**QUIET, **defaults, **options})
    trainer.fit(model, data, ckpt_path=ckpt)
    return trainer


def flat(model: Any) -> list[float]:
    return [v for p in model.net.parameters() for v in full(p.detach()).flatten().tolist()]


class ShardedTokens(TokenProbe):
    """TokenProbe under FSDP2."""

    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[2]):
            if not hasattr(layer, "set_requires_gradient_sync"):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class ShardedRecorder(Recorder):
    """Recorder under FSDP2."""

    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[2]):
            if not hasattr(layer, "set_requires_gradient_sync"):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class ShardedQuadraticNoise(QuadraticNoise):
    """QuadraticNoise under FSDP2."""

    def configure_model(self) -> None:
        if not hasattr(self.layer, "set_requires_gradient_sync"):
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])


def token_means(out: Path) -> Any:
    """Compares every gradient with the mean over the tokens of both processes."""
    found = {}
    for name, precision in (("ddp", "32-true"), ("ddp", "16-mixed"), ("fsdp2", "32-true")):
        model = (TokenProbe if name == "ddp" else ShardedTokens)(lr=0.001)
        data = DataLoader(Tokens(50), batch_size=2)
        scheduler = BatchSizeScheduler(POLICY, weight="mask")
        fit(name, model, data, scheduler, max_epochs=2, **cpu_precision(precision))
        found[f"{name} {precision}"] = {"errors": model.errors, "tokens": model.windows}
    return found


def callbacks_of_train_recorder() -> list[Any]:
    """Returns the callbacks of ``tests.batch_helpers.train_recorder``."""
    return [
        LearningRateScheduler(Linear(start=1.0, end=0.1)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 5, "30%": 11, "70%": 7}), lr_scaling="sqrt"),
    ]


def exact_order(out: Path) -> Any:
    """Trains on a GlobalBatchLoader, with and without workers, on any number of processes."""
    found = {}
    for workers in (0, 2):
        model = Recorder(workers=workers)
        fit("ddp", model, None, *callbacks_of_train_recorder(), max_epochs=3)
        found[str(workers)] = {"seen": model.seen, "weights": flat(model)}
    return found


def exact_loader(out: Path) -> Any:
    """Trains on a GlobalBatchLoader under DDP and FSDP2, and resumes at some checkpoints.

    A checkpoint is written after every micro-batch, so inside windows too.
    """
    found = {}
    for name in ("ddp", "fsdp2"):
        build = Recorder if name == "ddp" else ShardedRecorder
        straight, folder = build(), out / f"exact {name}"
        save = SaveEvery(folder)
        fit(name, straight, None, *callbacks_of_train_recorder(), save, max_epochs=3)
        resumed = {}
        for number in range(3, save.count, 9):
            model = build()
            ckpt = folder / f"{number}.ckpt"
            fit(name, model, None, *callbacks_of_train_recorder(), ckpt=ckpt, max_epochs=3)
            resumed[str(number)] = {"seen": model.seen, "weights": flat(model)}
        gradients = (Probe if name == "ddp" else Sharded)(lr=0.01)
        loader = GlobalBatchLoader(Regression(37), micro_batch_size=3)
        fit(name, gradients, loader, BatchSizeScheduler(ConstantBatchSize(11)), max_epochs=2)
        found[name] = {
            "seen": straight.seen,
            "weights": flat(straight),
            "folder": str(folder),
            "resumed": resumed,
            "errors": gradients.errors,
        }
    return found


def exact_epochs(out: Path) -> Any:
    """Trains on epochs of other sizes with a ramp of the batch size, and resumes in the second."""

    class SavesUpdate(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(out / "epochs.ckpt")

    found = []
    for ckpt in (None, out / "epochs.ckpt"):
        model = ExactEpochs(12, 24, 48, micro=1)
        callbacks = [LearningRateScheduler(Linear()), BatchSizeScheduler(RAMPED), SavesUpdate()]
        options = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
        fit("ddp", model, None, *callbacks, ckpt=ckpt, **options)
        found.append(model.rates)
    return found


def tails(out: Path) -> Any:
    """Trains with every tail and resumes at each checkpoint, and with batch normalization."""
    found = {}
    for tail in ("keep", "merge", "drop"):
        straight, save = TailRecorder(tail), SaveEvery(out / f"tail {tail}")
        fit("ddp", straight, None, *callbacks_of_tail_recorder(), save, max_epochs=3)
        resumed = {}
        for number in range(2, save.count, 3):
            model, ckpt = TailRecorder(tail), save.folder / f"{number}.ckpt"
            fit("ddp", model, None, *callbacks_of_tail_recorder(), ckpt=ckpt, max_epochs=3)
            resumed[str(number)] = {"seen": model.seen, "weights": flat(model)}
        gradients, normalizes = Probe(lr=0.01), Normalizes(torch.nn.BatchNorm1d(6))
        loader = GlobalBatchLoader(Regression(17), micro_batch_size=4, tail=tail)
        fit("ddp", gradients, loader, BatchSizeScheduler(ConstantBatchSize(7)), max_epochs=2)
        error = ""
        try:  # the tail of 3 samples gives the second process one
            fit("ddp", normalizes, loader, BatchSizeScheduler(ConstantBatchSize(7)), max_epochs=2)
        except ValueError as raised:
            error = str(raised)
        found[tail] = {
            "seen": straight.seen,
            "rates": straight.rates,
            "weights": flat(straight),
            "resumed": resumed,
            "errors": gradients.errors,
            "windows": [len(window) for window in gradients.windows],
            "updates": normalizes.updates,
            "error": error,
        }
    return found


def resume_from_one_process(out: Path) -> Any:
    """Resumes on two processes from checkpoints that one process wrote in the fixture."""
    found = {}
    for path in sorted((out / "alone").glob("*.ckpt")):
        if int(path.stem) % 7 == 3:
            model = Recorder()
            fit("ddp", model, None, *callbacks_of_train_recorder(), ckpt=path, max_epochs=3)
            found[path.stem] = {"seen": model.seen, "weights": flat(model)}
    return found


def uneven_shards(out: Path) -> Any:
    """Trains on a user's shards of 13 and 14 samples; the batch grows after 27 samples."""
    rank = int(os.environ["RANK"])
    mine = Subset(Regression(27), range(13 * rank, 13 + 14 * rank))
    model = Probe(lr=0.01)
    scheduler = BatchSizeScheduler(BatchSizeSteps({"0%": 4, "27 samples": 8}))
    data = DataLoader(mine, batch_size=2)
    fit("ddp", model, data, scheduler, max_epochs=2, use_distributed_sampler=False)
    return {"windows": [len(w) for w in model.windows], "errors": model.errors}


def noise_scales(out: Path) -> Any:
    """Measures the noise scale by the hook, and from the first micro-batch under DDP and FSDP2."""
    rank, found = int(os.environ["RANK"]), {}
    for name, accumulate in (("ddp", 1), ("ddp", 4), ("fsdp2", 4)):
        scale = GradientNoiseScale(decay=0.999)
        fit(
            name,
            (QuadraticNoise if name == "ddp" else ShardedQuadraticNoise)(),
            noise_loader(2, rank),
            scale,
            max_steps=300,
            accumulate_grad_batches=accumulate,
        )
        report = scale.report
        found[f"{name} {accumulate}"] = [
            report.noise_scale,
            report.standard_error,
            report.noise,
            report.signal,
        ]
    scale = GradientNoiseScale()
    strategy = DDPStrategy(ddp_comm_hook=fp16_compress_hook)  # ignored on a CPU
    fit("", QuadraticNoise(), noise_loader(2, rank), scale, max_steps=2, strategy=strategy)
    found["hook"] = [scale.estimator.updates, strategy._ddp_comm_wrapper]
    return found


class UnequalMemory(Probe):
    """Runs out of memory at a smaller batch on the second process."""

    micro_batch_size = 1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) > (20, 9)[int(os.environ["RANK"])]:
            raise torch.OutOfMemoryError("on purpose")
        return self.loss(batch[0], batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Disabled: this module tests memory only."""

    def train_dataloader(self) -> Any:
        return DataLoader(Regression(96), batch_size=self.micro_batch_size)


def finder(out: Path) -> Any:
    """Searches a batch size where one of two processes runs out of memory first."""
    model, search = UnequalMemory(), GlobalBatchFinder(global_batch_size=48, headroom=0.0)
    before = flat(model)
    after: list[float] = []

    class RecordsState(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            after.extend(flat(pl_module))

    scheduler = BatchSizeScheduler(ConstantBatchSize(48))
    fit("ddp", model, None, search, RecordsState(), scheduler, max_steps=1)
    assert search.found is not None
    trials = [list(trial) for trial in search.found.trials]
    found = [model.micro_batch_size, trials, before == after]

    class Fails(UnequalMemory):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if os.environ["RANK"] == "1":
                raise ArithmeticError("on purpose")
            return super().training_step(batch, batch_idx)

    try:
        fit("ddp", Fails(), None, GlobalBatchFinder(global_batch_size=48), max_steps=1)
    except (ArithmeticError, RuntimeError) as error:
        found.append(str(error))
    return found


NAMES = [
    "token_means",
    "exact_order",
    "exact_loader",
    "exact_epochs",
    "tails",
    "resume_from_one_process",
    "uneven_shards",
    "noise_scales",
    "finder",
]
