"""StepGuard where windows are odd: no loss, one loss for two optimizers, validation in between."""

from __future__ import annotations

import itertools
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
from tests.kit import QUIET, ResumableLoader, cpu_precision
from tests.poison import KINDS, Poisoned, finite, fit


def watchful(armed: int = 3) -> StepGuard:
    return StepGuard([NonFinite(), NormSpike(armed=armed), LossSpike(armed=armed, floor=50.0)])


def accepted(guard: StepGuard, detector: str = "NormSpike") -> list[float]:
    return guard.controller.state_dict()["guarded"][""]["detectors"][detector]["accepted"]


class Plain(Poisoned):
    """Looks at nothing around its updates."""

    def on_before_optimizer_step(self, optimizer: Any) -> None: ...


# ------------------------------------------------------------------------------ without a loss


class Silent(Plain):
    """Has nothing to say about some batches; Lightning leaves these out."""

    silent: tuple[int, ...] = ()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx in self.silent else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*training_step.*None")
@pytest.mark.parametrize("rule", [NormClip(max_norm=0.5), ZClip(warmup=2), AutoClip()])
@pytest.mark.parametrize(
    "case",
    # Accumulation, batches without a loss, updates that come to nothing. The last number: those
    # under a GradScaler, where Lightning leaves out an update whose last micro-batch has no loss.
    [(1, (0,), (1, 1)), (1, (4, 5), (2, 2)), (3, (0, 4), (0, 0)), (3, (5,), (0, 1))],
)
@pytest.mark.parametrize("kind", ["foreach", "fused"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_batch_without_a_loss_is_no_update(
    precision: str, kind: str, case: Any, rule: Any
) -> None:
    accumulate, silent, lost = case
    module = Silent({}, optimizer=torch.optim.AdamW, **KINDS[kind])
    module.silent = silent
    guard, clipping = watchful(armed=32), GradientClipping(rule)
    options = {"accumulate_grad_batches": accumulate, **cpu_precision(precision)}
    fit(module, guard, clipping, size=12 * accumulate, **options)
    assert guard.rejections == ()
    happened = 6 - lost[precision == "16-mixed"]
    assert len(accepted(guard)) == len(accepted(guard, "LossSpike")) == happened
    (report,) = clipping.controller.reports().values()
    assert report.updates == happened
    assert 0.0 not in clipping.controller.state_dict()["rule"][""].get("seed", ())


@pytest.mark.filterwarnings("ignore:.*training_step.*None")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_clipping_alone_knows_which_batches_had_a_loss(precision: str, kind: str) -> None:
    module = Silent({}, optimizer=torch.optim.AdamW, **KINDS[kind])
    module.silent = (0, 3)
    clipping = GradientClipping(NormClip(max_norm=1e-3))
    fit(module, clipping, size=12, **cpu_precision(precision))
    (report,) = clipping.controller.reports().values()
    assert (report.updates, report.clipped) == (4, 4)


@pytest.mark.filterwarnings("ignore:.*training_step.*None")
def test_a_window_left_out_leaves_no_loss_to_the_next() -> None:
    class Losses(Silent):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 5 else self.even_loss(batch) * 1e-3 + float(batch_idx)

    guard = watchful()
    scaled = cpu_precision("16-mixed")
    fit(Losses({}, lr=0.0), guard, size=18, accumulate_grad_batches=3, **scaled)
    assert accepted(guard, "LossSpike") == pytest.approx([1.0, 7.0], abs=0.1)


def test_a_loss_that_is_nan_beside_a_finite_gradient_is_not_remembered() -> None:
    class Odd(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            loss = self.even_loss(batch) + (math.nan if batch_idx == 3 else 0.0)
            return {"loss": loss, "batch": batch}

    guard = watchful()
    fit(Odd({}), guard, size=12)
    assert guard.rejections == ()
    assert (len(accepted(guard)), len(accepted(guard, "LossSpike"))) == (6, 5)
    assert finite(guard.controller.state_dict())


# ------------------------------------------------------------------------- several optimizers


def test_two_optimizers_that_step_on_one_loss_see_the_same_window() -> None:
    class Shared(L.LightningModule):
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

    guard = watchful()
    fit(Shared(), guard, size=12)
    assert [(r.optimizer, r.batches) for r in guard.rejections] == [("SGD", (3,)), ("Adam", (3,))]
    assert all(math.isnan(r.loss) for r in guard.rejections)
    states = guard.controller.state_dict()["guarded"]
    assert [len(s["detectors"]["LossSpike"]["accepted"]) for s in states.values()] == [5, 5]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_manual_accumulation(precision: str, kind: str) -> None:
    class Manual(Poisoned):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    module = Manual({4: 40.0}, optimizer=torch.optim.AdamW, **KINDS[kind])
    guard = watchful()
    fit(module, guard, size=32, **cpu_precision(precision))
    assert [(r.update, r.batches) for r in guard.rejections] == [(4, (8, 9))]
    assert module.changed == [update != 4 for update in range(8)]


# ------------------------------------------------------------------------- around the updates


def test_validation_in_mid_window_and_frozen_parameters() -> None:
    class Validated(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.even_loss(batch)

    module = Validated({3: math.nan})
    module.net[0].requires_grad_(False)
    module.unused = nn.Linear(2, 2)
    guard, clipping = watchful(), GradientClipping(AGC(clip_factor=0.1))
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


def test_lightnings_own_clipping_beside_the_guard() -> None:
    module = Poisoned({3: math.nan}, optimizer=torch.optim.AdamW)
    fit(module, StepGuard(), size=12, gradient_clip_val=0.5)
    assert module.changed == [update != 3 for update in range(6)]


class Normalized(L.LightningModule):
    """Batch normalization takes in a batch before anybody can refuse it."""

    def __init__(self, bad: dict[int, float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bad = bad
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.statistics: list[list[Tensor]] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0] * self.bad.get(self.trainer.global_step, 1.0)
        return nn.functional.mse_loss(self.net(x), batch[1])

    def on_train_batch_end(self, *args: Any) -> None:
        self.statistics.append([b.clone() for b in self.net[1].buffers()])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_refused_batch_leaves_no_trace_in_running_statistics(
    precision: str, accumulate: int
) -> None:
    module = Normalized({4: math.nan})
    options = {"accumulate_grad_batches": accumulate, **cpu_precision(precision)}
    fit(module, StepGuard(), size=16 * accumulate, **options)
    ends = module.statistics[accumulate - 1 :: accumulate]
    changed = [
        not torch.equal(a, b)
        for before, after in itertools.pairwise(ends)
        for a, b in zip(before[:2], after[:2], strict=True)
    ]
    assert changed == [update != 4 for update in range(1, 8) for _ in range(2)]
    assert finite(module.state_dict())


def test_a_lazy_layer_has_no_statistics_before_its_first_batch() -> None:
    module = Normalized({4: math.nan})
    module.net = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(), nn.Linear(4, 3))
    fit(module, StepGuard(), size=16)
    assert module.net[1].num_batches_tracked == 7
    assert finite(module.state_dict())
