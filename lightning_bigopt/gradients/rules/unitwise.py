"""A limit for each unit of a layer, relative to the unit's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from lightning_bigopt.gradients.kernels import local_norms
from lightning_bigopt.gradients.patterns import as_patterns, check_all_match, first_match
from lightning_bigopt.gradients.rules.base import (
    ClipContext,
    ClipDecision,
    ClippingRule,
    RuleState,
    check_positive,
)
from lightning_bigopt.gradients.sharding import (
    ShardGroups,
    local_part,
    reduce_norms,
    settle_,
    shard_groups,
)

__all__ = ["AGC"]

# Up to this size equal shapes are copied together: a call costs more than the copy.
_SMALL = 1 << 13
_FEW = 4


@dataclass(frozen=True)
class AGC(ClippingRule):
    r"""Adaptive gradient clipping: limits each unit's gradient relative to the unit's weights.

    .. math::
        G_i \leftarrow G_i \cdot \min\Bigl(1,\;
            \lambda \frac{\max(\lVert W_i \rVert, \epsilon)}{\max(\lVert G_i \rVert, 10^{-6})}\Bigr)

    A unit is an index of the first dimension; tensors of one dimension or none are one unit. The
    authors leave out the last layer: name it in ``exclude``. A unit whose gradient is not finite
    is left alone. Needs no host synchronisation. Keeps no state.

    Args:
        clip_factor: :math:`\lambda`, positive.
        eps: :math:`\epsilon`, the least norm of weights, for units that start at zero.
        exclude: Patterns of the names of parameters left alone (``"head.*"``).

    Raises:
        ValueError: If a number is not positive and finite; when it is used, if a pattern matches
            nothing or parameters are flat shards (FSDP1).

    Example:
        >>> AGC(clip_factor=0.01, exclude="head.*")
        AGC(clip_factor=0.01, eps=0.001, exclude=('head.*',))

    References:
        Brock et al., "High-performance large-scale image recognition without normalization",
        ICML 2021, Sec. 4.1.
    """

    clip_factor: float = 0.01
    _: KW_ONLY
    eps: float = 1e-3
    exclude: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        check_positive("clip_factor", self.clip_factor)
        check_positive("eps", self.eps)
        object.__setattr__(self, "exclude", as_patterns(self.exclude))

    @property
    def measures(self) -> None:
        """It takes norms of units itself."""
        return

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """Writes unit by unit; does not synchronise."""
        if context.process_group is not None:
            raise ValueError(
                "the strategy must keep the parameters' shapes for AGC, got flat shards (FSDP1); "
                "use FSDP2 (ModelParallelStrategy) or a rule on norms"
            )
        patterns = as_patterns(self.exclude)
        check_all_match(context.known_names(), patterns)
        named = context.with_gradients()
        matches = first_match(tuple(name for name, _ in named), patterns)
        chosen = [p for (_, p), match in zip(named, matches, strict=True) if match is None]
        return ClipDecision(write=lambda: clip_units_(chosen, self.clip_factor, self.eps))


@torch.no_grad()
def clip_units_(parameters: Sequence[nn.Parameter], clip_factor: float, eps: float) -> None:
    """Limits the gradient of every unit in place with few kernels. Does not synchronise."""
    devices: dict[torch.device, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.numel():
            devices.setdefault(local_part(parameter).device, []).append(parameter)
    for members in devices.values():
        gradients = [local_part(settle_(parameter)) for parameter in members]
        weights = [local_part(parameter) for parameter in members]
        units = [1 if tensor.ndim < 2 else len(tensor) for tensor in weights]
        norms = _unit_norms([*weights, *gradients])
        norms = _over_processes(norms, members, units)
        of_weights, of_gradients = norms.chunk(2)
        limits = clip_factor * of_weights.clamp(min=eps)
        factors = torch.where(
            of_gradients.isfinite(), (limits / of_gradients.clamp(min=1e-6)).clamp(max=1.0), 1.0
        )
        each = torch.split(factors, units)
        if factors.device.type == "cpu":  # whose numbers can be read for nothing
            idle = factors == 1
            if bool(idle.all()):
                continue
            kept = [i for i, part in enumerate(torch.split(idle, units)) if not bool(part.all())]
        else:
            kept = list(range(len(gradients)))
        scales = [_column(each[i], gradients[i]) for i in kept]
        torch._foreach_mul_([gradients[i] for i in kept], scales)


def _column(factors: Tensor, like: Tensor) -> Tensor:
    """One factor a unit, shaped to multiply the tensor in place."""
    if like.ndim < 2:
        return factors.view(())
    return factors.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


def _unit_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The float32 norms of all units of all tensors, one after the other."""
    found: list[Tensor | None] = [None] * len(tensors)
    whole: list[int] = []
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.ndim < 2:
            whole.append(index)
        elif tensor.numel() > _SMALL:
            found[index] = torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=_sums(tensor))
        else:
            alike.setdefault((tensor.shape, tensor.dtype), []).append(index)
    for indices in alike.values():
        members = [tensors[index] for index in indices]
        if len(members) < _FEW:
            stacked = [
                torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=_sums(t)) for t in members
            ]
        else:
            block = torch.stack(members).flatten(2)
            stacked = list(torch.linalg.vector_norm(block, dim=2, dtype=_sums(block)).unbind())
        for index, norms in zip(indices, stacked, strict=True):
            found[index] = norms
    if whole:
        singles = local_norms([tensors[index] for index in whole], 2.0).float()
        for index, norm in zip(whole, torch.split(singles, 1), strict=True):
            found[index] = norm
    return torch.cat([norms.float() for norms in found if norms is not None])


def _sums(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _over_processes(
    norms: Tensor, parameters: Sequence[nn.Parameter], units: Sequence[int]
) -> Tensor:
    """Puts together the norms of units that are spread over processes."""
    spread = [_unit_groups(parameter) for parameter in parameters]
    if not any(spread):
        return norms
    parts = torch.split(norms.to(torch.float64), [*units, *units])
    return torch.cat(reduce_norms(parts, [*spread, *spread], 2.0)).float()


def _unit_groups(parameter: nn.Parameter) -> ShardGroups:
    """The groups over which single units are spread; shards of dimension 0 hold whole ones."""
    return shard_groups(parameter, beyond_dim=0 if parameter.ndim > 1 else None)
