"""StepGuard with batches without a loss, one loss for two optimizers, and validation in windows."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt import (
    AGC,
    AutoClip,
    GradientClipping,
    LossSpike,
    NonFinite,
    NormClip,
    NormSpike,
    StepGuard,
    ZClip,
)
from tests.bad_batches import KINDS, BadBatchModule, finite, fit
from tests.helpers import QUIET, ResumableLoader, cpu_precision


def guard_with_all_detectors(armed: int = 3) -> StepGuard:
    return StepGuard([NonFinite(), NormSpike(armed=armed), LossSpike(armed=armed, floor=50.0)])


def accepted_values(guard: StepGuard, detector: str = "NormSpike") -> list[float]:
    return guard.saved_state()["guarded"][""]["detectors"][detector]["accepted"]


class Plain(BadBatchModule):
    """Compares nothing around its updates."""

    def on_before_optimizer_step(self, optimizer: Any) -> None: ...


# ------------------------------------------------------------------------------ without a loss


class NoLossForSomeBatches(Plain):
    """Returns no loss for some batches; Lightning skips them."""

    without_loss: tuple[int, ...] = ()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx in self.without_loss else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*training_step.*None")
@pytest.mark.parametrize("rule", [NormClip(max_norm=0.5), ZClip(warmup=2), AutoClip()])
@pytest.mark.parametrize(
    "case",
    # Accumulation, batches without a loss, updates that are not made: in 32 bit, and under a
    # GradScaler, where Lightning skips an update whose last micro-batch has no loss.
    [(1, (0,), (1, 1)), (1, (4, 5), (2, 2)), (3, (0, 4), (0, 0)), (3, (5,), (0, 1))],
)
@pytest.mark.parametrize("kind", ["foreach", "fused"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_batch_without_a_loss_is_not_counted_as_an_update(
    precision: str, kind: str, case: Any, rule: Any
) -> None:
    accumulate, without_loss, lost = case
    module = NoLossForSomeBatches({}, optimizer=torch.optim.AdamW, **KINDS[kind])
    module.without_loss = without_loss
    guard, clipping = guard_with_all_detectors(armed=32), GradientClipping(rule)
    options = {"accumulate_grad_batches": accumulate, **cpu_precision(precision)}
    fit(module, guard, clipping, size=12 * accumulate, **options)
    assert guard.rejections == ()
    happened = 6 - lost[precision == "16-mixed"]
    assert len(accepted_values(guard)) == len(accepted_values(guard, "LossSpike")) == happened
    (report,) = clipping.reports().values()
    assert report.updates == happened
    assert 0.0 not in clipping.saved_state()["rule"][""].get("seed", ())


@pytest.mark.filterwarnings("ignore:.*training_step.*None")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_clipping_without_guard_counts_only_batches_with_a_loss(precision: str, kind: str) -> None:
    module = NoLossForSomeBatches({}, optimizer=torch.optim.AdamW, **KINDS[kind])
    module.without_loss = (0, 3)
    clipping = GradientClipping(NormClip(max_norm=1e-3))
    fit(module, clipping, size=12, **cpu_precision(precision))
    (report,) = clipping.reports().values()
    assert (report.updates, report.clipped) == (4, 4)


@pytest.mark.filterwarnings("ignore:.*training_step.*None")
def test_loss_of_a_skipped_window_is_not_added_to_the_next_window() -> None:
    class LossIsBatchIndex(NoLossForSomeBatches):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 5 else self.even_loss(batch) * 1e-3 + float(batch_idx)

    guard = guard_with_all_detectors()
    scaled = cpu_precision("16-mixed")
    fit(LossIsBatchIndex({}, lr=0.0), guard, size=18, accumulate_grad_batches=3, **scaled)
    assert accepted_values(guard, "LossSpike") == pytest.approx([1.0, 7.0], abs=0.1)


def test_nan_loss_with_a_finite_gradient_is_not_stored() -> None:
    class NaNLoss(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            loss = self.even_loss(batch) + (math.nan if batch_idx == 3 else 0.0)
            return {"loss": loss, "batch": batch}

    guard = guard_with_all_detectors()
    fit(NaNLoss({}), guard, size=12)
    assert guard.rejections == ()
    assert (len(accepted_values(guard)), len(accepted_values(guard, "LossSpike"))) == (6, 5)
    assert finite(guard.saved_state())


# ------------------------------------------------------------------------- several optimizers


def test_two_optimizers_that_share_a_loss_get_the_same_window() -> None:
    class TwoOptimizersOneLoss(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.first.parameters(), lr=0.01),
                torch.optim.Adam(self.second.parameters(), lr=0.01),
            ]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = nn.functional.mse_loss(self.first(batch[0]) + self.second(batch[0]), batch[1])
            self.manual_backward(loss * math.nan if batch_idx == 3 else loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    guard = guard_with_all_detectors()
    fit(TwoOptimizersOneLoss(), guard, size=12)
    assert [(r.optimizer, r.batches) for r in guard.rejections] == [("SGD", (3,)), ("Adam", (3,))]
    assert all(math.isnan(r.loss) for r in guard.rejections)
    states = guard.saved_state()["guarded"]
    assert [len(s["detectors"]["LossSpike"]["accepted"]) for s in states.values()] == [5, 5]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_accumulation_under_manual_optimization(precision: str, kind: str) -> None:
    class Manual(BadBatchModule):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    module = Manual({4: 40.0}, optimizer=torch.optim.AdamW, **KINDS[kind])
    guard = guard_with_all_detectors()
    fit(module, guard, size=32, **cpu_precision(precision))
    assert [(r.update, r.batches) for r in guard.rejections] == [(4, (8, 9))]
    assert module.changed == [update != 4 for update in range(8)]


# ------------------------------------------------------------------------- around the updates


def test_validation_inside_a_window_and_frozen_parameters() -> None:
    class Validated(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.even_loss(batch)

    module = Validated({3: math.nan})
    module.net[0].requires_grad_(False)
    module.unused = nn.Linear(2, 2)
    guard, clipping = guard_with_all_detectors(), GradientClipping(AGC(clip_factor=0.1))
    trainer = L.Trainer(
        **QUIET,
        max_epochs=1,
        val_check_interval=2,
        accumulate_grad_batches=3,
        callbacks=[guard, clipping],
    )
    trainer.fit(module, ResumableLoader(40, 2), ResumableLoader(8, 2))
    assert [(r.update, r.batches) for r in guard.rejections] == [(3, (9, 10, 11))]
    assert [name for name, _ in guard.rejections[0].parameters] == ["net.2.weight", "net.2.bias"]


def test_guard_works_with_gradient_clip_val() -> None:
    module = BadBatchModule({3: math.nan}, optimizer=torch.optim.AdamW)
    fit(module, StepGuard(), size=12, gradient_clip_val=0.5)
    assert module.changed == [update != 3 for update in range(6)]
