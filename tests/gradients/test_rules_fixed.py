"""Rules with a fixed limit: NormClip, PerParameterNormClip, ValueClip, compared with torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_bigopt.gradients import (
    AGC,
    AdaGC,
    AutoClip,
    ClipContext,
    Groups,
    NormClip,
    PerParameterNormClip,
    ValueClip,
    ZClip,
    clip_gradients_,
    measure,
)
from lightning_bigopt.schedules import Linear
from tests.gradients.helpers import deep_copy, gradients, run, with_gradients, with_norms

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e4])
def test_norm_clip_equals_torch(dtype, norm_type, max_norm):
    ours = with_gradients(((), (5,), (3, 4, 2, 2), (6, 7)), dtype=dtype)
    theirs = deep_copy(ours)
    run(NormClip(max_norm, norm_type=norm_type), ours)
    # torch computes the norm of bf16 gradients in bf16, so the norm is given.
    total = torch.nn.utils.get_total_norm([g.double() for g in gradients(theirs)], norm_type)
    torch.nn.utils.clip_grads_with_norm_([p for _, p in theirs], max_norm, total.float())
    for mine, other in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6 if dtype.itemsize > 2 else 1e-2, atol=0)


def test_norm_clip_below_the_limit_changes_no_bit():
    named = with_gradients()
    before = [g.clone() for g in gradients(named)]
    decision = run(NormClip(1e6), named)
    assert decision.coefficient == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(named), strict=True))


def test_changing_a_decision_in_place_does_not_change_the_rule():
    rule = NormClip(1e9)
    for _ in range(2):
        named = with_gradients()
        context = ClipContext(parameters=named, norms=measure(named), fraction=0.0)
        decision = rule.decide(context, rule.initial_state())
        assert decision.coefficient.item() == 1.0
        assert decision.norms.finite.item()
        decision.coefficient.mul_(0.5)
        decision.norms.finite.logical_not_()


def test_norm_clip_follows_its_schedule():
    named = with_norms(8.0)
    rule = NormClip(2.0, schedule=Linear(start=1.0, end=0.5))
    for fraction, limit in ((0.0, 2.0), (0.5, 1.5), (1.0, 1.0)):
        decision = rule.decide(ClipContext(parameters=named, fraction=fraction), {})
        assert decision.threshold == pytest.approx(limit)
        assert decision.coefficient.item() == pytest.approx(limit / 8.0, rel=1e-5)


def test_schedule_that_reaches_zero_raises():
    rule = NormClip(2.0, schedule=Linear(start=1.0, end=0.0))
    with pytest.raises(ValueError, match=r"got 0\.0; keep the schedule above 0, also at 100%"):
        rule.decide(ClipContext(parameters=with_norms(1.0), fraction=1.0), {})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norm_clip_changes_nothing_if_one_gradient_is_not_finite(bad):
    named = with_norms(3.0, 4.0)
    named[0][1].grad[1] = bad
    good = named[1][1].grad.clone()
    decision = run(NormClip(1.0), named)
    assert decision.coefficient == 1.0
    assert not decision.norms.finite
    assert torch.equal(named[1][1].grad, good)


def test_gradients_whose_norm_overflows_are_clipped_to_zero():
    named = with_norms(3e38, 3e38, 3e38)
    run(NormClip(1.0), named)
    assert all(g.abs().max() < 1e-5 for g in gradients(named))


def test_given_norms_are_used():
    named = with_norms(8.0)
    norms = measure(named)
    named[0][1].grad.zero_()  # measuring again would give zero
    context = ClipContext(parameters=named, norms=norms)
    assert NormClip(2.0).decide(context, {}).coefficient.item() == pytest.approx(0.25, rel=1e-5)
    assert NormClip(2.0, norm_type=1.0).decide(context, {}).coefficient == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_per_parameter_clip_equals_torch_for_each_parameter(dtype, norm_type):
    ours = with_gradients(((), (5,), (3, 4, 2, 2), (6, 7)), dtype=dtype)
    theirs = deep_copy(ours)
    run(PerParameterNormClip(0.7, norm_type=norm_type), ours)
    for (_, mine), (_, other) in zip(ours, theirs, strict=True):
        total = torch.linalg.vector_norm(other.grad.double(), norm_type).float()
        torch.nn.utils.clip_grads_with_norm_([other], 0.7, total)
        torch.testing.assert_close(
            mine.grad, other.grad, rtol=1e-6 if dtype.itemsize > 2 else 1e-2, atol=0
        )


def test_per_parameter_clip_skips_a_non_finite_gradient():
    named = with_norms(math.nan, 4.0, 0.5)
    run(PerParameterNormClip(1.0), named)
    assert gradients(named)[0].isnan().all()
    assert gradients(named)[1].norm() == pytest.approx(1.0, rel=1e-5)
    assert gradients(named)[2].norm() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_clip_equals_torch_to_the_bit(dtype):
    ours = with_gradients(dtype=dtype)
    ours[1][1].grad[:2] = torch.tensor([math.inf, -math.inf])
    ours[3][1].grad[0] = math.nan
    theirs = deep_copy(ours)
    run(ValueClip(0.3), ours)
    torch.nn.utils.clip_grad_value_([p for _, p in theirs], 0.3)
    for mine, other in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_tied_weights_and_missing_gradients():
    tied, without = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    tied.grad = torch.tensor([2.0, -1.0, 2.0])
    named = [("a", tied), ("without", without), ("b", tied)]
    run(NormClip(1.5), named)
    torch.testing.assert_close(tied.grad, torch.tensor([1.0, -0.5, 1.0]))
    assert without.grad is None
    run(ValueClip(0.75), named)
    torch.testing.assert_close(tied.grad, torch.tensor([0.75, -0.5, 0.75]))


@pytest.mark.parametrize("rule", [NormClip(), PerParameterNormClip(), ValueClip()])
def test_parameters_without_gradients_are_accepted(rule):
    run(rule, [("p", nn.Parameter(torch.ones(2)))])


@pytest.mark.parametrize("rule", [NormClip, PerParameterNormClip, ValueClip])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, True])
def test_limits_must_be_positive(rule, value):
    name = "max_abs" if rule is ValueClip else "max_norm"
    with pytest.raises(ValueError, match=rf"^{name} must be positive and finite, got {value!r}"):
        rule(value)


def test_norm_type_must_be_one_of_three():
    with pytest.raises(ValueError, match="norm_type must be 1, 2 or inf, got 3"):
        NormClip(norm_type=3)


def test_only_the_first_argument_is_positional():
    with pytest.raises(TypeError):
        NormClip(1.0, 2.0)


def test_clip_gradients_takes_modules_parameters_and_names():
    for form in (lambda m: m, lambda m: m.parameters(), lambda m: m.named_parameters()):
        model = nn.Linear(3, 2)
        model(torch.full((1, 3), 9.0)).sum().backward()
        decision = clip_gradients_(form(model), NormClip(1.0))
        total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert total == pytest.approx(1.0, rel=1e-5)
        assert decision.norms.value > 1.0


@pytest.mark.parametrize("rule", [AGC(), Groups({"*": AGC()})])
def test_sparse_gradient_raises_with_its_name(rule):
    layer = nn.Embedding(4, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of weight must be dense.*sparse=False"):
        clip_gradients_(layer, rule)


@pytest.mark.parametrize(
    "rule",
    [
        ValueClip(0.5),
        NormClip(0.5),
        PerParameterNormClip(0.5),
        Groups({"weight": NormClip(0.3)}),
        ZClip(warmup=1, z_threshold=0.1),
        AutoClip(percentile=10),
        AdaGC(warmup=1, max_norm=0.5),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_sparse_gradient_is_clipped_as_a_dense_one(rule):
    weights = []
    for sparse in (True, False):
        torch.manual_seed(0)
        layer = nn.Embedding(6, 3, sparse=sparse)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        state = rule.initial_state()
        for step in range(4):
            optimizer.zero_grad()
            (layer(torch.tensor([1, 4, 1, step])) ** 2).sum().mul(step + 1).backward()
            clip_gradients_(layer, rule, state=state, optimizer=optimizer)
            assert layer.weight.grad.is_sparse == sparse
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights)


def test_value_clip_of_a_complex_gradient_raises():
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    weight.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="gradient of w must be real for ValueClip"):
        clip_gradients_([("w", weight)], ValueClip())


def test_clip_gradients_raises_for_other_arguments():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"rule must be a ClippingRule, got 'norm'; try NormClip"):
        clip_gradients_([weight], "norm")
    with pytest.raises(
        ValueError, match=r"got a dict; pass the module, or the items\(\) of a dict"
    ):
        clip_gradients_({"w": weight}, NormClip())
    clip_gradients_({"w": weight}.items(), NormClip(1.0))
    clip_gradients_(weight, NormClip(0.5))
    assert weight.grad.norm() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("rule", [NormClip(1.0), PerParameterNormClip(0.5), ValueClip(0.1), AGC()])
def test_gradients_of_another_dtype_than_the_weights(rule):
    """Multi-tensor kernels take one dtype; here two tensors of one shape have two."""
    ours = with_gradients(((6, 7), (6, 7), (5,)))
    for _, parameter in ours[:1]:
        parameter.grad = None
        parameter.grad_dtype = torch.bfloat16
        parameter.grad = torch.randn(6, 7).bfloat16()
    theirs = [(name, nn.Parameter(p.detach().double())) for name, p in ours]
    for (_, p), (_, q) in zip(ours, theirs, strict=True):
        q.grad = p.grad.double()
    run(rule, ours)
    run(rule, theirs)
    assert gradients(ours)[0].dtype == torch.bfloat16
    for mine, other in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, other.to(mine.dtype), rtol=1e-2, atol=0)


def test_rule_with_the_property_of_version_0_1_raises_with_the_new_name():
    with pytest.raises(ValueError, match=r"got the property measures of version 0\.1; rename it"):
        type("Old", (NormClip,), {"measures": 1.0})
