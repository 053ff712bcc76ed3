"""Spike scores in fits: which updates they count, accumulation, precision, resume, optimizers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    NonFinite,
    NormClip,
    NormSpike,
    OptimizationMonitor,
    StepGuard,
)
from lightning_bigopt.monitoring.stability import Stability
from lightning_bigopt.optimizers.object_snapshot import copied
from tests.helpers import (
    ManualLayers,
    ManualUpdates,
    ResumableLoader,
    SaveAt,
    cpu_precision,
    fit,
    loader,
)
from tests.monitoring.helpers import curves
from tests.monitoring.test_spike_score import oracle


class Spiky(L.LightningModule):
    """Records the mean loss of each window, and its gradient's norm; some losses are spikes.

    Args:
        spikes: Factor on the loss, by the number of the batch in the run.
    """

    def __init__(self, spikes: dict[int, float] | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(4, 3)
        self.spikes, self.options = spikes or {}, {"lr": 1e-4, **options}
        self.batches = 0
        self.parts: list[tuple[float, int]] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1] / (1 + batch[2]).unsqueeze(1))
        loss = loss * self.spikes.get(self.batches, 1.0)
        self.batches += 1
        self.parts.append((loss.item(), len(batch[0])))
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        total = sum(count for _, count in self.parts)
        self.losses.append(sum(loss * count for loss, count in self.parts) / total)
        self.parts = []

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **self.options)


SPIKES = {70: 50.0, 90: math.nan, 120: 60.0, 210: 60.0}


def counts(monitor: OptimizationMonitor, quantity: str, label: str = "") -> dict[str, Any]:
    state: dict[str, Any] = monitor.saved_state()["stability"][quantity][label]
    return state


def check(state: dict[str, Any], values: list[float]) -> None:
    """Compares counts with the oracle for the values of the updates that were made."""
    assert (state["spikes"], state["compared"]) == oracle(values)
    finite = [value for value in values if math.isfinite(value)]
    assert state["history"] == pytest.approx(finite[-128:], rel=1e-5)


@pytest.mark.parametrize(
    ("precision", "accumulate"), [("32-true", 1), ("bf16-mixed", 2), ("16-mixed", 1)]
)
def test_scores_count_the_updates_that_were_made(
    precision: str, accumulate: int, tmp_path: Path
) -> None:
    spikes = {at * accumulate: factor for at, factor in SPIKES.items()}
    module, monitor = Spiky(spikes), OptimizationMonitor(every=20, layers=None)
    guard = StepGuard([NonFinite(), NormSpike(ratio=900.0, threshold=1e3, margin=math.inf)])
    trainer = fit(
        module,
        loader(230 * accumulate * 2, 2),
        guard,
        monitor,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=TensorBoardLogger(tmp_path),
        **cpu_precision(precision),
    )
    made = [loss for loss in module.losses if math.isfinite(loss)]
    if precision == "32-true" and accumulate == 1:
        assert guard.rejected == 1  # the NaN
    check(counts(monitor, "loss"), made)
    assert counts(monitor, "loss")["spikes"] >= 2
    assert counts(monitor, "norm")["spikes"] >= 2
    assert counts(monitor, "norm")["compared"] == len(made) - 63
    logged = curves(trainer)
    for quantity in ("loss", "norm"):
        points = dict(logged[f"stability/spike_score/{quantity}"])
        assert min(points) == 79  # the first logged update after 64 updates
        assert points[79] == pytest.approx(1 / 17)  # of the updates 63 to 79
    for at, share in dict(logged["stability/spike_score/loss"]).items():
        spikes, compared = oracle(module.losses[: at + 1])
        assert share == pytest.approx(spikes / compared)


def test_rejected_updates_are_not_counted() -> None:
    module, monitor = Spiky(SPIKES), OptimizationMonitor(every=50, layers=None)
    guard = StepGuard()
    fit(module, loader(460, 2), guard, monitor, max_epochs=1)
    assert guard.rejected == 4
    made = [loss for at, loss in enumerate(module.losses) if at not in (70, 90, 120, 210)]
    check(counts(monitor, "loss"), made)
    assert counts(monitor, "norm")["spikes"] == 0


def test_norms_come_from_what_measures_them_at_every_update() -> None:
    for callbacks, every, compared in (
        ([GradientClipping(NormClip(1e-2))], 50, 100 - 63),
        ([], 50, 0),  # the norms of logged updates only are no history
        ([], 1, 100 - 63),
    ):
        monitor = OptimizationMonitor(every=every, layers=None)
        fit(Spiky(), loader(200, 2), *callbacks, monitor, max_epochs=1)
        assert counts(monitor, "norm")["compared"] == compared
        assert counts(monitor, "loss")["compared"] == 100 - 63


def test_update_that_a_fused_kernel_skips_is_not_counted() -> None:
    class FiniteLoss(Spiky):
        """Only the gradient is not finite in the update 90."""

        def on_after_backward(self) -> None:
            if self.batches == 91:
                self.net.weight.grad.fill_(math.inf)  # type: ignore[union-attr]

    module = FiniteLoss({**SPIKES, 90: 70.0}, fused=True)
    monitor = OptimizationMonitor(every=50, layers=None)
    fit(module, loader(460, 2), GradientClipping(NormClip(1e-2)), monitor, max_epochs=1)
    made = [loss for at, loss in enumerate(module.losses) if at != 90]
    check(counts(monitor, "loss"), made)
    assert counts(monitor, "norm")["compared"] == 229 - 63


def test_losses_are_weighed_by_samples_in_a_ramp() -> None:
    module, monitor = Spiky(SPIKES), OptimizationMonitor(every=50, layers=None)
    policy = BatchSizeScheduler(BatchSizeSteps({"0%": 3, "50%": 9}))
    fit(module, loader(900, 3), policy, monitor, max_epochs=1)
    check(counts(monitor, "loss"), module.losses)


@pytest.mark.parametrize("saved", [70, 149])
def test_resumed_scores_equal_those_of_an_uninterrupted_run(saved: int, tmp_path: Path) -> None:
    states = []
    for path in (None, tmp_path / "k.ckpt"):
        monitor = OptimizationMonitor(every=20, layers=None)
        module = Spiky(SPIKES)
        module.batches = 0 if path is None else saved
        callbacks = [GradientClipping(NormClip(1e-2)), StepGuard([NonFinite()]), monitor]
        if path is None:
            callbacks.append(SaveAt(tmp_path / "k.ckpt", saved))
        fit(module, ResumableLoader(460, 2), *callbacks, max_epochs=1, ckpt_path=path)
        states.append(monitor.saved_state())
    assert states[0] == states[1]
    assert states[0]["stability"]["norm"][""]["spikes"] >= 2


def test_rejected_update_of_manual_optimization_leaves_no_loss() -> None:
    class Manual(ManualUpdates, Spiky):
        def __init__(self) -> None:
            super().__init__()
            Spiky.__init__(self, SPIKES)
            self.automatic_optimization = False

    module, monitor = Manual(), OptimizationMonitor(every=50, layers=None)
    guard = StepGuard([NonFinite()])
    fit(module, loader(460, 2), guard, monitor, max_epochs=1)
    assert guard.rejected == 1
    check(counts(monitor, "loss"), [x for x in module.losses if math.isfinite(x)])


@pytest.mark.parametrize("processes", [1, 2])
def test_snapshot_restores_scores_and_pending_values(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Restored twice, as after two rollbacks; values in between do not matter."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda sums: sums.mul_(2))
    values = np.random.default_rng(5).lognormal(size=200).tolist()
    stability, straight = Stability(), Stability()
    for each in (stability, straight):
        each.start(device=torch.device("cpu"), processes=processes)

    def add(to: Stability, value: float) -> None:
        to.add_loss(torch.tensor(value), samples=2)
        to.observe("", None)
        to.accept("", found_inf=None, is_logged=False)

    for value in values[:100]:
        add(stability, value)
    snapshot = copied(stability.snapshot())
    for other in (1e3, 1e-3):
        for _ in range(80):
            add(stability, other)
        stability.add_loss(torch.tensor(5.0), samples=1)  # of a window that was not finished
        stability.restore(copied(snapshot))
    for value in values[100:]:
        add(stability, value)
    for value in values:
        add(straight, value)
    for each in (stability, straight):
        each.reduce()
    assert stability.state_dict() == straight.state_dict()
    assert len(straight.state_dict()["loss"][""]["history"]) == 128


def test_optimizers_have_scores_of_their_own() -> None:
    made = [lambda p: torch.optim.SGD(p, lr=1e-4), lambda p: torch.optim.AdamW(p, lr=1e-4)]
    monitor = OptimizationMonitor(every=1, layers=None)
    fit(ManualLayers(*made), loader(200, 2), monitor, max_epochs=1)
    for label in ("SGD", "AdamW"):
        for quantity in ("loss", "norm"):
            assert counts(monitor, quantity, label)["compared"] == 100 - 63
    losses = [counts(monitor, "loss", label)["history"] for label in ("SGD", "AdamW")]
    assert losses[0] != losses[1]


def test_checkpoint_without_scores_is_accepted() -> None:
    monitor = OptimizationMonitor()
    monitor.load_saved_state({})
    assert monitor.saved_state()["stability"] == {"norm": {}, "loss": {}}


def test_window_without_a_loss_is_not_compared() -> None:
    stability = Stability()
    for _ in range(70):
        stability.observe("", None)
        stability.accept("", found_inf=None, is_logged=False)
    state = stability.state_dict()["loss"][""]
    assert (state["compared"], state["history"]) == (0, [])
    assert np.isnan(stability._series["loss"][""].value())
