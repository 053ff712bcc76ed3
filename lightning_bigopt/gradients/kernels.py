"""Norms of many local tensors at once: a few launches on an accelerator, few calls on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, _foreach_norm

__all__ = ["local_norms", "wide_dtype"]

# A CPU sums a row in float32 with few partial sums: 25M equal numbers come out 1 % off. Rows of
# this length, put together in float64, are exact to 1e-6 and 1.7 times as fast.
_ROW = 1024
_LARGE = 1 << 17
# What fits into a cache with its float32 copy.
_SCRATCH = 1 << 15
# Below this size the call costs more than the arithmetic: equal shapes are copied together.
_SMALL = 1 << 12
_FEW = 8
_HALF = (torch.bfloat16, torch.float16)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which norms are put together on a device: float64 where there is one."""
    return torch.float32 if device.type == "mps" else torch.float64


def local_norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    """The norm of each tensor, whatever the mix of dtypes and devices. Does not synchronise.

    Squares of large float32 numbers do not overflow, except on a device without float64.

    Args:
        tensors: Dense tensors, complex ones included; empty tensors have norm zero.
        order: 1, 2 or ``inf``.

    Returns:
        Shape (n,), of :func:`wide_dtype`, on the device of the first tensor; NaN where a tensor
        holds one.

    Example:
        >>> local_norms([torch.tensor([3.0, 4.0]), torch.empty(0)], 2.0).tolist()
        [5.0, 0.0]
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    home = tensors[0].device
    if {tensor.is_cpu for tensor in tensors} == {True}:
        return torch.tensor(_on_cpu(tensors, order), dtype=torch.float64)
    found: list[Tensor | None] = [None] * len(tensors)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    for (device, _), indices in kinds.items():
        # A maximum cannot overflow; sums are kept from it by float64.
        sums = torch.float32 if order == math.inf else wide_dtype(device)
        members = [_real(tensors[index]) for index in indices]
        into = torch.promote_types(sums, members[0].dtype)
        norms = _foreach_norm(members, order, dtype=into)
        for index, norm in zip(indices, norms, strict=True):
            found[index] = norm
    wide = wide_dtype(home)
    zero = torch.zeros((), dtype=wide, device=home)
    return torch.stack([zero if norm is None else norm.to(home, wide) for norm in found])


def _on_cpu(tensors: Sequence[Tensor], order: float) -> list[float]:
    """The norms as numbers: to read a 0-d tensor is cheaper here than to stack it."""
    if order != 2.0:
        each_alone = _largest if order == math.inf else _sum
        found = [each_alone(tensor) for tensor in tensors]
    else:
        found = _euclidean(tensors)
    return [
        norm if math.isfinite(norm) else _exact(tensor, order)
        for norm, tensor in zip(found, tensors, strict=True)
    ]


def _euclidean(tensors: Sequence[Tensor]) -> list[float]:
    norms = dict.fromkeys(range(len(tensors)), 0.0)
    few = len(tensors) < 2 * _FEW
    alike: dict[torch.Size, list[int]] = {}
    middle: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        size = tensor.numel()
        if size >= _LARGE or (size > _SMALL and tensor.dtype in _HALF):
            norms[index] = _by_rows(_real(tensor).reshape(-1))
        elif size > _SMALL or (size and few):
            middle.setdefault(tensor.dtype, []).append(index)
        elif size:
            alike.setdefault(tensor.shape, []).append(index)
    for indices in alike.values():
        if len(indices) < _FEW:
            for index in indices:
                middle.setdefault(tensors[index].dtype, []).append(index)
        else:
            found = _stacked([tensors[index] for index in indices])
            norms.update(zip(indices, found, strict=True))
    for dtype, indices in middle.items():
        members = [tensors[index] for index in indices]
        if dtype.is_complex:
            members = [_real(member) for member in members]
        each = _foreach_norm(members, dtype=_sums(members[0].dtype))
        norms.update(zip(indices, [norm.item() for norm in each], strict=True))
    return list(norms.values())


def _stacked(tensors: Sequence[Tensor]) -> list[float]:
    """The norms of tensors of one shape, as rows of one block."""
    rows = _real(torch.stack(list(tensors))).reshape(len(tensors), -1)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=_sums(rows.dtype))
    return [float(norm) for norm in norms.tolist()]


def _sum(tensor: Tensor) -> float:
    """The sum of absolute values."""
    parts = torch.split(_real(tensor).reshape(-1), _SCRATCH)
    return sum(float(part.abs().sum(dtype=_sums(part.dtype))) for part in parts)


def _largest(tensor: Tensor) -> float:
    """The greatest absolute value; NaN where there is one, which aminmax puts into both ends."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(_real(tensor))
    return max(abs(low.item()), abs(high.item()))


def _exact(tensor: Tensor, order: float) -> float:
    """The norm in float64, of numbers that overflow when squared or are really not finite."""
    largest = _largest(tensor)
    if not 0.0 < largest < math.inf:
        return largest
    return largest * float(torch.linalg.vector_norm(_real(tensor).double() / largest, order))


def _by_rows(flat: Tensor) -> float:
    """The norm of a large vector, from the norms of its rows."""
    if flat.dtype in _HALF:
        scratch = torch.empty(_SCRATCH, dtype=torch.float32)
        parts = torch.split(flat, _SCRATCH)
        return math.hypot(*[_by_rows(scratch[: len(part)].copy_(part)) for part in parts])
    rows = torch.linalg.vector_norm(flat.unfold(0, min(_ROW, len(flat)), _ROW), dim=1)
    whole = float(torch.linalg.vector_norm(rows, dtype=torch.float64))
    rest = flat[len(rows) * _ROW :]
    return math.hypot(whole, float(torch.linalg.vector_norm(rest))) if len(rest) else whole


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _real(tensor: Tensor) -> Tensor:
    return tensor.abs() if tensor.is_complex() else tensor
