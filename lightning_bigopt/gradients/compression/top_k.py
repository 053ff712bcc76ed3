"""TopK: sends the largest elements of each gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_between, check_positive
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.gradients.compression.collectives import Collectives
from lightning_bigopt.gradients.compression.compressor import (
    FeedbackCompressor,
    with_residual,
    without_scale,
)
from lightning_bigopt.gradients.compression.error_feedback import RESIDUAL, ErrorFeedback

__all__ = ["TopK"]

_LARGEST_INDEX = 2**31 - 1


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class TopK(FeedbackCompressor):
    r"""Sends the largest elements of each gradient, with error feedback.

    Process :math:`i` adds the residual :math:`r_i` of a tensor to its gradient :math:`g_i`, sends
    the :math:`k = \lceil \mathrm{keep} \cdot n \rceil` elements of the largest magnitude with their
    positions, and keeps the rest. The update uses the mean over the :math:`w` processes.

    .. math::
        x_i = g_i + r_i, \quad
        g \leftarrow \frac1w \sum_i \operatorname{top}_k(x_i), \quad
        r_i \leftarrow x_i - \operatorname{top}_k(x_i)

    The processes gather values and 4-byte positions: for float32, each sends
    :math:`8 k (w - 1)` bytes, against :math:`8 n (w - 1) / w` for the whole gradient. More than
    :math:`1 / \mathrm{keep}` processes therefore save nothing. On one process the same formula acts
    on the gradient, and nothing is sent.

    Args:
        keep: Fraction of the elements of each tensor that is sent, in (0, 1]; at least one.
        start: Duration of training before the first compressed update.

    Raises:
        ValueError: If ``keep`` is out of its range, or ``start`` is not a duration.

    Example:
        >>> gradient = torch.tensor([3.0, -1.0, 2.0, 0.5])
        >>> feedback = ErrorFeedback()
        >>> TopK(keep=0.25).average_({"weight": gradient}, feedback, Collectives(None))
        >>> gradient
        tensor([3., 0., 0., 0.])
        >>> feedback.commit(["weight"])
        >>> feedback.states["weight"]["residual"]
        tensor([ 0.0000, -1.0000,  2.0000,  0.5000])

    References:
        Stich et al., "Sparsified SGD with Memory", NeurIPS 2018, Alg. 1. Lin et al., "Deep Gradient
        Compression", ICLR 2018; its momentum correction, local clipping and warm-up are not
        included.
    """

    keep: float = 0.01
    start: DurationLike = 0

    def __post_init__(self) -> None:
        check_positive("keep", self.keep, hint="write 0.01 to send 1 % of the elements")
        if self.keep != 1:
            check_between("keep", self.keep, 0, 1)
        Duration.parse(self.start, name="start")

    @torch.no_grad()
    def average_(
        self,
        gradients: Mapping[str, Tensor],
        feedback: ErrorFeedback,
        collectives: Collectives,
        scale: Tensor | float = 1.0,
    ) -> None:
        """Replaces the gradients by the mean of the largest elements of all processes."""
        totals, values, positions, sums, offset = [], [], [], {}, 0
        for name, gradient in gradients.items():
            total = with_residual(gradient, self._state(name, gradient, feedback), scale).flatten()
            count = max(1, math.ceil(self.keep * total.numel())) if total.numel() else 0
            # NaN counts as the largest, so that every process receives it.
            largest = total.abs().topk(count, sorted=False).indices
            values.append(total[largest].to(gradient.dtype))
            positions.append(largest + offset)
            total[largest] -= values[-1].to(total.dtype)  # also what the dtype rounds off
            totals.append(total)
            sums[name] = (offset, gradient)
            offset += total.numel()
        if not totals:
            return
        small = torch.int32 if offset <= _LARGEST_INDEX else torch.int64
        all_values = collectives.gather(torch.cat(values))
        all_positions = collectives.gather(torch.cat(positions).to(small))
        mean = torch.zeros(offset, dtype=totals[0].dtype, device=totals[0].device)
        # One process after the other: the positions of one differ, so that the sums do not depend
        # on the order in which a GPU adds, and are equal on all processes.
        for part, where in zip(all_values, all_positions, strict=True):
            mean.index_add_(0, where, part.to(mean.dtype))
        mean /= collectives.size
        finite = torch.stack(all_values).isfinite().all()
        for (name, (begin, gradient)), total in zip(sums.items(), totals, strict=True):
            gradient.copy_(mean[begin : begin + gradient.numel()].view_as(gradient))
            residual = without_scale(total, scale).view_as(gradient)
            feedback.propose(name, {RESIDUAL: residual}, finite)
