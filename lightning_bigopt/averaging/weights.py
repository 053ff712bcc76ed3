"""Means of weights, in one multi-tensor operation for each device and dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_bigopt.checks import shown

__all__ = ["Weights", "lerp_", "merge_weights"]

Weights: TypeAlias = dict[str, Tensor]
"""Tensors by the names of the parameters and buffers."""


@torch.no_grad()
def lerp_(average: Weights, weights: Mapping[str, Tensor], weight: float) -> None:
    r"""Moves an average towards weights in place: :math:`a \leftarrow a + w (x - a)`.

    Does not synchronize, unless the weights are on another device.

    Args:
        average: The average, changed in place; its dtypes are those of the computation.
        weights: Weights of the same names and shapes; other dtypes and devices are converted.
        weight: The weight :math:`w`, from 0 to 1. With 1 the result equals the weights to the bit.

    Example:
        >>> average = {"scale": torch.zeros(2)}
        >>> lerp_(average, {"scale": torch.tensor([1.0, 2.0])}, 0.5)
        >>> average["scale"].tolist()
        [0.5, 1.0]
    """
    kinds: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for name, tensor in average.items():
        kind, other = (tensor.device, tensor.dtype), weights[name]
        averages, others = kinds.setdefault(kind, ([], []))
        averages.append(tensor)
        others.append(other if (other.device, other.dtype) == kind else other.to(*kind))
    for averages, others in kinds.values():
        torch._foreach_lerp_(averages, others, weight)


@torch.no_grad()
def merge_weights(
    copies: Iterable[Mapping[str, Tensor]], coefficients: Sequence[float]
) -> dict[str, Tensor]:
    """Computes the weighted mean of several copies of the weights.

    Args:
        copies: Copies of the weights with the same names and shapes, at least one; an iterator
            needs not hold all of them in memory.
        coefficients: The weight of each copy; their sum is 1.

    Returns:
        New tensors with the dtypes of the last copy. Sums of floating-point tensors narrower than
        float32 are computed in float32. Integer tensors are those of the last copy.

    Raises:
        ValueError: If names differ, or there are not as many coefficients as copies.

    Example:
        >>> one, two = {"scale": torch.tensor([1.0])}, {"scale": torch.tensor([3.0])}
        >>> merge_weights([one, two], [0.25, 0.75])["scale"].tolist()
        [2.5]
    """
    if not math.isclose(math.fsum(coefficients), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"coefficients must have the sum 1, got {shown(math.fsum(coefficients))}; divide them "
            "by their sum"
        )
    sums: dict[str, Tensor] = {}
    last: Mapping[str, Tensor] = {}
    count = 0
    for copy in copies:
        if count and (other := sorted(copy.keys() ^ last.keys())):
            raise ValueError(
                f"all copies must have the same names, got {other[0]!r} only in some; merge "
                "checkpoints of one model"
            )
        if count < len(coefficients):
            _add(sums, copy, coefficients[count])
        last, count = copy, count + 1
    if count != len(coefficients):
        raise ValueError(
            f"coefficients must be one for each copy, got {len(coefficients)} for {count} copies; "
            "pass a list of the same length"
        )
    return {
        name: sums[name].to(value.dtype) if name in sums else value.clone()
        for name, value in last.items()
    }


def _add(sums: Weights, copy: Mapping[str, Tensor], coefficient: float) -> None:
    for name, value in copy.items():
        if name in sums:
            sums[name].add_(value.to(sums[name]), alpha=coefficient)
        elif value.is_floating_point() or value.is_complex():
            wide = torch.promote_types(value.dtype, torch.float32)
            sums[name] = value.to(wide) * coefficient
