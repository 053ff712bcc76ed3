"""AGC, compared with the formula of the paper."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_bigopt.gradients import AGC, ClipContext
from tests.gradients.helpers import deep_copy, gradients, run, with_gradients
from tests.oracles import gradients as oracle

MANY = (
    (),
    (5,),
    (0,),
    (3, 4, 2, 2),
    (2, 0, 3),
    (0, 4),
    *[(6, 7)] * 5,
    *[(9,)] * 5,
    (200, 100),
    (40, 30, 3, 3),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("clip_factor", "eps"), [(0.01, 1e-3), (0.5, 1e-3), (0.9, 10.0), (1e-4, 1e-3)]
)
def test_agc_equals_the_formula(dtype, clip_factor, eps):
    named = with_gradients(MANY, dtype=dtype)
    for _, parameter in named:  # units at zero and units whose gradient is small
        if parameter.ndim > 1 and parameter.numel():
            parameter.data[0] = 0
            parameter.grad[-1] *= 1e-4
    expected = [oracle.agc(p.detach(), p.grad, clip_factor, eps) for _, p in named]
    run(AGC(clip_factor, eps=eps), named)
    for found, truth in zip(gradients(named), expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=2e-6 if dtype.itemsize > 2 else 2e-2, atol=0)


def test_agc_equals_the_usual_loop():
    named = with_gradients(((5,), (3, 4, 2, 2), (6, 7), (300, 50)))
    other = deep_copy(named)
    run(AGC(0.05), named)
    oracle.agc_loop_([p for _, p in other], 0.05)
    for mine, theirs in zip(gradients(named), gradients(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-12)


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=10),
    st.integers(0, 2**20),
)
def test_agc_of_random_shapes(shapes, seed):
    torch.manual_seed(seed)
    named = with_gradients(shapes)
    expected = [oracle.agc(p.detach(), p.grad, 0.3, 1e-3) for _, p in named]
    run(AGC(0.3), named)
    for found, truth in zip(gradients(named), expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=2e-6, atol=0)


def test_non_finite_unit_is_unchanged_and_the_others_are_clipped():
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.ones(3, 4)
    weight.grad[1, 2] = math.nan
    weight.grad[2, 0] = math.inf
    run(AGC(0.25), [("weight", weight)])
    torch.testing.assert_close(weight.grad[0], torch.full((4,), 0.25))
    assert weight.grad[1].isnan().sum() == 1
    assert weight.grad[1, 0] == 1.0
    assert weight.grad[2].isinf().sum() == 1


def test_excluded_parameters_are_unchanged():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    run(AGC(exclude=["head.*", "*.bias"]), list(model.named_parameters()))
    changed = [name for name, p in model.named_parameters() if not (p.grad == 7.0).all()]
    assert changed == ["body.weight"]


def test_pattern_that_matches_nothing_raises():
    with pytest.raises(ValueError, match=r"every pattern must match a parameter, got 'haed\.\*'"):
        run(AGC(exclude="haed.*"), with_gradients())
    # A parameter of another optimizer of the module counts as a match.
    run(AGC(exclude="head.*"), with_gradients(), all_names=["p0", "head.weight"])


def test_flat_shards_raise():
    context = ClipContext(parameters=with_gradients(), process_group=object())
    with pytest.raises(ValueError, match="flat shards"):
        AGC().decide(context, {})


def test_gradients_below_the_limit_keep_their_bits():
    named = with_gradients(MANY, scale=1e-9)
    before = [g.clone() for g in gradients(named)]
    run(AGC(), named)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(named), strict=True))


@pytest.mark.parametrize("name", ["clip_factor", "eps"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_invalid_arguments_raise(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {value}"):
        AGC(**{name: value})


def test_pattern_and_list_of_one_pattern_are_equal():
    assert AGC(exclude="a") == AGC(exclude=["a"]) == AGC(exclude=("a",))
    assert hash(AGC(exclude=["a"])) == hash(AGC(exclude="a"))


@pytest.mark.parametrize("scale", [1e19, 1e30, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_units_whose_squares_overflow_are_clipped(scale, dtype):
    named = with_gradients(((3, 4, 2, 2), (6, 7), (300, 50), (5,)), dtype=dtype)
    for _, parameter in named:
        parameter.grad.clamp_(-1, 1).mul_(scale)
    named[1][1].grad[2, 3] = math.nan  # a NaN in another unit has no effect
    expected = [oracle.agc(p.detach(), p.grad, 0.01, 1e-3) for _, p in named]
    run(AGC(0.01), named)
    for index, (found, truth) in enumerate(zip(gradients(named), expected, strict=True)):
        good = [0, 1, 3, 4, 5] if index == 1 else slice(None)
        assert found[good].norm() < 1e3
        tolerance = 2e-6 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(found[good], truth[good], rtol=tolerance, atol=0)
