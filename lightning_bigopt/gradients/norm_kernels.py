"""Norms of many local tensors at once, with few kernel launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor, _foreach_norm

__all__ = ["accumulation_dtype", "all_on_cpu", "cpu_norms", "local_norms", "stored_values"]

# torch sums a float32 vector on the CPU with few partial sums: the norm of 25M equal numbers is off
# by 1 %. Norms of rows of this length, combined in float64, are exact to 1e-6 and 1.7 times as
# fast.
_ROW = 1024
_LARGE = 1 << 17
# Elements of a 16-bit tensor whose float32 copy fits into the cache.
_SCRATCH = 1 << 15
# Up to this size launching a kernel takes longer than its arithmetic, and many tensors of one shape
# are stacked: 300 tensors take 0.24 ms instead of 0.67 ms.
_SMALL = 1 << 12
_MANY = 8
_HALF = (torch.bfloat16, torch.float16)
_is_cpu = attrgetter("is_cpu")


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype in which norms are accumulated: float64, or float32 on MPS without it.

    Example:
        >>> accumulation_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def stored_values(gradient: Tensor) -> Tensor:
    """Returns the values of a sparse gradient, each position once; a dense one unchanged.

    The positions of a sparse gradient may repeat; adding their values up synchronizes on a GPU.

    Example:
        >>> indices, values = torch.tensor([[0, 2, 0]]), torch.tensor([1.0, 5.0, 2.0])
        >>> gradient = torch.sparse_coo_tensor(indices, values, (4,), check_invariants=True)
        >>> stored_values(gradient)
        tensor([3., 5.])
    """
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def all_on_cpu(tensors: Sequence[Tensor]) -> bool:
    """Returns whether all tensors are on the CPU; True for an empty list."""
    return all(map(_is_cpu, tensors))


def local_norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    """Computes the norm of each tensor, for any mix of dtypes and devices. Does not synchronize.

    Squares of large float32 numbers do not overflow, except on a device without float64.

    Args:
        tensors: Dense tensors, real or complex; the norm of an empty tensor is zero.
        order: Order of the norms: 1, 2 or ``inf``.

    Returns:
        The norms, of shape ``(n,)`` and :func:`accumulation_dtype`, on the device of the first
        tensor; NaN for a tensor with a NaN.

    Example:
        >>> local_norms([torch.tensor([3.0, 4.0]), torch.empty(0)], 2.0).tolist()
        [5.0, 0.0]
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    if all_on_cpu(tensors):
        return torch.tensor(cpu_norms(tensors, order), dtype=torch.float64)
    home = tensors[0].device
    dtype = accumulation_dtype(home)
    norms = [torch.zeros((), dtype=dtype, device=home)] * len(tensors)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    for (device, _), indices in kinds.items():
        members = [_real(tensors[index]) for index in indices]
        # Only sums overflow in float32; a maximum does not.
        sums = torch.float32 if order == math.inf else accumulation_dtype(device)
        into = torch.promote_types(sums, members[0].dtype)
        for index, norm in zip(indices, _foreach_norm(members, order, dtype=into), strict=True):
            norms[index] = norm.to(home, dtype)
    return torch.stack(norms)


def cpu_norms(tensors: Sequence[Tensor], order: float) -> list[float]:
    """Computes the norm of each tensor on the CPU, as a Python float.

    Reading a 0-d tensor on a CPU is cheaper than stacking it.

    Args:
        tensors: Dense tensors on the CPU, real or complex; the norm of an empty tensor is zero.
        order: Order of the norms: 1, 2 or ``inf``.

    Returns:
        One norm for each tensor; NaN for a tensor with a NaN.

    Example:
        >>> cpu_norms([torch.tensor([3.0, 4.0]), torch.empty(0)], 2.0)
        [5.0, 0.0]
    """
    if order == 2.0:
        norms = _euclidean_norms(tensors)
    else:
        norm_of = _largest if order == math.inf else _sum
        norms = [norm_of(tensor) for tensor in tensors]
    if math.isfinite(sum(norms)):
        return norms
    # The kernels above work in float32, where the square of a number above 1.8e19 overflows. This
    # is rare enough to measure only then, and only these tensors, again in float64.
    return [
        norm if math.isfinite(norm) else _norm_without_overflow(tensor, order)
        for norm, tensor in zip(norms, tensors, strict=True)
    ]


def _euclidean_norms(tensors: Sequence[Tensor]) -> list[float]:
    norms = [0.0] * len(tensors)
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((tensor.shape, tensor.dtype), []).append(index)
    others: dict[torch.dtype, list[int]] = {}
    for (shape, dtype), indices in alike.items():
        size = shape.numel()
        if size >= _LARGE or (size > _SMALL and dtype in _HALF):
            for index in indices:
                norms[index] = _norm_by_rows(_real(tensors[index]).reshape(-1))
        elif 0 < size <= _SMALL and len(indices) >= _MANY:
            rows = _real(torch.stack([tensors[index] for index in indices])).view(len(indices), -1)
            into = _at_least_float32(rows.dtype)
            row_norms = torch.linalg.vector_norm(rows, dim=1, dtype=into).tolist()
            for index, norm in zip(indices, row_norms, strict=True):
                norms[index] = norm
        elif size:
            others.setdefault(dtype, []).extend(indices)
    for indices in others.values():
        members = [_real(tensors[index]) for index in indices]
        into = _at_least_float32(members[0].dtype)
        for index, tensor in zip(indices, _foreach_norm(members, dtype=into), strict=True):
            norms[index] = tensor.item()
    return norms


def _norm_by_rows(flat: Tensor) -> float:
    """Computes the norm of a large vector from the norms of its rows."""
    if flat.dtype in _HALF:
        scratch = torch.empty(_SCRATCH, dtype=torch.float32)
        parts = torch.split(flat, _SCRATCH)
        return math.hypot(*[_norm_by_rows(scratch[: len(part)].copy_(part)) for part in parts])
    rows = torch.linalg.vector_norm(flat.unfold(0, min(_ROW, len(flat)), _ROW), dim=1)
    norm = float(torch.linalg.vector_norm(rows, dtype=torch.float64))
    rest = flat[len(rows) * _ROW :]
    return math.hypot(norm, float(torch.linalg.vector_norm(rest))) if len(rest) else norm


def _sum(tensor: Tensor) -> float:
    """Sums the absolute values."""
    parts = torch.split(_real(tensor).reshape(-1), _SCRATCH)
    return sum(float(part.abs().sum(dtype=_at_least_float32(part.dtype))) for part in parts)


def _largest(tensor: Tensor) -> float:
    """Returns the largest absolute value; NaN for a tensor with a NaN."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(_real(tensor))
    return max(abs(low.item()), abs(high.item()))


def _norm_without_overflow(tensor: Tensor, order: float) -> float:
    """Computes a norm in float64, of numbers with an overflowing sum or non-finite numbers."""
    largest = _largest(tensor)
    if not 0.0 < largest < math.inf:
        return largest
    # Divided by the largest number first: squares of float64 numbers above 1e154 overflow, too.
    return largest * float(torch.linalg.vector_norm(_real(tensor).double() / largest, order))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _real(tensor: Tensor) -> Tensor:
    return tensor.abs() if tensor.is_complex() else tensor
