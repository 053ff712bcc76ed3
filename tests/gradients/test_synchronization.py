"""Tests that an accelerator is not synchronized, on fake tensors and on a real device.

A fake tensor has a device and no numbers: reading one raises. A copy between host and device that
blocks the host does not; a dispatch mode raises for it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_bigopt.gradients import (
    AGC,
    AdaGC,
    AutoClip,
    Groups,
    MaxUpdateRatio,
    NormClip,
    PerParameterNormClip,
    UpdateClip,
    ValueClip,
    ZClip,
    clip_gradients_,
    measure,
    skip_update_,
)
from lightning_bigopt.gradients.clip_statistics import ClipStatistics

SHAPES = ((), (5,), (0,), (3, 4, 2, 2), *[(8, 8)] * 5, (300, 200))
FREE = (
    NormClip(),
    NormClip(norm_type=float("inf")),
    PerParameterNormClip(),
    ValueClip(),
    AGC(),
    AdaGC(warmup=1),
    Groups({"p0": NormClip(), "p1": AGC(), "*": AdaGC(warmup=1)}),
    UpdateClip(),
    MaxUpdateRatio(),
)


class NoBlockingCopies(TorchDispatchMode):
    """Raises for a copy between devices that blocks the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [
            x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.numel()
        ]
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.numel()]
        name = func.overloadpacket.__name__
        if name in {"_to_copy", "copy_", "_foreach_copy_"}:
            devices = {x.device.type for x in [*given, *made]}
            waits = not (kwargs.get("non_blocking") or any(x is True for x in args))
            if len(devices) > 1 and waits:
                raise AssertionError(f"{name} makes the host wait")
        return result


LOOPS = {"fused": {"fused": True}, "foreach": {"foreach": True}}


def parameters(device):
    named = []
    for index, shape in enumerate(SHAPES):
        parameter = nn.Parameter(torch.randn(shape, device=device))
        parameter.grad = torch.randn_like(parameter)
        named.append((f"p{index}", parameter))
    return named


def clip_and_step(named, rule, loop):
    optimizer = torch.optim.AdamW([p for _, p in named], lr=0.01, **LOOPS[loop])
    state = rule.initial_state()
    for _ in range(3):
        clip_gradients_(named, rule, state=state, optimizer=optimizer)
        optimizer.step()
    skip_update_(optimizer)
    optimizer.step()


@pytest.mark.parametrize("rule", FREE, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("loop", LOOPS)
def test_clipping_reads_no_value(rule, loop):
    with FakeTensorMode(), torch.no_grad():
        named = parameters("cuda")
        with NoBlockingCopies():
            clip_and_step(named, rule, loop)


@pytest.mark.parametrize("order", [1.0, 2.0, float("inf")])
def test_measuring_reads_no_value(order):
    with FakeTensorMode(), torch.no_grad():
        named = parameters("cuda")
        with NoBlockingCopies():
            norms = measure(named, norm_type=order)
        assert norms.per_tensor.device.type == norms.total.device.type == "cuda"
        assert norms.select([1, 3]).total.device.type == "cuda"


@pytest.mark.parametrize("rule", [AutoClip(), ZClip()], ids=lambda rule: type(rule).__name__)
def test_adaptive_rule_reads_a_value(rule):
    """Shows that the tests above can fail."""
    with FakeTensorMode(), torch.no_grad(), pytest.raises(DataDependentOutputException):
        clip_gradients_(parameters("cuda"), rule, state=rule.initial_state())


@pytest.mark.parametrize("wait", [True, False])
def test_blocking_copy_is_detected(wait):
    with FakeTensorMode():
        there = torch.ones(2, device="cuda")
        with NoBlockingCopies():
            if wait:
                with pytest.raises(AssertionError, match="_to_copy makes the host wait"):
                    there.to("cpu")
            else:
                there.to("cpu", non_blocking=True)


@pytest.mark.parametrize("rule", FREE, ids=lambda rule: type(rule).__name__)
def test_clip_statistics_read_no_value_between_reports(rule):
    """Runs more updates than are pending at most, as the callback does."""
    named, state, audits = parameters("meta"), rule.initial_state(), {}
    optimizer = torch.optim.AdamW([p for _, p in named])
    for _ in range(70):
        decision = clip_gradients_(named, rule, state=state, optimizer=optimizer)
        for group, part in decision.each_group():
            audits.setdefault(group, ClipStatistics()).add(part)
    counting = [audit for audit in audits.values() if audit._sample._seen]
    assert bool(counting) == (rule.norm_order is not None)
    for audit in counting:
        with pytest.raises(RuntimeError, match="item"):
            audit.report()


@pytest.mark.gpu
@pytest.mark.parametrize("rule", FREE, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("loop", LOOPS)
def test_no_synchronization_on_a_gpu(rule, loop):
    named = parameters("cuda")
    clip_and_step(named, rule, loop)  # allocations and lazy initialization
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        clip_and_step(named, rule, loop)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("order", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_cpu(order, dtype):
    here = [(name, nn.Parameter(p.detach().to(dtype))) for name, p in parameters("cpu")]
    there = [(name, nn.Parameter(p.detach().cuda())) for name, p in here]
    for (_, p), (_, q) in zip(here, there, strict=True):
        p.grad = torch.randn_like(p) * 1e25 if dtype is torch.float32 else torch.randn_like(p)
        q.grad = p.grad.cuda()
    a, b = measure(here, norm_type=order), measure(there, norm_type=order)
    torch.testing.assert_close(a.per_tensor, b.per_tensor.cpu(), rtol=1e-6, atol=0)
    assert bool(b.finite)
