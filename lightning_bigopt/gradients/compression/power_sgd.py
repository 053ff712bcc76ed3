"""PowerSGD: sends a low-rank approximation of each gradient."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_count
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.gradients.compression.collectives import Collectives
from lightning_bigopt.gradients.compression.compressor import (
    FeedbackCompressor,
    with_residual,
    without_scale,
)
from lightning_bigopt.gradients.compression.error_feedback import (
    RESIDUAL,
    ErrorFeedback,
)

__all__ = ["PowerSGD"]

_FACTOR = "factor"
_LEAST_COMPRESSION = 2  # torch's min_compression_rate


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class PowerSGD(FeedbackCompressor):
    r"""Sends a low-rank approximation of each gradient, with error feedback.

    The gradient of a tensor of two or more dimensions is a matrix of ``shape[0]`` rows. Process
    :math:`i` adds its residual :math:`R_i` to its gradient :math:`G_i`. One step of a power
    iteration from the factor :math:`Q` of the last update approximates the mean.

    .. math::
        M_i = G_i + R_i, \quad
        P = \operatorname{orth}\Bigl(\sum_i M_i Q\Bigr), \quad
        Q \leftarrow \frac1w \sum_i M_i^\top P, \quad
        G \leftarrow P Q^\top, \quad
        R_i \leftarrow M_i - P Q^\top

    A tensor is averaged without compression, as a bias is, unless both factors together have less
    than half as many elements. The algorithm is that of torch's ``powerSGD_hook``. Here the state
    belongs to parameters instead of DDP's buckets, which change after the first update of each fit:
    a resumed run continues exactly, and the first update can be compressed.

    Args:
        rank: Number of columns of the factors.
        start: Duration of training before the first compressed update.

    Raises:
        ValueError: If ``rank`` is not a positive integer, or ``start`` is not a duration.

    Example:
        >>> PowerSGD(rank=4, start="10%")
        PowerSGD(rank=4, start='10%')

    References:
        Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
        Optimization", NeurIPS 2019, Alg. 1 and 2.
    """

    rank: int = 1
    start: DurationLike = 0

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        Duration.parse(self.start, name="start")

    def state_shapes(self, gradient: Tensor) -> dict[str, torch.Size]:
        """Returns the shapes of the residual and of the right factor."""
        rows, columns = _matrix(gradient).shape
        factor = torch.Size((columns, min(self.rank, rows, columns)))
        return {**super().state_shapes(gradient), _FACTOR: factor}

    def initial_entry(self, key: str, name: str, shape: torch.Size) -> Tensor:
        """Returns a residual of zeros, or a random factor that is equal on all processes."""
        if key != _FACTOR:
            return super().initial_entry(key, name, shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(*shape, generator=generator)

    @torch.no_grad()
    def average_(
        self,
        gradients: Mapping[str, Tensor],
        feedback: ErrorFeedback,
        collectives: Collectives,
        scale: Tensor | float = 1.0,
    ) -> None:
        """Replaces the gradients by the low-rank approximation of their mean."""
        low_rank = {name: g for name, g in gradients.items() if self._is_compressed(g)}
        dense = [gradient for name, gradient in gradients.items() if name not in low_rank]
        if dense:
            # The division comes first, as in torch, so that the sum does not overflow.
            flat = collectives.sum_(torch.cat([g.flatten() for g in dense]) / collectives.size)
            _copy_parts_(dense, flat)
        if not low_rank:
            return
        totals, factors = [], []
        for name, gradient in low_rank.items():
            state = self._state(name, gradient, feedback)
            totals.append(_matrix(with_residual(gradient, state, scale)))
            factors.append(state[_FACTOR])
        # Not normalized factors have the scale of the gradient, which may be far from 1.
        left = [m @ _orthogonal(q) for m, q in zip(totals, factors, strict=True)]
        _sum_parts_(left, collectives)
        left = [_orthogonal(p) for p in left]
        right = [m.T @ p / collectives.size for m, p in zip(totals, left, strict=True)]
        flat = _sum_parts_(right, collectives)
        finite = flat.isfinite().all()
        for (name, gradient), m, p, q in zip(low_rank.items(), totals, left, right, strict=True):
            mean = p @ q.T
            gradient.copy_(mean.view_as(gradient))
            residual = without_scale(m.sub_(mean), scale).view_as(gradient)
            state = {RESIDUAL: residual, _FACTOR: without_scale(q, scale)}
            feedback.propose(name, state, finite)

    def _is_compressed(self, gradient: Tensor) -> bool:
        if gradient.ndim < 2 or not gradient.numel():
            return False
        rows, columns = _matrix(gradient).shape
        rank = min(self.rank, rows, columns)
        return (rows + columns) * rank * _LEAST_COMPRESSION < rows * columns


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Returns an orthonormal basis; for columns of zeros some basis, and NaN for NaN."""
    basis: Tensor = torch.linalg.qr(matrix)[0]
    return basis


def _sum_parts_(parts: list[Tensor], collectives: Collectives) -> Tensor:
    """Sums all parts over the processes in one collective; returns them as one vector."""
    flat = collectives.sum_(torch.cat([part.flatten() for part in parts]))
    _copy_parts_(parts, flat)
    return flat


def _copy_parts_(parts: list[Tensor], flat: Tensor) -> None:
    begin = 0
    for part in parts:
        part.copy_(flat[begin : begin + part.numel()].view_as(part))
        begin += part.numel()
