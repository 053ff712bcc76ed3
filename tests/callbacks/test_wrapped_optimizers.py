"""Optimizers that contain another one and do not call ``Optimizer.__init__``, as Lookahead does."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bigopt import (
    GradientClipping,
    LearningRateScheduler,
    Linear,
    MaxUpdateRatio,
    NonFinite,
    StepGuard,
    UpdateClip,
)
from tests.bad_batches import BadBatchModule, fit
from tests.helpers import Probe


class Lookahead(torch.optim.Optimizer):
    """Every second step interpolates towards slow weights, as in pytorch_optimizer."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        self.optimizer = torch.optim.AdamW(parameters, **options)
        self.param_groups, self.defaults = self.optimizer.param_groups, self.optimizer.defaults
        self.state: defaultdict[Any, Any] = defaultdict(dict)
        self._optimizer_step_pre_hooks: Any = {}
        self._optimizer_step_post_hooks: Any = {}
        self.steps = 0
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        self.steps += 1
        for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
            if self.steps % 2 == 0:
                p.copy_(slow.lerp_(p, 0.5))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()


class Moves(BadBatchModule):
    """Keeps the weights before and after every update."""

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]

    def on_train_start(self) -> None:
        self.seen = [self.weights()]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.lrs.append(float(optimizer.param_groups[0]["lr"]))

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(self.weights())


def build(bad: dict[int, float] | None = None) -> Moves:
    return Moves(bad or {}, lr=0.5, optimizer=Lookahead)  # type: ignore[arg-type]


def test_every_update_is_limited_from_the_first_on() -> None:
    module = build()
    fit(module, GradientClipping(MaxUpdateRatio(0.01)), size=8)
    for before, after in zip(module.seen[:-1], module.seen[1:], strict=True):
        for old, new in zip(before, after, strict=True):
            assert (new - old).norm() <= 0.01 * old.norm() * (1 + 1e-5)


def test_first_update_with_a_nan_is_skipped() -> None:
    module = build({0: math.nan})
    fit(module, StepGuard([NonFinite()]), size=8)
    for old, new in zip(*module.seen[:2], strict=True):
        assert torch.equal(old, new)
    assert module.trainer.optimizers[0].steps == 3
    assert all(new.isfinite().all() for new in module.seen[-1])


def test_learning_rate_is_scheduled() -> None:
    module = build()
    fit(module, LearningRateScheduler(Linear(start=1.0, end=0.0)), size=8)
    assert module.lrs == pytest.approx([0.5, 0.375, 0.25, 0.125])


def test_update_clip_names_the_optimizer_that_keeps_its_moments_elsewhere() -> None:
    message = "got Lookahead, which has changed a parameter without a state; use MaxUpdateRatio"
    with pytest.raises(ValueError, match=message):
        fit(Probe(lr=0.5, optimizer=Lookahead), GradientClipping(UpdateClip()), size=8)  # type: ignore[arg-type]
