"""Rollback to a snapshot, decided by a capability."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_bigopt import (
    Constant,
    GradientClipping,
    GradientNoiseScale,
    LearningRateScheduler,
    Linear,
    NonFinite,
    OptimizationMonitor,
    StepGuard,
    ZClip,
)
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Batch, Fit
from lightning_bigopt.engine.update import Rejection, Restorable, Update
from tests.engine.fake_averaging import FakeAveraging
from tests.engine.snapshots import Rich, equal, parts
from tests.helpers import QUIET, ResumableLoader, cpu_precision


class FakeRollback(Capability):
    """Takes a snapshot at the end of one update, and restores it at some later updates.

    Args:
        keep: The update after which the snapshot is taken.
        at: The updates, counted from 0, that are rejected.
    """

    owns, rank = "fake rollback", 45  # decides after a StepGuard

    def __init__(self, *, keep: int, at: tuple[int, ...]) -> None:
        self.keep, self.at = keep, at
        self.snapshot_of_fit: Restorable | None = None
        self.kept: dict[str, Any] = {}
        self.rejected: list[str] = []

    def end_batch(self, batch: Batch) -> None:
        steps = batch.fit.trainer.global_step
        if batch.closes_window and steps == self.keep and self.snapshot_of_fit is None:
            self.snapshot_of_fit = batch.fit.take_snapshot()
            self.kept = parts(batch.fit)

    def decide(self, update: Update) -> Rejection | None:
        if update.progress.steps not in self.at:
            return None
        return Rejection(reason="bad", roll_back=self.snapshot_of_fit)

    def observe(self, update: Update) -> None:
        if update.rejection is not None:
            self.rejected.append(update.rejection.reason)

    def end(self, fit: Fit) -> None:
        self.snapshot_of_fit = None

    def snapshot(self) -> dict[str, Any]:
        return {}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Does nothing: the recorded rejections are kept."""


class Looks(L.Callback):
    """The parts of the fit after every batch, behind the engine."""

    def __init__(self, rollback: FakeRollback) -> None:
        self.rollback = rollback
        self.after: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        assert self.rollback.fit is not None
        self.after.append(parts(self.rollback.fit))


def run(
    rollback: FakeRollback,
    *callbacks: Any,
    schedule: Any = None,
    precision: str = "32-true",
    steps: int = 10,
    accumulate: int = 1,
    first: tuple[Any, ...] = (),
    module: Rich | None = None,
    resume: Path | None = None,
    **options: Any,
) -> tuple[Rich, list[dict[str, Any]]]:
    module, looks = Rich(**options) if module is None else module, Looks(rollback)
    L.seed_everything(3, verbose=False)
    own = [LearningRateScheduler(schedule or Constant()), rollback, *callbacks]
    trainer = L.Trainer(
        **QUIET,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[*first, *own, looks],
        **cpu_precision(precision),
    )
    data = ResumableLoader(16 * accumulate, 2)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    return module, looks.after


STAYS = ("clock", "counters", "loaders", "state of FakeRollback")

OPTIMIZERS = [
    {"foreach": False},
    {"foreach": True},
    {"fused": True},
    {"optimizer": torch.optim.SGD, "momentum": 0.9},
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_everything_but_the_clock_is_as_it_was(options: dict[str, Any], precision: str) -> None:
    class Writes(Rich):
        def on_train_batch_start(self, *arguments: Any) -> None:
            group = self.trainer.optimizers[0].param_groups[0]
            group["weight_decay"] = 0.01 * self.trainer.global_step

    rollback = FakeRollback(keep=3, at=(6,))
    own = (GradientClipping(ZClip(warmup=2)), StepGuard(), FakeAveraging(), OptimizationMonitor())
    _, after = run(rollback, *own, precision=precision, module=Writes(**options))
    assert rollback.rejected == ["bad"]
    before, now = after[5], after[6]
    for part, kept in rollback.kept.items():
        if part in STAYS or part in {"state of LearningRateScheduler", "gradient scaler"}:
            continue
        assert not equal(before[part], kept), part
        assert equal(now[part], kept), part
    assert equal(now["gradient scaler"], rollback.kept["gradient scaler"])
    assert now["clock"]["batches"] == 7
    assert now["counters"][:2] == [7, 0]
    assert len(after) == 10
    assert not equal(after[9]["weights"], now["weights"])


@pytest.mark.parametrize("fused", [False, True])
def test_the_scaler_goes_back_too(fused: bool) -> None:
    """An overflow after the snapshot halves the scale, and the rollback restores it."""

    class Overflows(Rich):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            bad = self.trainer.global_step == 4
            return super().training_step(batch, batch_idx) * (math.inf if bad else 1.0)

    rollback = FakeRollback(keep=3, at=(6,))
    _, after = run(rollback, precision="16-mixed", module=Overflows(fused=fused))
    scales = [each["gradient scaler"]["scale"] for each in after]
    assert scales == [2.0**8] * 4 + [2.0**7] * 2 + [2.0**8] * 4


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_goes_on_with_the_next_data_and_the_schedule_with_the_clock(
    accumulate: int,
) -> None:
    rollback = FakeRollback(keep=3, at=(6, 8))
    module, after = run(rollback, schedule=Linear(start=1.0, end=0.0), accumulate=accumulate)
    assert module.lrs == pytest.approx([0.05 * (1 - t / 10) for t in range(10)])
    straight, _ = run(
        FakeRollback(keep=3, at=()), schedule=Linear(start=1.0, end=0.0), accumulate=accumulate
    )
    assert module.windows == straight.windows
    assert rollback.rejected == ["bad", "bad"]
    ends = after[accumulate - 1 :: accumulate]
    assert equal(ends[6]["weights"], rollback.kept["weights"])
    assert equal(ends[8]["weights"], rollback.kept["weights"])
    assert not equal(ends[7]["weights"], rollback.kept["weights"])
    # The learning rate is the one of the clock, not that of the snapshot.
    assert ends[6]["groups"][0]["lr"] == pytest.approx(0.05 * (1 - 7 / 10))


def test_a_rejection_before_any_snapshot_only_skips() -> None:
    rollback = FakeRollback(keep=3, at=(1, 6))
    _, after = run(rollback)
    assert equal(after[1]["weights"], after[0]["weights"])
    assert rollback.rejected == ["bad", "bad"]


def test_the_capability_that_rejects_first_decides() -> None:
    """After a guard has skipped an update there is no rollback."""

    class Bad(Rich):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            bad = self.trainer.global_step == 6
            return super().training_step(batch, batch_idx) * (math.nan if bad else 1.0)

    guard, rollback = StepGuard([NonFinite()]), FakeRollback(keep=3, at=(6,))
    _, after = run(rollback, guard, module=Bad())
    assert guard.rejected == 1
    assert len(rollback.rejected) == 1
    assert rollback.rejected != ["bad"]
    assert equal(after[6]["weights"], after[5]["weights"])


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_of_the_rejected_update_holds_what_was_rolled_back_to(
    tmp_path: Path, first: bool
) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "seven.ckpt")

    class NotRandom(Rich):
        """A checkpoint holds no random state."""

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y, index = batch
            self.windows.append(index.tolist())
            return self.loss(self.norm(x), y / (index + 1).unsqueeze(1))

    def own() -> tuple[Any, ...]:
        return GradientClipping(ZClip(warmup=2)), GradientNoiseScale(), StepGuard()

    rollback, straight = FakeRollback(keep=3, at=(6,)), NotRandom()
    if first:
        _, after = run(rollback, *own(), first=(Saves(),), module=straight)
    else:
        _, after = run(rollback, *own(), Saves(), module=straight)
    saved = torch.load(tmp_path / "seven.ckpt", weights_only=True)
    assert saved["global_step"] == 7
    for name, weight in rollback.kept["weights"].items():
        assert torch.equal(saved["state_dict"][name], weight)
    resumed = NotRandom()
    _, again = run(
        FakeRollback(keep=3, at=()), *own(), module=resumed, resume=tmp_path / "seven.ckpt"
    )
    assert resumed.windows == straight.windows[7:]
    for one, other in zip(after[7:], again, strict=True):
        for part in one:
            if part != "buffers" and "random" not in part:
                assert equal(one[part], other[part]), part


def test_two_optimizers_go_back_together() -> None:
    """Under manual optimization one optimizer is rejected, and both go back."""

    class Two(Rich):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            first, second = self.net[0].parameters(), self.net[2].parameters()
            return torch.optim.AdamW(first, lr=0.05), torch.optim.SGD(second, lr=0.05)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()

    rollback = FakeRollback(keep=6, at=(12,))
    _, after = run(rollback, module=Two(), steps=20)
    assert rollback.rejected  # the first optimizer's, or both
    assert equal(after[6]["weights"], rollback.kept["weights"])
    assert equal(after[6]["optimizer states"], rollback.kept["optimizer states"])
    assert not equal(after[5]["weights"], rollback.kept["weights"])
    assert not equal(after[7]["weights"], rollback.kept["weights"])
