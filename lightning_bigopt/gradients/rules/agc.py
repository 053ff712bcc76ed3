"""AGC: limits the gradient of each unit relative to the weights of the unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_positive
from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.norm_kernels import accumulation_dtype, local_norms
from lightning_bigopt.gradients.rules.clipping_rule import ClipContext, ClippingRule, RuleState
from lightning_bigopt.gradients.sharding import (
    ShardGroups,
    redistribute_like_parameter_,
    reduce_norms,
    shard_groups,
    to_local,
)
from lightning_bigopt.parameters import as_patterns, first_match

__all__ = ["AGC"]

# Up to this size tensors of one shape are stacked: launching a kernel takes longer than the copy.
_SMALL = 1 << 13


@explain_arguments
@dataclass(frozen=True)
class AGC(ClippingRule):
    r"""Adaptive gradient clipping: limits each unit's gradient relative to the unit's weights.

    .. math::
        G_i \leftarrow G_i \cdot \min\Bigl(1,\;
            \lambda \frac{\max(\lVert W_i \rVert, \epsilon)}{\max(\lVert G_i \rVert, 10^{-6})}\Bigr)

    A unit is an index of the first dimension; a tensor with at most one dimension is one unit. The
    paper excludes the last layer: name it in ``exclude``. Units with non-finite gradients are not
    clipped. Needs no host synchronization. Has no state.

    Args:
        clip_factor: :math:`\lambda`, positive.
        eps: :math:`\epsilon`, lower bound of the norm of weights, for units initialized to zero.
        exclude: Patterns of the names of parameters that are not clipped, such as ``"head.*"``.

    Raises:
        ValueError: If a number is not positive and finite; at the first update if a pattern matches
            no parameter, or parameters are flat shards (FSDP1).

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
        object.__setattr__(self, "exclude", as_patterns(self.exclude, name="exclude"))

    @property
    def norm_order(self) -> None:
        """None: the rule computes the norms of units itself."""
        return

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """Decides to write the gradients unit by unit; does not synchronize."""
        if context.process_group is not None:
            raise ValueError(
                "the strategy must keep the parameters' shapes for AGC, got flat shards (FSDP1); "
                "use FSDP2 (ModelParallelStrategy) or a rule on norms"
            )
        patterns = as_patterns(self.exclude)
        context.check_patterns(patterns)
        named = context.with_gradients()
        matches = first_match(tuple(name for name, _ in named), patterns)
        chosen = [p for (_, p), match in zip(named, matches, strict=True) if match is None]
        factor, eps = float(self.clip_factor), float(self.eps)
        return ClipDecision(write_gradients=lambda: clip_units_(chosen, factor, eps))


@torch.no_grad()
def clip_units_(parameters: Sequence[nn.Parameter], clip_factor: float, eps: float) -> None:
    """Limits the gradient of every unit in place, with few kernels. Does not synchronize."""
    weights = [to_local(parameter) for parameter in parameters]
    gradients = [to_local(redistribute_like_parameter_(parameter)) for parameter in parameters]
    devices: dict[torch.device, list[int]] = {}
    for index, weight in enumerate(weights):
        devices.setdefault(weight.device, []).append(index)
    for members in devices.values():
        runs = _runs(members, weights)
        ordered = [index for run in runs for index in run]
        spread = [_unit_groups(parameters[index]) for index in ordered]
        norms = _norms_of_runs(runs, weights, gradients, wide=not weights[members[0]].is_cpu)
        if norms.is_cpu and not math.isfinite(norms.sum()):
            # The squares may have overflowed in float32. On the CPU float64 is used only then, as
            # it is slower; on a device this check would synchronize.
            norms = _norms_of_runs(runs, weights, gradients, wide=True)
        if any(spread):
            norms = _reduce_over_processes(norms, spread, [weights[index] for index in ordered])
        of_weights, of_gradients = norms
        limits = of_weights.clamp(min=eps).mul_(clip_factor)
        factors = limits.div_(of_gradients.clamp(min=1e-6)).clamp_(max=1.0)
        factors = torch.where(of_gradients < math.inf, factors, 1.0)  # False for NaN, too
        lengths = [len(run) for run in runs]
        _scale_units_([gradients[index] for index in ordered], factors.float(), lengths)


def _runs(members: Sequence[int], tensors: Sequence[Tensor]) -> list[list[int]]:
    """Groups indices by how norms are computed: no units, equal small shapes, single tensors."""
    whole: list[int] = []
    alike: dict[torch.Size, list[int]] = {}
    runs: list[list[int]] = []
    for index in members:
        tensor = tensors[index]
        if tensor.ndim < 2:
            whole.append(index)
        elif tensor.numel() > _SMALL:
            runs.append([index])
        else:
            alike.setdefault(tensor.shape, []).append(index)
    runs += alike.values()
    return [whole, *runs] if whole else runs


def _norms_of_runs(
    runs: Sequence[Sequence[int]],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    wide: bool,
) -> Tensor:
    """Computes the norms of all units, run by run: shape (2, n), of weights and of gradients."""
    of_weights, of_gradients = [], []
    for run in runs:
        both = [*[weights[index] for index in run], *[gradients[index] for index in run]]
        if both[0].ndim < 2:
            halves: Sequence[Tensor] = local_norms(both, 2.0).tensor_split(2)
        elif len(run) == 1:
            halves = [_unit_norms(tensor, wide=wide) for tensor in both]
        else:
            halves = _unit_norms(torch.cat(both), wide=wide).tensor_split(2)
        of_weights.append(halves[0])
        of_gradients.append(halves[1])
    return torch.cat([*of_weights, *of_gradients]).view(2, -1)


def _unit_norms(block: Tensor, *, wide: bool) -> Tensor:
    """Computes the norm of each index of the first dimension; ``wide`` if squares may overflow."""
    into = torch.promote_types(
        block.dtype, accumulation_dtype(block.device) if wide else torch.float32
    )
    norms: Tensor = torch.linalg.vector_norm(block.flatten(1), dim=1, dtype=into)
    return norms


def _scale_units_(gradients: Sequence[Tensor], factors: Tensor, lengths: Sequence[int]) -> None:
    """Multiplies every unit by its factor."""
    is_readable = factors.is_cpu  # reading a device would synchronize
    if is_readable and (factors == 1).all():
        return
    starts = accumulate(lengths, initial=0)
    units = [n * math.prod(_column(gradients[at])) for n, at in zip(lengths, starts, strict=False)]
    chosen: list[Tensor] = []
    columns: list[Tensor] = []
    start = 0
    for length, part in zip(lengths, torch.split(factors, units), strict=True):
        run = gradients[start : start + length]
        start += length
        if is_readable and run[0].numel() > _SMALL and (part == 1).all():
            continue
        chosen += run
        columns += part.view(length, *_column(run[0])).unbind()
    if chosen:
        torch._foreach_mul_(chosen, columns)


def _column(tensor: Tensor) -> tuple[int, ...]:
    """Returns the shape of factors by unit that broadcasts over the tensor."""
    return () if tensor.ndim < 2 else (len(tensor), *(1,) * (tensor.ndim - 1))


def _reduce_over_processes(
    norms: Tensor, spread: Sequence[ShardGroups], weights: Sequence[Tensor]
) -> Tensor:
    """Combines the norms of units that are sharded over processes; shape (2, n)."""
    units = [1 if weight.ndim < 2 else len(weight) for weight in weights]
    wide = norms.to(accumulation_dtype(norms.device))
    parts = torch.split(wide.flatten(), [*units, *units])
    return torch.cat(reduce_norms(parts, [*spread, *spread], 2.0)).view(2, -1)


def _unit_groups(parameter: nn.Parameter) -> ShardGroups:
    """Returns the groups over which units are sharded; shards of dimension 0 have full units."""
    return shard_groups(parameter, beyond_dim=0 if parameter.ndim > 1 else None)
