"""Parameters with gradients, and the updates of a rule, for the tests of this folder."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_bigopt.gradients import ClipContext, ClipDecision, ClippingRule, apply_

SHAPES = ((), (5,), (0,), (3, 4, 2, 2), (6, 7), (2, 0, 3))


def with_gradients(shapes=SHAPES, *, scale=1.0, dtype=torch.float32):
    """Named parameters of these shapes, each with a gradient."""
    named = []
    for index, shape in enumerate(shapes):
        parameter = nn.Parameter(torch.randn(shape, dtype=dtype))
        parameter.grad = torch.randn(shape, dtype=dtype) * scale
        named.append((f"p{index}", parameter))
    return named


def with_norms(*norms):
    """One parameter of three numbers for each norm, its gradient of this norm."""
    named = []
    for index, norm in enumerate(norms):
        parameter = nn.Parameter(torch.ones(3))
        direction = torch.tensor([2.0, -1.0, 2.0]) / 3
        parameter.grad = direction * norm
        named.append((f"p{index}", parameter))
    return named


def twin(named):
    """A deep copy, gradients included."""
    copies = copy.deepcopy(named)
    for (_, new), (_, old) in zip(copies, named, strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return copies


def run(rule: ClippingRule, named, state=None, **context) -> ClipDecision:
    """Decides and writes."""
    decision = rule.decide(
        ClipContext(parameters=named, **context), rule.initial_state() if state is None else state
    )
    apply_(decision, optimizer=context.get("optimizer"))
    return decision


def gradients(named):
    return [parameter.grad for _, parameter in named]
