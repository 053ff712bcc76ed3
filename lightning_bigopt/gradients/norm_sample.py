"""A bounded sample of the gradient norms of a run, spread evenly, on the host or on a device."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NormSample", "Repetition", "repetition"]

_KEPT = 512
# Stands for a non-finite norm: norms are never negative, and a NaN must not enter a checkpoint.
_NOT_FINITE = -1.0
_SAME = 1e-4  # relative difference of two norms that count as equal
_ADDED = 1e-6  # by clip_grad_norm_ to the norm that it divides by
_LEAST_REPEATED = 20
_LEAST_SHARE = 0.2
_LEAST_VARIATION = 0.01


class NormSample:
    """Keeps the total norm and the norm of the last tensor of every ``stride``-th update.

    When 512 are kept, the stride doubles.

    Example:
        >>> sample = NormSample()
        >>> for norm in (3.0, float("nan"), 4.0):
        ...     sample.add(norm, norm / 2)
        >>> sample.finite()
        [(3.0, 1.5), (4.0, 2.0)]
    """

    def __init__(self) -> None:
        self._rows: list[tuple[float, float]] | Tensor = []
        self._stride = 1
        self._seen = 0

    @property
    def is_on_host(self) -> bool:
        """Whether :meth:`add` may be used."""
        return isinstance(self._rows, list)

    def add(self, norm: float, last: float) -> None:
        """Adds the norms of one update, as numbers."""
        assert isinstance(self._rows, list)  # the caller checks is_on_host
        if self._seen % self._stride == 0:
            row = (norm, last) if math.isfinite(norm) else (_NOT_FINITE, _NOT_FINITE)
            self._rows.append(row)
            if len(self._rows) > _KEPT:
                self._rows, self._stride = self._rows[::2], self._stride * 2
        self._seen += 1

    def extend(self, rows: Tensor) -> None:
        """Adds the norms of several updates, of shape ``(n, 2)``. Does not synchronize."""
        is_finite = rows.select(1, 0).isfinite().unsqueeze(1)
        marked = torch.where(is_finite, rows, _NOT_FINITE)
        first = -self._seen % self._stride
        self._seen += len(marked)
        chosen = marked[first :: self._stride]
        kept = torch.cat([torch.as_tensor(self._rows).to(chosen).reshape(-1, 2), chosen])
        while len(kept) > _KEPT:
            kept, self._stride = kept[::2], self._stride * 2
        self._rows = kept

    def _as_numbers(self) -> list[tuple[float, float]]:
        if isinstance(self._rows, list):
            return self._rows
        return [(norm, last) for norm, last in self._rows.tolist()]

    def finite(self) -> list[tuple[float, float]]:
        """Returns pairs of total norm and norm of the last tensor. Synchronizes."""
        return [row for row in self._as_numbers() if row[0] >= 0]

    def state_dict(self) -> dict[str, list[float] | int]:
        """Returns the kept norms as plain numbers. Synchronizes."""
        rows = self._as_numbers()
        return {
            "norms": [norm for norm, _ in rows],
            "last_tensors": [last for _, last in rows],
            "stride": self._stride,
            "seen": self._seen,
        }

    def load_state_dict(self, state: dict[str, list[float] | int]) -> None:
        """Restores the kept norms."""
        norms = state["norms"]
        # Without the norms of the last tensor, as in earlier versions, they count as constant.
        lasts = state.get("last_tensors", [0.0] * len(norms))  # type: ignore[arg-type]
        self._rows = list(zip(norms, lasts, strict=True))  # type: ignore[arg-type]
        self._stride, self._seen = int(state["stride"]), int(state["seen"])  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """A norm that many updates have in common.

    Args:
        norm: The norm.
        fraction: Fraction of the updates of the sample with this norm.
    """

    norm: float
    fraction: float


def repetition(rows: Sequence[tuple[float, float]]) -> Repetition | None:
    """Returns the norm that clipping before the measurement has given to many updates.

    Clipping by the total norm gives many gradients the same total norm, within 1e-4 and what
    ``clip_grad_norm_`` adds to the norm, while the norm of a single tensor still varies. Gradients
    that are constant themselves, as those of a linear loss or signs, have constant norms of each
    tensor. Norms that lie close together without an accumulation at one value are those of a smooth
    training.

    Args:
        rows: Pairs of total norm and norm of the last tensor.

    Returns:
        The most frequent norm, if at least 20 norms, and a fifth of all, are equal to it, the
        norms of the last tensor differ by more than 1 % among them, and norms next to it are ten
        times less frequent; None otherwise.

    Example:
        >>> varying = [(0.2 + index / 100, 0.1) for index in range(30)]
        >>> repetition([*varying, *((1.0, 0.3 + index / 100) for index in range(30))])
        Repetition(norm=1.0, fraction=0.5)
        >>> repetition([(1.0, 0.5)] * 60) is None
        True
    """
    ordered = sorted(rows)
    norms = [norm for norm, _ in ordered]
    best, count = 0, 0
    for start, norm in enumerate(norms):
        found = bisect_right(norms, norm + _difference(norm)) - start
        if found > count:
            best, count = start, found
    if count < max(_LEAST_REPEATED, _LEAST_SHARE * len(norms)) or norms[best] <= 0:
        return None
    lasts = [last for _, last in ordered[best : best + count]]
    low, high = norms[best], norms[best + count - 1]
    near = bisect_right(norms, high + 2 * _difference(high)) - bisect_left(
        norms, low - 2 * _difference(low)
    )
    is_accumulation = near - count <= count / 10
    if max(lasts) - min(lasts) <= _LEAST_VARIATION * max(lasts) or not is_accumulation:
        return None
    return Repetition(norm=norms[best + count // 2], fraction=count / len(norms))


def _difference(norm: float) -> float:
    """Returns the difference up to which another norm counts as equal."""
    return _SAME * norm + min(_ADDED, 0.01 * norm)
