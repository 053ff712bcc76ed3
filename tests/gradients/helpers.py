"""Parameters with gradients, and one application of a rule, for the tests of gradients."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_bigopt.gradients import (
    ClipContext,
    ClipDecision,
    ClippingRule,
    GradientNorms,
    apply_,
)
from lightning_bigopt.gradients.gradient_norms import DeviceNorms

SHAPES = ((), (5,), (0,), (3, 4, 2, 2), (6, 7), (2, 0, 3))


def with_gradients(shapes=SHAPES, *, scale=1.0, dtype=torch.float32):
    """Returns named parameters of these shapes, each with a gradient."""
    named = []
    for index, shape in enumerate(shapes):
        parameter = nn.Parameter(torch.randn(shape, dtype=dtype))
        parameter.grad = torch.randn(shape, dtype=dtype) * scale
        named.append((f"p{index}", parameter))
    return named


def with_norms(*norms):
    """Returns one parameter of three numbers for each norm, with a gradient of this norm."""
    named = []
    for index, norm in enumerate(norms):
        parameter = nn.Parameter(torch.ones(3))
        direction = torch.tensor([2.0, -1.0, 2.0]) / 3
        parameter.grad = direction * norm
        named.append((f"p{index}", parameter))
    return named


def deep_copy(named):
    """Returns a deep copy, gradients included."""
    copies = copy.deepcopy(named)
    for (_, new), (_, old) in zip(copies, named, strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return copies


def run(rule: ClippingRule, named, state=None, **context) -> ClipDecision:
    """Lets the rule decide, and applies the decision."""
    decision = rule.decide(
        ClipContext(parameters=named, **context), rule.initial_state() if state is None else state
    )
    apply_(decision, optimizer=context.get("optimizer"))
    return decision


def gradients(named):
    return [parameter.grad for _, parameter in named]


def as_device_norms(norms: GradientNorms, **fields) -> DeviceNorms:
    """Returns the same norms as tensors, with some fields replaced."""
    names = ("names", "per_tensor", "total", "finite", "norm_type", "parameters")
    return DeviceNorms(**{name: getattr(norms, name) for name in names} | fields)
