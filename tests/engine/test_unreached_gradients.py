"""Optimizers whose gradients or steps the engine does not see: the callbacks say so."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt import GradientClipping, LearningRateScheduler, Linear, NormClip, StepGuard
from tests.helpers import QUIET, Probe, loader


class InBackward(L.LightningModule):
    """Steps each parameter as soon as its gradient is complete, and clears the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.steps = 0

    def configure_optimizers(self) -> Any:
        for parameter in self.parameters():
            own = torch.optim.SGD([parameter], lr=0.01)

            def step(_: Tensor, own: Any = own) -> None:
                self.steps += 1
                own.step()
                own.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


class SAM(torch.optim.SGD):
    """Two half steps that user code calls itself, as in the usual implementation."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.base_optimizer = torch.optim.SGD(self.param_groups, **options)

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()


class Manual(InBackward):
    """The first layer is trained by SAM, the second by SGD or by nothing."""

    def __init__(self, *, second: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))  # type: ignore[assignment]
        self.second = second

    def configure_optimizers(self) -> Any:
        sam = SAM(self.net[0].parameters(), lr=0.01)  # type: ignore[index]
        return [sam, torch.optim.AdamW(self.net[1].parameters())] if self.second else sam  # type: ignore[index]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        sam = optimizers[0] if self.second else optimizers
        for half_step in (sam.first_step, sam.second_step):
            self.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            half_step()
        if self.second:
            optimizers[1].step()


def fit(module: L.LightningModule, *callbacks: Any, size: int = 16, **options: Any) -> list[str]:
    """Returns the warnings about gradients that are not seen."""
    trainer = L.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": list(callbacks), **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(size, 4))
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "must get the gradients of" in text]


def both() -> list[Any]:
    return [GradientClipping(NormClip(max_norm=0.1)), StepGuard()]


def test_optimizers_in_the_backward_pass_are_reported_once() -> None:
    module = InBackward()
    (text,) = fit(module, *both())
    assert module.steps == 16  # 2 parameters in 2 epochs of 4 batches
    assert text.startswith("StepGuard, GradientClipping must get the gradients of SGD, got ")
    assert "gradients that are None before every step" in text


class Frozen(Manual):
    """Has a second optimizer whose parameters are frozen, all or some of them."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__(second=True)
        self.net[1].requires_grad_(False)
        self.net[1].bias.requires_grad_(bias)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net[0].parameters()),
            torch.optim.AdamW(self.net[1].parameters()),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(InBackward.training_step(self, batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def test_frozen_parameters_are_named_as_the_reason() -> None:
    (text,) = fit(Frozen(bias=False), *both())
    assert "gradients of AdamW, got frozen parameters only (requires_grad=False)" in text
    assert "backward" not in text
    assert not fit(Frozen(bias=True), *both())


def test_steps_that_lightning_does_not_make_are_reported() -> None:
    (text,) = fit(Manual(second=False), *both())
    assert "gradients of SAM, got no step through Lightning" in text
    assert "not first_step(), second_step()" in text


def test_one_of_two_optimizers_is_reported_alone() -> None:
    (text,) = fit(Manual(second=True), *both())
    assert "gradients of SAM, got no step through Lightning" in text


def test_a_long_epoch_is_not_waited_for() -> None:
    class Counts(InBackward):
        batches = 0

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.batches += 1

    module = Counts()
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=both())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*must get the gradients of")
        with pytest.raises(UserWarning, match="gradients that are None"):
            trainer.fit(module, loader(500, 4))
    assert module.batches == 100


class Late(Probe):
    """Has no loss in the first epoch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return super().training_step(batch, batch_idx) if self.current_epoch else None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Disabled: nothing is recorded."""


@pytest.mark.parametrize(
    ("module", "callbacks"),
    [
        (Probe(), both()),
        (Late(), both()),
        (InBackward(), [LearningRateScheduler(Linear(start=1.0, end=0.0))]),
    ],
    ids=["usual", "no loss at first", "no capability for gradients"],
)
def test_nothing_is_reported_without_a_reason(module: Any, callbacks: list[Any]) -> None:
    assert fit(module, *callbacks) == []
