"""Applying a clip decision: scaled gradients, the fused kernel's scale, and step hooks."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from lightning_bigopt.gradients import (
    MaxUpdateRatio,
    NormClip,
    UpdateClip,
    apply_,
    clear_,
    clip_gradients_,
    scale_,
    skip_update_,
    step_control,
    takes_grad_scale,
)
from tests.gradients.helpers import deep_copy, gradients, with_gradients, with_norms

FUSED = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}


def snapshot(named, optimizer):
    return [p.detach().clone() for _, p in named], copy.deepcopy(optimizer.state_dict()["state"])


def assert_same_bits(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", FUSED)
def test_clipping_in_the_fused_kernel_equals_clip_then_step(kind):
    ours = with_gradients(scale=10.0)
    theirs = deep_copy(ours)
    mine, other = (FUSED[kind]([p for _, p in named]) for named in (ours, theirs))
    for _ in range(3):
        clip_gradients_(ours, NormClip(0.5), optimizer=mine)
        mine.step()
        torch.nn.utils.clip_grad_norm_([p for _, p in theirs], 0.5)
        other.step()
        for (_, p), (_, q) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
            for named in (p, q):
                named.grad = torch.full_like(named, 3.0)


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradients_in_the_fused_kernel_change_nothing(kind, bad):
    named = with_gradients()
    optimizer = FUSED[kind]([p for _, p in named])
    optimizer.step()
    before = snapshot(named, optimizer)
    named[1][1].grad[2] = bad
    clip_gradients_(named, NormClip(0.5), optimizer=optimizer)
    optimizer.step()
    assert_same_bits(snapshot(named, optimizer), before)


def test_scale_is_removed_after_the_step():
    named = with_norms(100.0)
    optimizer = FUSED["SGD"]([p for _, p in named])
    clip_gradients_(named, NormClip(1.0), optimizer=optimizer)
    assert optimizer.grad_scale.item() == pytest.approx(100.0, rel=1e-5)
    optimizer.step()
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
    step_control(optimizer).remove()
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("order", ["unscaled", "scaled"])
@pytest.mark.parametrize("bad", [False, True])
def test_clipping_with_a_grad_scaler(order, bad):
    """Both set a scale on the optimizer, and the GradScaler deletes both attributes."""
    ours, theirs = with_norms(8.0), with_norms(8.0)
    mine, other = (FUSED["AdamW"]([p for _, p in named]) for named in (ours, theirs))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    scaler.scale(torch.ones(()))
    ours[0][1].grad *= 4.0
    if bad:
        ours[0][1].grad[0] = math.inf
    else:
        torch.nn.utils.clip_grad_norm_([p for _, p in theirs], 1.0)
        other.step()
    if order == "unscaled":
        scaler.unscale_(mine)
        clip_gradients_(ours, NormClip(1.0), optimizer=mine)
    else:
        clip_gradients_(ours, NormClip(4.0), optimizer=mine)
    scaler.step(mine)
    scaler.update()
    torch.testing.assert_close(ours[0][1], theirs[0][1], rtol=1e-6, atol=0)
    assert scaler.get_scale() == (2.0 if bad else 4.0)
    assert not {"grad_scale", "found_inf"} & vars(mine).keys()


def test_coefficient_of_one_sets_no_scale_on_the_cpu():
    named = with_norms(1.0)
    optimizer = FUSED["AdamW"]([p for _, p in named])
    clip_gradients_(named, NormClip(5.0), optimizer=optimizer)
    assert not hasattr(optimizer, "grad_scale")


def test_optimizer_with_other_parameters_gets_no_scale():
    named = with_norms(8.0, 8.0)
    optimizer = FUSED["SGD"]([p for _, p in named])
    clip_gradients_(named[:1], NormClip(1.0), optimizer=optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert gradients(named)[0].norm() == pytest.approx(1.0, rel=1e-5)
    assert gradients(named)[1].norm() == pytest.approx(8.0, rel=1e-5)


def test_only_fully_fused_optimizers_take_a_scale():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    assert takes_grad_scale(torch.optim.AdamW([a, b], fused=True))
    assert not takes_grad_scale(torch.optim.AdamW([a, b]))
    mixed = torch.optim.AdamW([{"params": [a]}, {"params": [b], "fused": False}], fused=True)
    assert not takes_grad_scale(mixed)


def test_clear_removes_scale_and_function_of_a_step_that_did_not_run():
    named = with_norms(8.0)
    optimizer = FUSED["SGD"]([p for _, p in named])
    clip_gradients_(named, NormClip(1.0), optimizer=optimizer)
    step_control(optimizer).after_step(lambda: pytest.fail("must not run"))
    clear_(optimizer)
    before = named[0][1].detach().clone()
    optimizer.step()
    assert (named[0][1] - before).norm().item() == pytest.approx(0.8, rel=1e-5)


def test_clipping_twice_before_a_step_equals_clipping_once():
    named = with_norms(8.0)
    optimizer = FUSED["SGD"]([p for _, p in named])
    for _ in range(2):
        clip_gradients_(named, NormClip(1.0), optimizer=optimizer)
    before = named[0][1].detach().clone()
    optimizer.step()
    assert (named[0][1] - before).norm().item() == pytest.approx(0.1, rel=1e-5)


def test_optimizer_with_a_pending_correction_can_be_copied_pickled_and_freed():
    named = with_norms(8.0)
    optimizer = torch.optim.AdamW([p for _, p in named])
    clip_gradients_(named, UpdateClip(), optimizer=optimizer)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.step()
    reference = weakref.ref(optimizer)
    del optimizer, other
    gc.collect()
    assert reference() is None


def test_rule_on_updates_without_optimizer_raises():
    decision = UpdateClip().decide(_context(), {})
    with pytest.raises(
        ValueError, match="optimizer must be given to a rule that limits the update"
    ):
        apply_(decision)


def _context():
    from lightning_bigopt.gradients import ClipContext

    named = with_norms(1.0)
    return ClipContext(parameters=named, optimizer=torch.optim.AdamW([p for _, p in named]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scale_multiplies_each_tensor_by_its_factor(dtype):
    tensors = [
        torch.ones(2, dtype=dtype),
        None,
        torch.ones(3, dtype=torch.float64),
        torch.ones((), dtype=dtype),
    ]
    scale_(tensors, torch.tensor([0.5, 7.0, 1.0, 0.25]))
    assert [None if t is None else t.tolist() for t in tensors] == [
        [0.5] * 2,
        None,
        [1.0] * 3,
        0.25,
    ]
    scale_(tensors, torch.tensor(0.5))
    assert [None if t is None else t.tolist() for t in tensors] == [
        [0.25] * 2,
        None,
        [0.5] * 3,
        0.125,
    ]
    assert tensors[0].dtype == dtype


@pytest.mark.parametrize("kind", ["fused kernel", "limit on the update", "skip"])
def test_other_step_hooks_run_in_order(kind):
    """They run in every step that is not skipped."""
    named = with_norms(8.0)
    optimizer = FUSED["AdamW"]([p for _, p in named])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before step"))
    optimizer.register_step_post_hook(lambda *_: calls.append("before ours"))
    for _ in range(2):
        named[0][1].grad = torch.full((3,), 5.0)
        if kind == "skip":
            skip_update_(optimizer)
        else:
            rule = NormClip(1.0) if kind == "fused kernel" else MaxUpdateRatio(1e-6)
            clip_gradients_(named, rule, optimizer=optimizer)
        pre = optimizer.register_step_pre_hook(lambda *_: calls.append("pre, behind ours"))
        post = optimizer.register_step_post_hook(lambda *_: calls.append("post, behind ours"))
        for _ in range(2):
            before = named[0][1].detach().clone()
            optimizer.step()
            moved = (named[0][1] - before).abs().max().item()
            assert moved < 1e-5 or kind == "fused kernel"
            if kind == "limit on the update":
                break  # the second step is as long as it likes
            named[0][1].grad = None
        pre.remove(), post.remove()
    step_control(optimizer).remove()
    assert (
        len(optimizer._optimizer_step_post_hooks) == len(optimizer._optimizer_step_pre_hooks) == 1
    )
    steps = 4 if kind == "fused kernel" else 2
    every = ["before step", "pre, behind ours", "before ours", "post, behind ours"]
    assert calls == every * steps
