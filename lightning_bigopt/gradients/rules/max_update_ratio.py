"""MaxUpdateRatio: limits the update of each tensor relative to its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, _foreach_sub, nn
from torch.optim import Optimizer

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_positive
from lightning_bigopt.gradients.norm_kernels import local_norms
from lightning_bigopt.gradients.rules.update_rule import UpdateRule, chunks, whole_norms
from lightning_bigopt.gradients.sharding import to_local

__all__ = ["MaxUpdateRatio"]


@explain_arguments
@dataclass(frozen=True)
class MaxUpdateRatio(UpdateRule):
    r"""Limits the update of each tensor relative to its weights.

    .. math:: \lVert \Delta w \rVert \le r \max(\lVert w \rVert, \epsilon)

    Also called learning-rate clipping. Works with every optimizer that stores its iterate in the
    parameters. Costs a copy of the weights and one pass over both; needs no host synchronization.
    Has no state.

    Args:
        ratio: The limit :math:`r`, positive.
        eps: :math:`\epsilon`, lower bound of the norm of weights, for tensors initialized to zero.

    Raises:
        ValueError: If a number is not positive and finite.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> weight.grad = torch.tensor([10.0, 0.0])
        >>> from lightning_bigopt.gradients import clip_gradients_
        >>> _ = clip_gradients_([weight], MaxUpdateRatio(ratio=0.1), optimizer=optimizer)
        >>> optimizer.step()
        >>> weight.data
        tensor([2.5000, 4.0000])
    """

    ratio: float = 0.01
    _: KW_ONLY
    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_positive("ratio", self.ratio)
        check_positive("eps", self.eps)

    def factors(
        self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], before: Sequence[Tensor]
    ) -> Tensor:
        """Returns the largest allowed norm of each update, divided by the norm of the update."""
        updates = []
        for indices in chunks(before):
            new = [to_local(parameters[index]) for index in indices]
            updates.append(local_norms(_foreach_sub(new, [before[i] for i in indices]), 2.0))
        both = torch.cat([local_norms(before, 2.0), *updates])
        weights, moved = whole_norms(both, parameters, times=2).chunk(2)
        return float(self.ratio) * weights.clamp(min=float(self.eps)) / moved
