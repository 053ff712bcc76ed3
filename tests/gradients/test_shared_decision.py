"""Joint norms and shared decisions, compared with torch, also on fake tensors of a device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_bigopt.gradients import ClipContext, NormClip, measure
from lightning_bigopt.gradients.gradient_norms import DeviceNorms, GradientNorms
from lightning_bigopt.gradients.shared_decision import SharedDecision, joint_norms
from tests.gradients.test_synchronization import NoBlockingCopies

ORDERS = [1.0, 2.0, math.inf]


def parameter(*gradient: float) -> nn.Parameter:
    found = nn.Parameter(torch.zeros(len(gradient)))
    found.grad = torch.tensor(gradient)
    return found


def on_device(norms: GradientNorms) -> DeviceNorms:
    """Returns the same norms, as a device would hold them."""
    return DeviceNorms(
        names=norms.names,
        per_tensor=norms.per_tensor,
        total=norms.total,
        finite=norms.finite,
        norm_type=norms.norm_type,
        parameters=norms.parameters,
    )


def joint(parts: list[list[nn.Parameter]], order: float, kinds: str) -> GradientNorms:
    """Measures each part, and holds it on the host (h) or a device (d)."""
    measured = [measure([(f"p{id(p)}", p) for p in part], norm_type=order) for part in parts]
    return joint_norms(
        [on_device(m) if kind == "d" else m for m, kind in zip(measured, kinds, strict=True)]
    )


@pytest.mark.parametrize("kinds", ["hhh", "ddd", "hdd", "dhd"])
@pytest.mark.parametrize("order", ORDERS)
def test_joint_norm_is_that_of_all_gradients(order: float, kinds: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        [parameter(*torch.randn(size, generator=generator).tolist()) for size in sizes]
        for sizes in ((3, 5), (7,), (2, 2, 4))
    ]
    every = [p for part in parts for p in part]
    found = joint(parts, order, kinds)
    expected = nn.utils.get_total_norm([p.grad for p in every if p.grad is not None], order)
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=0)
    assert (found.value, found.norm_type) == (found.total.item(), order)
    assert found.finite.item() is True
    assert [id(p) for p in found.parameters] == [id(p) for p in every]
    norms = [float(torch.linalg.vector_norm(p.grad, order)) for p in every if p.grad is not None]
    assert found.per_tensor.tolist() == pytest.approx(norms)
    assert found.names == tuple(f"p{id(p)}" for p in every)


@pytest.mark.parametrize("kinds", ["hhh", "ddd", "hdd"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("order", ORDERS)
def test_a_part_that_is_not_finite_does_not_count(bad: float, order: float, kinds: str) -> None:
    parts = [[parameter(3.0)], [parameter(1.0), parameter(bad)], [parameter(4.0)]]
    found = joint(parts, order, kinds)
    expected = {1.0: 7.0, 2.0: 5.0, math.inf: 4.0}[order]
    assert (found.value, found.finite.item()) == (expected, True)


@pytest.mark.parametrize("kinds", ["hh", "dd", "hd"])
def test_the_norm_is_not_finite_if_no_part_is(kinds: str) -> None:
    found = joint([[parameter(math.nan)], [parameter(math.inf)]], 2.0, kinds)
    assert not math.isfinite(found.value)
    assert found.finite.item() is False


def test_squares_of_large_norms_do_not_overflow() -> None:
    for kinds in ("hh", "dd"):
        found = joint([[parameter(3e30)], [parameter(4e30)]], 2.0, kinds)
        assert found.value == pytest.approx(5e30)


def test_the_only_part_with_gradients_is_returned() -> None:
    empty = measure([("a", nn.Parameter(torch.zeros(1)))])
    norms = measure([("b", parameter(3.0))])
    assert joint_norms([empty, norms]) is norms
    assert joint_norms([norms]) is norms


def decided(pairs: list[tuple[str, nn.Parameter]]) -> SharedDecision:
    return SharedDecision(NormClip(max_norm=1.0).decide(ClipContext(parameters=pairs), {}), pairs)


def scaled_by_two(gradient: Tensor) -> None:
    gradient.mul_(2)


def foreach(gradient: Tensor) -> None:
    torch._foreach_add_([gradient], 1.0)


@pytest.mark.parametrize("change", [scaled_by_two, foreach, Tensor.zero_])
def test_a_written_gradient_is_detected(change: Any) -> None:
    first, second = ("a", parameter(3.0)), ("b", parameter(4.0))
    shared = decided([first, second])
    shared.clip_(torch.optim.SGD([first[1]], lr=1.0), measure([first]))
    shared.check([second])
    assert second[1].grad is not None
    change(second[1].grad)
    with pytest.raises(ValueError, match="got another gradient of b after the first step"):
        shared.check([second])


def test_a_parameter_that_is_added_between_the_steps_is_detected() -> None:
    first, second, third = (("a", parameter(3.0)), ("b", parameter(4.0)), ("c", parameter(1.0)))
    shared = decided([first, second])
    with pytest.raises(ValueError, match="got another gradient of c after the first step"):
        shared.check([second, third])
    third[1].grad = None
    shared.check([second, third])


def test_clipped_views_of_one_buffer_are_no_change() -> None:
    buffer = torch.tensor([3.0, 4.0])
    pairs = [("a", nn.Parameter(torch.zeros(1))), ("b", nn.Parameter(torch.zeros(1)))]
    for (_, one), view in zip(pairs, buffer.split(1), strict=True):
        one.grad = view
    shared = decided(pairs)
    for pair in pairs:
        shared.check([pair])
        shared.clip_(torch.optim.SGD([pair[1]], lr=1.0), measure([pair]))
    assert buffer.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_device_is_not_synchronized(fused: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), NoBlockingCopies():
        parts, optimizers = [], []
        for part in range(2):
            pairs = []
            for index in range(3):
                one = nn.Parameter(torch.zeros(4, 4, device="cuda"))
                one.grad = torch.zeros(4, 4, device="cuda")
                pairs.append((f"{part}.{index}", one))
            parts.append(pairs)
            optimizers.append(torch.optim.AdamW([p for _, p in pairs], fused=fused))
        every = [pair for pairs in parts for pair in pairs]
        norms = [measure(pairs) for pairs in parts]
        context = ClipContext(parameters=every, norms=joint_norms(norms))
        shared = SharedDecision(NormClip(max_norm=1.0).decide(context, {}), every)
        for pairs, part_norms, optimizer in zip(parts, norms, optimizers, strict=True):
            shared.check(pairs)
            decision = shared.clip_(optimizer, part_norms)
            assert decision.coefficient is not None
            assert decision.coefficient.device.type == "cuda"
            assert ("grad_scale" in vars(optimizer)) == fused
