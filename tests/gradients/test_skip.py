"""skip_update_: a skipped step changes no weight, no state and no group."""

from __future__ import annotations

import copy
import math

import pytest
import schedulefree
import torch

from lightning_bigopt.gradients import NormClip, clip_gradients_, skip_update_
from tests.gradients.helpers import with_gradients

OPTIMIZERS = {
    "AdamW for-loop": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "Muon": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "schedulefree AdamW": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.1, warmup_steps=5),
    "schedulefree for-loop": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.1, foreach=False),
    "schedulefree SGD": lambda p: schedulefree.SGDScheduleFree(p, lr=0.1),
}
SHAPES = ((5,), (6, 7), (3, 4))


def full_state(named, optimizer):
    return [p.detach().clone() for _, p in named], copy.deepcopy(optimizer.state_dict())


def assert_same_bits(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def fill(named, step, bad=False):
    for index, (_, parameter) in enumerate(named):
        generator = torch.Generator().manual_seed(100 * step + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if bad:
        named[1][1].grad[0] = math.nan


def make(kind):
    named = with_gradients(SHAPES)
    optimizer = OPTIMIZERS[kind]([p for _, p in named])
    if hasattr(optimizer, "train"):
        optimizer.train()
    return named, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("where", ["before step", "inside the closure"])
@pytest.mark.parametrize("after", [0, 2])
def test_skipped_steps_change_no_bit(kind, where, after):
    named, optimizer = make(kind)
    for step in range(after):
        fill(named, step)
        optimizer.step()
    before = full_state(named, optimizer)

    def closure():
        fill(named, 50, bad=True)
        skip_update_(optimizer)
        return torch.tensor(1.0)

    for _ in range(2):
        if where == "before step":
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
        assert_same_bits(full_state(named, optimizer), before)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_run_with_skips_equals_the_run_without_those_steps(kind):
    torch.manual_seed(3)
    skipping, one = make(kind)
    torch.manual_seed(3)
    plain, other = make(kind)
    for step in range(6):
        bad = step in (0, 3, 4)
        fill(skipping, step, bad)
        if bad:
            skip_update_(one)
        one.step()
        if not bad:
            fill(plain, step)
            other.step()
    assert_same_bits(full_state(skipping, one), full_state(plain, other))


@pytest.mark.parametrize("kind", [k for k in OPTIMIZERS if "tensor" not in k])
@pytest.mark.parametrize("overflow", [True, False])
def test_skip_before_the_step_of_a_grad_scaler(kind, overflow):
    """Skips finite gradients, with which the scaler would step, and an overflow."""
    named, optimizer = make(kind)
    fill(named, 0)
    optimizer.step()
    before = full_state(named, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    scaler.scale(torch.ones(()))
    fill(named, 1, bad=overflow)
    scaler.unscale_(optimizer)
    skip_update_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits(full_state(named, optimizer), before)
    assert scaler.get_scale() == (2.0 if overflow else 4.0)
    # A skipped step must not restore counters after a later step.
    copied_named, copied = copy.deepcopy((named, optimizer))
    for some, opt in ((named, optimizer), (copied_named, copied)):
        fill(some, 2)
        opt.step()
    assert_same_bits(full_state(named, optimizer), full_state(copied_named, copied))


def test_skip_removes_the_scale_of_an_earlier_clip():
    named, optimizer = make("AdamW fused")
    clip_gradients_(named, NormClip(0.01), optimizer=optimizer)
    skip_update_(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    optimizer.step()
    assert not optimizer.state


class Counting(torch.optim.SGD):
    """Counts steps in its groups, as third-party optimizers do: numbers, tensors and new keys."""

    def step(self, closure=None):
        result = super().step(closure)
        for group in self.param_groups:
            group["number"] = group.get("number", 0) + 1
            group["tensor"].add_(1)
            group[f"new {group['number']}"] = True
        return result


def test_numbers_and_tensors_in_the_groups_are_restored():
    named = with_gradients(SHAPES)
    optimizer = Counting([{"params": [p for _, p in named], "tensor": torch.zeros(2)}], lr=0.1)
    before, tensor = copy.deepcopy(optimizer.state_dict()), optimizer.param_groups[0]["tensor"]
    skip_update_(optimizer)
    optimizer.step()
    assert_same_bits(optimizer.state_dict(), before)
    assert optimizer.param_groups[0]["tensor"] is tensor  # the same object, which others may share
    optimizer.step()
    assert optimizer.param_groups[0]["number"] == 1


def test_gradients_of_further_parameters_become_none():
    named, optimizer = make("SGD momentum")
    (_, frozen), *_ = with_gradients(((2,),))
    skip_update_(optimizer, [frozen])
    assert frozen.grad is None
    assert all(parameter.grad is None for _, parameter in named)
