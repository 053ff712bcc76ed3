"""Limits on the update itself, put on once the optimizer has made it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, _foreach_div, _foreach_sub, nn
from torch.optim import Optimizer

from lightning_bigopt.gradients.kernels import local_norms
from lightning_bigopt.gradients.rules.base import (
    ClipContext,
    ClipDecision,
    ClippingRule,
    RuleState,
    check_positive,
)
from lightning_bigopt.gradients.sharding import local_part, reduce_norms, settle_, shard_groups

__all__ = ["MaxUpdateRatio", "UpdateClip", "UpdateRule"]

# Temporary tensors are made for so many elements at a time: on a CPU as many as a cache holds.
_CHUNK = {"cpu": 1 << 20}
_CHUNK_ELSEWHERE = 1 << 24
_copies: WeakKeyDictionary[Optimizer, dict[int, Tensor]] = WeakKeyDictionary()


class UpdateRule(ClippingRule):
    r"""Shortens the update of a parameter: :math:`w \leftarrow w_\text{old} + f\,\Delta w`.

    Torch has one learning rate for a parameter group, and a smaller gradient is not a smaller
    step for an optimizer that normalizes it. So the weights are copied before the step (memory of
    one more set of weights) and the step is shortened behind it: the same as a learning rate of
    its own for every tensor, decoupled weight decay included.

    Attributes:
        sparse: What becomes of sparse gradients.
    """

    sparse: ClassVar[Literal["refused", "allowed"]] = "allowed"

    @property
    def measures(self) -> None:
        """It reads no gradient norms."""
        return

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """Copies the weights now; the correction follows the step. Does not synchronize."""
        optimizer = context.optimizer
        name = type(self).__name__
        if optimizer is None:
            raise ValueError(
                f"optimizer must be given to {name}, got None; it limits what the optimizer does"
            )
        if context.process_group is not None:
            raise ValueError(
                f"the strategy must keep the parameters' shapes for {name}, got flat shards "
                "(FSDP1); use FSDP2 (ModelParallelStrategy) or a rule on norms"
            )
        self.check(optimizer)
        parameters = [parameter for _, parameter in context.with_gradients(sparse=self.sparse)]
        before = _copy(optimizer, parameters)
        return ClipDecision(after_step=lambda: self._shorten_(optimizer, parameters, before))

    def check(self, optimizer: Optimizer) -> None:
        """Refuses an optimizer whose parameters are not the iterate that it updates.

        Raises:
            ValueError: If it is one.
        """
        if any("train_mode" in group for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer must keep its iterate in the parameters for {type(self).__name__}, got "
                f"{type(optimizer).__name__}, which averages iterates; use a rule on norms"
            )

    @abstractmethod
    def factors(
        self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], before: Sequence[Tensor]
    ) -> Tensor:
        """Shape (n,): by how much each update is to be shortened; read after the step."""

    @torch.no_grad()
    def _shorten_(
        self, optimizer: Optimizer, parameters: list[nn.Parameter], before: list[Tensor]
    ) -> None:
        if not parameters:
            return
        found = self.factors(optimizer, parameters, before).clamp(max=1.0)
        back = torch.where(found.isfinite(), 1.0 - found, 0.0).float()
        amounts = back.tolist() if back.device.type == "cpu" else None  # read for nothing
        shares = back.unbind()
        for indices in _chunks(before):
            chosen = [i for i in indices if amounts is None or amounts[i] > 0]
            if not chosen:
                continue
            new = [local_part(parameters[i]) for i in chosen]
            # In float32 at least: two roundings to bfloat16 would be as large as the step.
            moved = _at_least_float32(new)
            steps = _foreach_sub(_at_least_float32([before[i] for i in chosen]), moved)
            torch._foreach_mul_(steps, [shares[i].to(new[0].device) for i in chosen])
            torch._foreach_add_(steps, moved)
            torch._foreach_copy_(new, steps)


def _at_least_float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


@dataclass(frozen=True)
class UpdateClip(UpdateRule):
    r"""Limits the root mean square of an Adam update, as StableAdamW and Adafactor do.

    .. math::
        \eta_t = \eta / \max(1, \mathrm{RMS}_t / d), \qquad
        \mathrm{RMS}_t = \sqrt{\operatorname{mean}\bigl(g^2 / \max(\hat v, \epsilon^2)\bigr)}

    for each tensor, with the second moment :math:`\hat v` that already holds :math:`g`, its bias
    corrected. It acts when a gradient is larger than the second moment remembers, where Adam would
    take too long a step. Costs a copy of the weights and one more look at gradients and moments;
    needs no host synchronization. Keeps no state.

    Args:
        max_rms: The limit :math:`d`, positive.

    Raises:
        ValueError: If ``max_rms`` is not positive and finite; when it is used, if the optimizer
            is not one of the Adam family (``betas``, ``eps`` and ``exp_avg_sq``).

    Example:
        >>> UpdateClip()
        UpdateClip(max_rms=1.0)

    References:
        Wortsman et al., "Stable and low-precision training for large-scale vision-language
        models", NeurIPS 2023, Algorithm 2. Shazeer & Stern, "Adafactor", ICML 2018, Sec. 6.
    """

    sparse = "refused"  # it reads them

    max_rms: float = 1.0

    def __post_init__(self) -> None:
        check_positive("max_rms", self.max_rms)

    def check(self, optimizer: Optimizer) -> None:
        """Refuses an optimizer that is not of the Adam family."""
        super().check(optimizer)
        begun = next(filter(None, optimizer.state.values()), None)
        if begun is not None:
            _second_moment(begun, optimizer)
        if not all({"betas", "eps"} <= group.keys() for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer must be of the Adam family for UpdateClip, got "
                f"{type(optimizer).__name__}; use MaxUpdateRatio"
            )

    def factors(
        self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], before: Sequence[Tensor]
    ) -> Tensor:
        """``max_rms`` over the update's root mean square."""
        settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        norms = []
        for indices in _chunks(before):
            chosen = [parameters[index] for index in indices]
            norms.append(local_norms(_ratios(optimizer, chosen, settings), 2.0))
        whole = _whole(torch.cat(norms), parameters)
        sizes = [p.numel() * (2 if p.is_complex() else 1) for p in parameters]
        roots = [self.max_rms * max(size, 1) ** 0.5 for size in sizes]
        return torch.stack([root / norm for root, norm in zip(roots, whole.unbind(), strict=True)])


def _ratios(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], settings: dict[int, dict[str, Any]]
) -> list[Tensor]:
    """Gradients over the roots of their second moments; empty where there is no moment yet."""
    ratios = [torch.empty(0, device=local_part(parameter).device) for parameter in parameters]
    kept = [i for i, p in enumerate(parameters) if optimizer.state.get(p)]
    if not kept:
        return ratios
    states = [optimizer.state[parameters[i]] for i in kept]
    groups = [settings[id(parameters[i])] for i in kept]
    moments = [_numbers(_second_moment(state, optimizer)).float() for state in states]
    scales = _divided(moments, [_correction(s, g) for s, g in zip(states, groups, strict=True)])
    torch._foreach_clamp_min_(scales, [group["eps"] ** 2 for group in groups])
    torch._foreach_sqrt_(scales)
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(scales, [_numbers(settle_(parameters[i])) for i in kept])
    for index, scale in zip(kept, scales, strict=True):
        ratios[index] = scale
    return ratios


def _second_moment(state: dict[str, Any], optimizer: Optimizer) -> Tensor:
    """What the optimizer divides by, squared and not yet corrected."""
    if not {"exp_avg_sq", "step"} <= state.keys():
        raise ValueError(
            "optimizer must keep exp_avg_sq and step for UpdateClip, got "
            f"{type(optimizer).__name__}, which keeps {', '.join(state)}; use MaxUpdateRatio"
        )
    moment: Tensor = state.get("max_exp_avg_sq", state["exp_avg_sq"])  # the first with amsgrad
    return moment


def _numbers(tensor: Tensor) -> Tensor:
    """The local numbers of a tensor, real and imaginary parts apart, as the optimizer sees them."""
    local = local_part(tensor)
    return torch.view_as_real(local) if local.is_complex() else local


def _correction(state: dict[str, Any], group: dict[str, Any]) -> float | Tensor:
    step = state["step"]
    if isinstance(step, Tensor) and step.device.type == "cpu":
        step = step.item()  # read for nothing
    correction: float | Tensor = 1.0 - group["betas"][1] ** step
    return correction


def _divided(tensors: list[Tensor], divisors: list[float | Tensor]) -> list[Tensor]:
    numbers = [divisor for divisor in divisors if isinstance(divisor, float)]
    if len(numbers) == len(tensors):
        return list(_foreach_div(tensors, numbers))
    on_device = [
        d.to(t.device) if isinstance(d, Tensor) else torch.full((), d, device=t.device)
        for t, d in zip(tensors, divisors, strict=True)
    ]
    return list(_foreach_div(tensors, on_device))


def _whole(norms: Tensor, parameters: Sequence[nn.Parameter], *, times: int = 1) -> Tensor:
    """Norms of whole tensors from those of local parts, ``times`` over."""
    groups = [shard_groups(parameter) for parameter in parameters] * times
    return torch.cat(reduce_norms(torch.split(norms, 1), groups, 2.0))


@dataclass(frozen=True)
class MaxUpdateRatio(UpdateRule):
    r"""Limits each tensor's update relative to its weights.

    .. math:: \lVert \Delta w \rVert \le r \max(\lVert w \rVert, \epsilon)

    Some texts call it learning-rate clipping. Works with every optimizer that keeps its iterate
    in the parameters. Costs a copy of the weights and one pass over both; needs no host
    synchronization. Keeps no state.

    Args:
        ratio: The limit :math:`r`, positive.
        eps: :math:`\epsilon`, the least norm of weights, for tensors that start at zero.

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
        """The longest update allowed over the one made."""
        updates = []
        for indices in _chunks(before):
            new = [local_part(parameters[index]) for index in indices]
            updates.append(local_norms(_foreach_sub(new, [before[i] for i in indices]), 2.0))
        both = torch.cat([local_norms(before, 2.0), *updates])
        weights, moved = _whole(both, parameters, times=2).chunk(2)
        return self.ratio * weights.clamp(min=self.eps) / moved


def _copy(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """A copy of the weights, in memory that is kept from one update to the next."""
    kept = _copies.setdefault(optimizer, {})
    weights = [local_part(parameter) for parameter in parameters]
    copies = []
    for parameter, weight in zip(parameters, weights, strict=True):
        found = kept.get(id(parameter))
        if found is None or (found.shape, found.dtype, found.device) != (
            weight.shape,
            weight.dtype,
            weight.device,
        ):
            found = kept[id(parameter)] = torch.empty_like(weight)
        copies.append(found)
    if copies:
        with torch.no_grad():
            torch._foreach_copy_(copies, weights)
    return copies


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices, as many at a time as temporary memory allows."""
    chunk: list[int] = []
    size = 0
    for index, tensor in enumerate(tensors):
        limit = _CHUNK.get(tensor.device.type, _CHUNK_ELSEWHERE)
        if chunk and size + tensor.numel() > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append(index)
        size += tensor.numel()
    if chunk:
        yield chunk
