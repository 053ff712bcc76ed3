"""A skipped update changes nothing, whatever the optimizer does without gradients.

``benchmarks/skipped_updates.py`` makes the same comparison for all optimizers of five libraries.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.contracts.catalog import catalog, of_class
from benchmarks.skipped_updates import ManualModel, Model, problem
from tests.gradients.step_problems import (
    ClosureSam,
    Counting,
    FailsWithoutGradients,
    OwnSchedule,
    SometimesTwice,
    Wrapper,
    ZeroFilling,
)
from tests.helpers import cpu_precision

KINDS = {
    "moments, momentum and weight decay": of_class(torch.optim.NAdam, weight_decay=0.1),
    "fused kernel": of_class(torch.optim.AdamW, fused=True),
    "several evaluations": of_class(torch.optim.LBFGS, lr=0.01, max_iter=3),
    "two evaluations": of_class(ClosureSam),
    "fills gradients with zeros": of_class(ZeroFilling),
    "counts in attributes": of_class(Counting),
    "fails without gradients": of_class(FailsWithoutGradients),
    "schedule in the groups": of_class(OwnSchedule),
    "wraps another optimizer": of_class(Wrapper),
}
WITH_CLOSURE = {"several evaluations", "two evaluations"}
SPIKES = {0: 3e4, 3: 1e4}


def scaled() -> dict[str, Any]:
    """Returns 16-mixed whose GradScaler does not change its scale."""
    options = cpu_precision("16-mixed")
    options["plugins"][0].scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    return options


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_skipped_updates_change_nothing(kind: str, precision: str) -> None:
    assert not problem(partial(Model, KINDS[kind]), options=lambda: {"precision": precision})


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITH_CLOSURE])
def test_skipped_updates_under_a_grad_scaler_change_nothing(kind: str) -> None:
    assert not problem(partial(Model, KINDS[kind]), bad=SPIKES, options=scaled)


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_updates_of_manual_optimization_change_nothing(kind: str) -> None:
    assert not problem(partial(ManualModel, KINDS[kind]))


def test_gradients_that_the_module_makes_after_the_decision_are_not_applied() -> None:
    class Noisy(Model):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            for parameter in self.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.ones_like(parameter)

    assert not problem(partial(Noisy, of_class(torch.optim.AdamW)))


def test_optimizer_that_evaluates_again_for_the_first_time_in_a_bad_batch_raises() -> None:
    with pytest.raises(RuntimeError, match=r"a step of SometimesTwice .* resume from the last"):
        problem(partial(_BadLater, of_class(SometimesTwice)), bad={1: math.nan})


class _BadLater(Model):
    """Has a bad loss only in the second evaluation of a bad batch."""

    seen: tuple[int, int] = (-1, 0)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        number = int(batch[0])
        self.seen = number, self.seen[1] + 1 if self.seen[0] == number else 0
        if self.seen[1] == 0:
            batch = torch.stack([batch[0], torch.ones_like(batch[1])])
        return super().training_step(batch)


# Lightning does not take schedulefree's wrapper, which is no subclass of torch's Optimizer. The
# others do not train this model on a CPU, or take seconds.
EXCLUDED = ("Wrapper", "capturable", "differentiable", "compiled")
EVERY = {
    entry.name: entry.build
    for entry in catalog()
    if entry.library in {"torch", "schedulefree"}
    and not any(word in entry.name for word in EXCLUDED)
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_of_torch_and_schedulefree(name: str) -> None:
    assert not problem(partial(Model, EVERY[name]))
