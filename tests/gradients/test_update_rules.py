"""UpdateClip and MaxUpdateRatio: limits on the update that an optimizer makes."""

from __future__ import annotations

import gc
import math

import pytest
import schedulefree
import torch
from torch import nn

from lightning_bigopt.gradients import (
    ClipContext,
    MaxUpdateRatio,
    UpdateClip,
    clip_gradients_,
    skip_update_,
)
from lightning_bigopt.gradients.rules import update_rule
from tests.oracles import gradients as oracle

SHAPES = ((), (5,), (0,), (3, 4, 2, 2), (6, 7))
LOOPS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("max_rms", [1.0, 0.4])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_update_clip_with_adamw_equals_stable_adamw(loop, max_rms, chunk, monkeypatch):
    monkeypatch.setitem(update_rule._CHUNK, "cpu", chunk)
    ours = parameters()
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}
    truths = [oracle.StableAdamW(p, 0.1, (0.8, 0.9), 1e-6, 0.2) for p in ours]
    optimizer = torch.optim.AdamW(ours, **settings, weight_decay=0.2, **LOOPS[loop])
    for step in range(12):
        for parameter, truth in zip(ours, truths, strict=True):
            # Gradients that jump: the second moment lags, and the update is too large.
            parameter.grad = torch.randn_like(parameter) * (100.0 if step in (4, 8, 9) else 1.0)
            truth.step(parameter.grad, max_rms)
        clip_gradients_(ours, UpdateClip(max_rms), optimizer=optimizer)
        optimizer.step()
        for parameter, truth in zip(ours, truths, strict=True):
            torch.testing.assert_close(parameter.double(), truth.w, rtol=2e-5, atol=2e-6)
    assert max(truths[1].rms) > 2.0  # the rule clips
    assert min(truths[1].rms) < 1.0


def test_update_clip_groups_have_their_own_betas_and_eps():
    a, b = parameters(shapes=((4,), (4,)))
    truths = [
        oracle.StableAdamW(a, 0.1, (0.9, 0.5), 1e-2, 0.0),
        oracle.StableAdamW(b, 0.1, (0.9, 0.99), 1e-8, 0.0),
    ]
    optimizer = torch.optim.AdamW(
        [{"params": [a], "betas": (0.9, 0.5), "eps": 1e-2}, {"params": [b], "betas": (0.9, 0.99)}],
        lr=0.1,
        weight_decay=0.0,
    )
    for step in range(6):
        for parameter, truth in zip((a, b), truths, strict=True):
            parameter.grad = torch.randn_like(parameter) * (50.0 if step == 3 else 1.0)
            truth.step(parameter.grad)
        clip_gradients_([a, b], UpdateClip(), optimizer=optimizer)
        optimizer.step()
    for parameter, truth in zip((a, b), truths, strict=True):
        torch.testing.assert_close(parameter.double(), truth.w, rtol=2e-5, atol=2e-6)


def test_update_within_the_limit_keeps_every_bit():
    ours, theirs = parameters(), None
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    one, other = torch.optim.AdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        clip_gradients_(ours, UpdateClip(100.0), optimizer=one)
        one.step()
        other.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_max_update_ratio(dtype, kind):
    ours = parameters(dtype)
    with torch.no_grad():
        ours[-1].zero_()
    free = [nn.Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    for p, q in zip(ours, free, strict=True):
        p.grad = torch.randn_like(p) * 3
        q.grad = p.grad.clone()
    one, other = kind(ours, lr=0.1), kind(free, lr=0.1)
    clip_gradients_(ours, MaxUpdateRatio(0.02, eps=1e-2), optimizer=one)
    one.step()
    other.step()
    acted = 0
    for p, q, old in zip(ours, free, before, strict=True):
        update = (q - old).double()
        longest = 0.02 * max(oracle.norm([old]), 1e-2)
        factor = min(1.0, longest / oracle.norm([update])) if oracle.norm([update]) else 1.0
        acted += factor < 1
        tolerance = (
            {"rtol": 1e-5, "atol": 1e-7} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
        )
        torch.testing.assert_close(p.double(), old.double() + factor * update, **tolerance)
    assert acted


@pytest.mark.parametrize("rule", [UpdateClip(), MaxUpdateRatio()])
@pytest.mark.parametrize("fused", [True, False])
def test_skipped_step_is_not_corrected(rule, fused):
    ours = parameters()
    optimizer = torch.optim.AdamW(ours, lr=0.1, fused=fused)
    for parameter in ours:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    before = [p.detach().clone() for p in ours]
    for parameter in ours:
        parameter.grad = torch.full_like(parameter, math.nan)
    clip_gradients_(ours, rule, optimizer=optimizer)
    skip_update_(optimizer)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(ours, before, strict=True))


def test_step_skipped_by_the_fused_kernel_is_not_corrected():
    ours = parameters()
    optimizer = torch.optim.AdamW(ours, lr=0.1, fused=True)
    for _ in range(2):  # before the moments exist, and after
        before = [p.detach().clone() for p in ours]
        for parameter in ours:
            parameter.grad = torch.full_like(parameter, math.nan)
        clip_gradients_(ours, UpdateClip(), optimizer=optimizer)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        del optimizer.found_inf
        assert all(torch.equal(p, old) for p, old in zip(ours, before, strict=True))
        for parameter in ours:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def test_step_that_did_not_run_is_not_corrected_later():
    ours = parameters(shapes=((4,),))
    optimizer = torch.optim.SGD(ours, lr=0.001)
    ours[0].grad = torch.ones(4)
    clip_gradients_(ours, MaxUpdateRatio(1e-6), optimizer=optimizer)
    with torch.no_grad():
        ours[0].add_(100.0)  # stands for a loaded checkpoint
    clip_gradients_(ours, MaxUpdateRatio(10.0), optimizer=optimizer)
    before = ours[0].detach().clone()
    optimizer.step()
    torch.testing.assert_close(ours[0].detach(), before - 0.001)


@pytest.mark.slow
def test_replaced_parameters_leave_no_copies():
    """As when the points of Gaussian splatting are split and removed every hundred updates."""
    optimizer = torch.optim.SGD(parameters(shapes=((),)), lr=0.1)

    def step(size):
        weight = nn.Parameter(torch.ones(size))
        optimizer.param_groups[0]["params"] = [weight]
        weight.grad = torch.ones(size)
        clip_gradients_([weight], MaxUpdateRatio(0.01), optimizer=optimizer)
        optimizer.step()
        assert (weight.detach() - 1).norm() == pytest.approx(0.01 * size**0.5, rel=1e-3)

    for size in range(101, 111):
        step(size)
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
    assert sum(tensor.shape in {(size,) for size in range(101, 110)} for tensor in tensors) == 0


def test_parameters_without_gradient_are_not_copied():
    a, b = parameters(shapes=((4,), (4,)))
    optimizer = torch.optim.AdamW([a, b], lr=0.1)
    b.grad = torch.randn(4)
    clip_gradients_([a, b], UpdateClip(), optimizer=optimizer)
    optimizer.step()
    a.grad, b.grad = torch.randn(4), None
    clip_gradients_([a, b], UpdateClip(), optimizer=optimizer)
    optimizer.step()


@pytest.mark.parametrize("rule", [UpdateClip(), MaxUpdateRatio()])
def test_unsupported_uses_raise(rule):
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    named = [("p", parameter)]
    with pytest.raises(ValueError, match=f"optimizer must be given to {type(rule).__name__}"):
        clip_gradients_(named, rule)
    free = schedulefree.AdamWScheduleFree([parameter])
    with pytest.raises(ValueError, match="got AdamWScheduleFree, which averages iterates"):
        clip_gradients_(named, rule, optimizer=free)
    context = ClipContext(
        parameters=named, optimizer=torch.optim.AdamW([parameter]), process_group=object()
    )
    with pytest.raises(ValueError, match="flat shards"):
        rule.decide(context, {})


def test_update_clip_needs_a_second_moment():
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(
        ValueError, match="optimizer must be of the Adam family for UpdateClip, got SGD"
    ):
        clip_gradients_([parameter], UpdateClip(), optimizer=torch.optim.SGD([parameter]))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_invalid_arguments_raise(value):
    for make in (UpdateClip, MaxUpdateRatio):
        with pytest.raises(ValueError, match=f"must be positive and finite, got {value}"):
            make(value)
    with pytest.raises(ValueError, match=f"eps must be positive and finite, got {value}"):
        MaxUpdateRatio(eps=value)


@pytest.mark.parametrize("loop", LOOPS)
def test_update_clip_uses_the_maximum_of_amsgrad(loop):
    """The maximum stays large after a spike, so later updates are small."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.0, 0.5), amsgrad=True, **LOOPS[loop])
    steps = []
    for scale in (1000.0, *[1.0] * 20, 30.0):
        weight.grad = torch.full((4,), scale)
        before = weight.detach().clone()
        clip_gradients_([weight], UpdateClip(), optimizer=optimizer)
        optimizer.step()
        steps.append((weight.detach() - before * (1 - 0.1 * 0.01)).abs().max().item())
    # The maximum of v is 500,000, its last value 450: 30 / √500,000 is below the limit of 1, and
    # 30 / √450 is above it.
    assert steps[-1] == pytest.approx(0.1 * 30 / 500_000**0.5, rel=1e-3)


def test_complex_weights_equal_pairs_of_real_weights():
    real = nn.Parameter(torch.randn(5, 2))
    weight = nn.Parameter(torch.view_as_complex(real.detach().clone()))
    pair = [torch.optim.AdamW([p], lr=0.1) for p in (weight, real)]
    for scale in (1.0, 1.0, 100.0):
        real.grad = torch.randn(5, 2) * scale
        weight.grad = torch.view_as_complex(real.grad.clone())
        for parameter, optimizer in zip((weight, real), pair, strict=True):
            clip_gradients_([parameter], UpdateClip(0.5), optimizer=optimizer)
            optimizer.step()
        torch.testing.assert_close(torch.view_as_real(weight.detach()), real.detach())


def test_update_clip_with_adamax_raises():
    """Adamax keeps no second moment, which is known after its first step."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.Adamax([weight])
    clip_gradients_([weight], UpdateClip(), optimizer=optimizer)
    message = "must keep exp_avg_sq and step for UpdateClip, got Adamax, .* use MaxUpdateRatio"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    with pytest.raises(ValueError, match=message):
        clip_gradients_([weight], UpdateClip(), optimizer=optimizer)


def test_update_clip_with_quantized_moments_raises():
    """As torchao's AdamW8bit keeps them, in a subclass of Tensor with few operations."""

    class Quantized(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, operation, types, arguments=(), keywords=None):
            raise NotImplementedError(operation)

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

    class AdamW8bit(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            for state in self.state.values():
                state["exp_avg_sq"] = torch.Tensor._make_wrapper_subclass(Quantized, (2,))

    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = AdamW8bit([weight])
    clip_gradients_([weight], UpdateClip(), optimizer=optimizer)
    message = "got AdamW8bit, which keeps Quantized; use MaxUpdateRatio"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    with pytest.raises(ValueError, match=message):
        clip_gradients_([weight], UpdateClip(), optimizer=optimizer)


def test_sparse_gradients():
    layer = nn.Embedding(4, 3, sparse=True)
    layer(torch.tensor([1, 2])).sum().backward()
    adam = torch.optim.SparseAdam(list(layer.parameters()))
    with pytest.raises(ValueError, match="gradient of weight must be dense"):
        clip_gradients_(layer, UpdateClip(), optimizer=adam)
    before = layer.weight.detach().clone()
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
    clip_gradients_(layer, MaxUpdateRatio(0.01), optimizer=sgd)
    sgd.step()
    moved = (layer.weight - before).norm().item()
    assert moved == pytest.approx(0.01 * before.norm().item(), rel=1e-5)
