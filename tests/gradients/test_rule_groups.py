"""Groups: a clipping rule for each pattern of parameter names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_bigopt.durations import Horizon
from lightning_bigopt.gradients import (
    AGC,
    AutoClip,
    Groups,
    MaxUpdateRatio,
    NormClip,
    UpdateClip,
    ValueClip,
    ZClip,
    clip_gradients_,
)
from lightning_bigopt.schedules import WarmupLinear
from tests.gradients.helpers import deep_copy, gradients, run, with_norms


def model():
    network = nn.ModuleDict(
        {"attn": nn.Linear(4, 4), "mlp": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    )
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter) * 5
    return network


def test_each_group_has_its_own_rule_and_norm():
    network = model()
    theirs = dict(deep_copy(list(network.named_parameters())))
    rules = {"attn.*": NormClip(1.0), "head.*": None, "*.bias": ValueClip(0.1)}
    decision = run(Groups(rules), list(network.named_parameters()))
    torch.nn.utils.clip_grad_norm_([theirs["attn.weight"], theirs["attn.bias"]], 1.0)
    torch.nn.utils.clip_grad_value_([theirs["mlp.bias"]], 0.1)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-6, atol=0)
    assert set(decision.by_pattern) == {"attn.*", "*.bias"}
    assert decision.by_pattern["attn.*"].coefficient < 1


def test_non_finite_group_does_not_affect_another():
    named = with_norms(math.nan, 4.0)
    run(Groups({"p0": NormClip(1.0), "p1": NormClip(1.0)}), named)
    assert gradients(named)[1].norm() == pytest.approx(1.0, rel=1e-5)


def test_states_are_separate():
    rule = Groups({"p0": ZClip(warmup=2), "p1": ZClip(warmup=3), "*": None})
    state = rule.initial_state()
    run(rule, with_norms(1.0, 5.0, 7.0), state)
    assert {k: v["seed"] for k, v in state.items()} == {
        "p0": pytest.approx([1.0]),
        "p1": pytest.approx([5.0]),
    }


def test_fused_optimizer_gets_no_scale():
    named = with_norms(4.0, 4.0)
    optimizer = torch.optim.AdamW([p for _, p in named], fused=True)
    clip_gradients_(named, Groups({"p0": NormClip(1.0), "p1": NormClip(2.0)}), optimizer=optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert [round(g.norm().item(), 4) for g in gradients(named)] == [1.0, 2.0]


def test_rules_on_updates_may_be_members():
    named = with_norms(4.0, 4.0)
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    before = [p.detach().clone() for _, p in named]
    clip_gradients_(
        named, Groups({"p0": MaxUpdateRatio(0.1), "p1": AGC(0.01)}), optimizer=optimizer
    )
    optimizer.step()
    moved = [(p.detach() - b).norm().item() for (_, p), b in zip(named, before, strict=True)]
    assert moved == pytest.approx([0.1 * 3**0.5, 0.01 * 3**0.5], rel=1e-5)


def test_schedules_of_members_are_resolved():
    rule = Groups({"*": NormClip(1.0, schedule=WarmupLinear(warmup="10 steps")), "x": None})
    resolved = rule.resolve(Horizon.of_steps(100))
    assert resolved.pairs[0][1].schedule != rule.pairs[0][1].schedule
    assert resolved.pairs[1] == ("x", None)


def test_norm_order_of_groups():
    assert Groups({"a": ValueClip(), "b": AGC()}).norm_order is None
    assert Groups({"a": ValueClip(), "b": NormClip(norm_type=1)}).norm_order == 1.0
    named = with_norms(4.0, 4.0)
    run(Groups({"p0": NormClip(1.0, norm_type=1), "p1": NormClip(1.0)}), named)
    assert gradients(named)[0].abs().sum() == pytest.approx(1.0, rel=1e-5)
    assert gradients(named)[1].norm() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"typo.*": NormClip()}, r"got 'typo\.\*', which matches none of p0, p1"),
        ({"*": NormClip(), "p1": None}, "got 'p1', .*; an earlier pattern matches p1 first"),
    ],
)
def test_pattern_without_parameters_raises(rules, message):
    with pytest.raises(ValueError, match=message):
        run(Groups(rules), with_norms(1.0, 1.0))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "rules must contain at least one pattern"),
        ({"*": 1.0}, r"rules\['\*'\] must be a ClippingRule or None, got 1.0"),
        ({1: None}, "rules must have patterns as keys, got 1"),
    ],
)
def test_invalid_arguments_raise(rules, message):
    with pytest.raises(ValueError, match=message):
        Groups(rules)


def test_dict_and_its_pairs_are_equal():
    rules = {"a": NormClip(), "*": None}
    assert Groups(rules) == Groups(tuple(rules.items()))
    assert hash(Groups(rules)) == hash(Groups(tuple(rules.items())))


def test_rules_on_updates_of_equal_shapes_do_not_share_memory():
    a, b = (nn.Parameter(torch.tensor([3.0, 4.0]) * scale) for scale in (1.0, 100.0))
    a.grad = b.grad = torch.tensor([1.0, 0.0])
    optimizer = torch.optim.SGD([a, b], lr=10.0)
    rule = Groups({"a": MaxUpdateRatio(0.01), "b": MaxUpdateRatio(0.001)})
    clip_gradients_([("a", a), ("b", b)], rule, optimizer=optimizer)
    optimizer.step()
    assert a.tolist() == pytest.approx([3.0 - 0.01 * 5, 4.0])
    assert b.tolist() == pytest.approx([300.0 - 0.001 * 500, 400.0])


def test_group_of_another_optimizer_is_not_applied():
    """UpdateClip would raise for SGD; ZClip would count an update that was not made."""
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    rule = Groups({"adam.*": UpdateClip(), "other.*": ZClip(), "sgd.*": NormClip(1.0)})
    state = rule.initial_state()
    decision = run(
        rule,
        [("sgd.weight", weight)],
        state,
        optimizer=torch.optim.SGD([weight], lr=0.1),
        all_names=["adam.weight", "other.weight", "sgd.weight"],
    )
    assert list(decision.by_pattern) == ["sgd.*"]
    assert state == rule.initial_state()
    assert weight.grad.norm() == pytest.approx(1.0, rel=1e-5)


def test_groups_inside_groups():
    named = with_norms(8.0, 8.0, 8.0)
    inner = Groups({"p0": NormClip(1.0), "p1": NormClip(2.0)})
    rule = Groups({"p[01]": inner, "p2": AutoClip(50)})
    state = rule.initial_state()
    run(rule, named, state)
    assert [round(g.norm().item(), 4) for g in gradients(named)] == [1.0, 2.0, 8.0]
    assert state["p2"]["norms"] == pytest.approx([8.0])
