"""``plan``, the planned curves and the first log line agree with the run, update by update.

Every case is planned, then trained with every update logged. The reference is what the optimizer
used.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core import rank_zero

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    Cosine,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    OptimizationMonitor,
    WarmupCosine,
    plan,
)
from lightning_bigopt.reporting.planned_run import TrainingPlan
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import QUIET, Probe, ResumableLoader

POLICY = BatchSizeSteps({"0%": 2, "30%": 8, "70%": 4})
SCHEDULE = WarmupCosine(warmup="25%", end=0.1)
SAMPLES = 54


class OneGroup(Probe):
    """Records the learning rate of every group that an update uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used: list[tuple[float, ...]] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.used.append(tuple(float(group["lr"]) for group in optimizer.param_groups))


class ThreeGroups(OneGroup):
    """Three groups with their own learning rates, two of them named."""

    def configure_optimizers(self) -> Any:
        first, _, last = self.net
        return torch.optim.AdamW(
            [
                {"params": first.weight, "lr": 0.01, "name": "matrix"},
                {"params": first.bias, "lr": 0.03, "name": "bias"},
                {"params": last.parameters(), "lr": 0.02},
            ]
        )


class TwoOptimizers(OneGroup):
    """Manual optimization: two optimizers that step at every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, _, last = self.net
        return [
            torch.optim.SGD(first.parameters(), lr=0.01),
            torch.optim.AdamW(last.parameters(), lr=0.02),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        row: list[float] = []
        for optimizer in self.optimizers():
            row += [float(group["lr"]) for group in optimizer.param_groups]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch[0], batch[1]))
            optimizer.step()
        self.used.append(tuple(row))
        self.windows.append(batch[2].tolist())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Disabled: the training step records."""


def scheduler(**options: Any) -> LearningRateScheduler:
    return LearningRateScheduler(SCHEDULE, **options)


def batches(**options: Any) -> BatchSizeScheduler:
    return BatchSizeScheduler(POLICY, **options)


CASES: dict[str, tuple[type[OneGroup], Any]] = {
    "sqrt": (OneGroup, lambda: [scheduler(), batches(lr_scaling="sqrt")]),
    "sqrt without a schedule": (OneGroup, lambda: [batches(lr_scaling="sqrt")]),
    "linear with max_kappa": (
        OneGroup,
        lambda: [scheduler(), batches(lr_scaling="linear", max_kappa=2.5)],
    ),
    "rewarmup in steps": (
        OneGroup,
        lambda: [scheduler(), batches(lr_scaling="sqrt", rewarmup="4 steps")],
    ),
    "rewarmup in samples": (
        OneGroup,
        lambda: [batches(lr_scaling="linear", rewarmup="24 samples"), scheduler()],
    ),
    "rewarmup in percent": (
        OneGroup,
        lambda: [scheduler(), batches(lr_scaling="sqrt", rewarmup="15%")],
    ),
    "hyperparameter": (
        OneGroup,
        lambda: [
            HyperparameterScheduler("weight_decay", Linear(start=1.0, end=0.0)),
            batches(lr_scaling="sqrt", beta2_scaling="half-life", rewarmup="3 steps"),
            scheduler(),
        ],
    ),
    "groups": (
        ThreeGroups,
        lambda: [scheduler(groups={"bias": Cosine(end=0.5)}), batches(lr_scaling="sqrt")],
    ),
    "bounds": (
        ThreeGroups,
        lambda: [scheduler(min_lr=0.006, max_lr=0.025), batches(lr_scaling="linear")],
    ),
    "two optimizers": (
        TwoOptimizers,
        lambda: [scheduler(optimizers={"AdamW": Linear()})],
    ),
}
RUNS = [
    pytest.param(name, limit, id=f"{name}-{limit}")
    for name in CASES
    for limit in ("max_steps", "max_epochs")
    if (name, limit) != ("two optimizers", "max_steps")  # global_step counts both optimizers
]
LIMITS = {"max_steps": {"max_steps": 20}, "max_epochs": {"max_epochs": 2}}


class KeepsMessages(L.Callback):
    """Keeps what was logged as text before the first batch."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self._handler = logging.Handler()
        self._handler.emit = lambda record: self.messages.append(  # type: ignore[method-assign]
            record.getMessage()
        )
        self._logger = rank_zero.log  # that of the package of Lightning imported last

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self._handler)

    def on_train_batch_start(self, *args: Any) -> None:
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(self._level)


@dataclass(frozen=True)
class Outcome:
    """A plan, and the run that followed.

    Args:
        planned: The plan.
        used: Learning rates of every update, by group.
        window_sizes: Samples of every update.
        curves: The logged curves, in float32.
        messages: Lines logged before the first batch.
    """

    planned: TrainingPlan
    used: list[tuple[float, ...]]
    window_sizes: list[int]
    curves: dict[str, dict[int, float]]
    messages: list[str]


def train(
    name: str, limit: str, folder: Path, *more: Any, ckpt_path: Path | None = None, **options: Any
) -> tuple[OneGroup, dict[str, dict[int, float]]]:
    kind, callbacks = CASES[name]
    module, logger = kind(), TensorBoardLogger(folder)
    trainer = L.Trainer(
        **{**QUIET, "logger": logger, "log_every_n_steps": 1, **LIMITS[limit], **options},
        callbacks=[*callbacks(), OptimizationMonitor(), *more],
    )
    weights_only = None if ckpt_path is None else True
    trainer.fit(module, ResumableLoader(SAMPLES, 2), ckpt_path=ckpt_path, weights_only=weights_only)
    return module, {tag: dict(curve) for tag, curve in read_run(logger.log_dir).curves.items()}


@functools.cache
def outcome(name: str, limit: str) -> Outcome:
    """Plans and trains a case, once for all tests."""
    kind, callbacks = CASES[name]
    trainer = L.Trainer(**QUIET, **LIMITS[limit], callbacks=callbacks())
    planned = plan(trainer, kind(), ResumableLoader(SAMPLES, 2), points=10_000)
    keeps = KeepsMessages()
    with TemporaryDirectory() as folder:
        module, curves = train(name, limit, Path(folder), keeps)
    sizes = [len(window) for window in module.windows]
    return Outcome(planned, module.used, sizes, curves, keeps.messages)


@pytest.mark.parametrize(("name", "limit"), RUNS)
def test_plan_gives_the_learning_rates_of_every_update(name: str, limit: str) -> None:
    found = outcome(name, limit)
    assert len(set(found.used)) > 2  # the learning rate changes
    assert [row.update for row in found.planned.rows] == list(range(len(found.used)))
    assert [tuple(row.learning_rates.values()) for row in found.planned.rows] == found.used
    assert found.planned.totals["updates"] == len(found.used)


@pytest.mark.parametrize(("name", "limit"), RUNS)
def test_planned_curves_equal_the_logged_learning_rates(name: str, limit: str) -> None:
    found = outcome(name, limit)
    planned = {tag: curve for tag, curve in found.curves.items() if tag.startswith("plan/lr")}
    logged = {tag: curve for tag, curve in found.curves.items() if tag.startswith("optim/lr")}
    assert len(planned) == len(logged) == len(found.used[0])
    assert {tag.replace("plan/", "optim/"): curve for tag, curve in planned.items()} == logged
    for index, curve in enumerate(logged.values()):
        assert list(curve) == list(range(len(found.used)))
        assert list(curve.values()) == pytest.approx([row[index] for row in found.used], rel=1e-6)


@pytest.mark.parametrize(("name", "limit"), RUNS)
def test_plan_and_planned_curve_give_the_batch_of_every_update(name: str, limit: str) -> None:
    found = outcome(name, limit)
    assert [row.global_batch_size for row in found.planned.rows] == found.window_sizes
    assert list(found.curves["plan/global_size"].values()) == found.window_sizes
    assert list(found.curves["batch/global_size"].values()) == found.window_sizes


@pytest.mark.parametrize(("name", "limit"), [run for run in RUNS if "two" not in str(run.id)])
def test_first_log_line_names_the_batches_and_updates_of_the_run(name: str, limit: str) -> None:
    found = outcome(name, limit)
    (line,) = [text for text in found.messages if text.startswith("Global batch")]
    sizes = [int(size) for size in found.curves["batch/planned_size"].values()]
    assert (sizes[0], len(set(sizes))) == (2, 3)
    changes = [
        f"{size} from update {update}; "
        for update, size in enumerate(sizes)
        if update and size != sizes[update - 1]
    ]
    assert line.startswith(
        "Global batch 2 = micro-batch 2 × accumulation 1 × processes 1; "
        f"{''.join(changes)}{len(sizes)} updates."
    )


@pytest.fixture(scope="module")
def saved_runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function: case and limit → the run, and its folder of checkpoints."""

    @functools.cache
    def of(name: str, limit: str) -> tuple[OneGroup, Path]:
        folder = tmp_path_factory.mktemp("run")
        save = ModelCheckpoint(
            folder / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1
        )
        module, _ = train(name, limit, folder, save, enable_checkpointing=True)
        return module, folder / "saved"

    return of


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("stop", [6, 8, 15, 19])
@pytest.mark.parametrize("name", ["rewarmup in steps", "rewarmup in samples", "hyperparameter"])
def test_planned_curve_of_a_resumed_run_equals_its_learning_rates(
    name: str, stop: int, limit: str, saved_runs: Any, tmp_path: Path
) -> None:
    """Resumes before, at, inside and after a re-warm-up, into another folder."""
    straight, folder = saved_runs(name, limit)
    resumed, curves = train(name, limit, tmp_path, ckpt_path=folder / f"step={stop}.ckpt")
    assert resumed.used == straight.used[stop:]
    updates = list(range(stop, len(straight.used)))
    assert list(curves["plan/lr"]) == list(curves["optim/lr"]) == updates
    assert curves["plan/lr"] == curves["optim/lr"]
