"""The interface of rules that limit the update after the optimizer's step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, _foreach_sub, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.optimizer_step import installed_step_control
from lightning_bigopt.gradients.rules.clipping_rule import ClipContext, ClippingRule, RuleState
from lightning_bigopt.gradients.sharding import (
    reduce_norms,
    shard_groups,
    to_local,
)

__all__ = ["UpdateRule", "chunks", "whole_norms"]

# Largest number of elements in temporary tensors; on a CPU they should fit into the cache.
_CHUNK = {"cpu": 1 << 20}
_CHUNK_ELSEWHERE = 1 << 24
# By parameter, so that the copy of a parameter that is replaced is freed with it.
_copies: WeakKeyDictionary[Optimizer, WeakTensorKeyDictionary] = WeakKeyDictionary()


class UpdateRule(ClippingRule):
    r"""Scales down the update of a parameter: :math:`w \leftarrow w_\text{old} + f\,\Delta w`.

    Torch has one learning rate per parameter group, and for an optimizer that normalizes the
    gradient a smaller gradient does not give a smaller step. The weights are therefore copied
    before the step, which needs the memory of one more set of weights, and the step is scaled down
    afterwards. This is equivalent to a learning rate for each tensor, also on decoupled weight
    decay.

    Attributes:
        sparse: ``"refused"`` if sparse gradients raise, ``"allowed"`` otherwise.
    """

    sparse: ClassVar[Literal["refused", "allowed"]] = "allowed"

    @property
    def norm_order(self) -> None:
        """None: the rule reads no gradient norms."""
        return

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """Copies the weights and decides to correct the step. Does not synchronize."""
        optimizer = context.optimizer
        name = type(self).__name__
        if optimizer is None:
            raise ValueError(
                f"optimizer must be given to {name}, got None; pass the optimizer that is about "
                "to step"
            )
        if context.process_group is not None:
            raise ValueError(
                f"the strategy must keep the parameters' shapes for {name}, got flat shards "
                "(FSDP1); use FSDP2 (ModelParallelStrategy) or a rule on norms"
            )
        self.check(optimizer)
        named = context.with_gradients(sparse=self.sparse)
        parameters = self.limited(optimizer, [parameter for _, parameter in named])
        before = _copy(optimizer, parameters)
        return ClipDecision(after_step=lambda: self._shorten_(optimizer, parameters, before))

    def check(self, optimizer: Optimizer) -> None:
        """Raises for an optimizer that stores averages instead of its iterate in the parameters.

        Raises:
            ValueError: If the optimizer averages iterates.
        """
        # The classes of schedulefree that evaluate a closure have no "train_mode".
        if any({"train_mode", "weight_sum"} & group.keys() for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer must keep its iterate in the parameters for {type(self).__name__}, got "
                f"{type(optimizer).__name__}, which averages iterates; use a rule on norms"
            )

    def limited(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Returns the parameters whose updates the rule limits: all of them by default."""
        return parameters

    @abstractmethod
    def factors(
        self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], before: Sequence[Tensor]
    ) -> Tensor:
        """Returns the factor on each update, of shape ``(n,)``; called after the step."""

    @torch.no_grad()
    def _shorten_(
        self, optimizer: Optimizer, parameters: list[nn.Parameter], before: list[Tensor]
    ) -> None:
        if not parameters:
            return
        factors = self.factors(optimizer, parameters, before).clamp(max=1.0)
        # The fraction of the way back to the old weights. The factor of an update with a NaN is
        # NaN; such an update is not corrected.
        back = torch.where(factors.isfinite(), 1.0 - factors, 0.0).float()
        amounts = back.tolist() if back.device.type == "cpu" else None  # does not synchronize
        fractions = back.unbind()
        for indices in chunks(before):
            chosen = [i for i in indices if amounts is None or amounts[i] > 0]
            if not chosen:
                continue
            new = [to_local(parameters[i]) for i in chosen]
            # In float32 at least: in bfloat16 two rounding errors can be as large as the step.
            moved = _at_least_float32(new)
            steps = _foreach_sub(_at_least_float32([before[i] for i in chosen]), moved)
            torch._foreach_mul_(steps, [fractions[i].to(new[0].device) for i in chosen])
            torch._foreach_add_(steps, moved)
            torch._foreach_copy_(new, steps)


def _at_least_float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def whole_norms(norms: Tensor, parameters: Sequence[nn.Parameter], *, times: int = 1) -> Tensor:
    """Combines norms of local shards into norms of full tensors, for ``times`` runs of them."""
    groups = [shard_groups(parameter) for parameter in parameters] * times
    return torch.cat(reduce_norms(torch.split(norms, 1), groups, 2.0))


def _copy(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Copies the weights into memory that is reused in the next update."""
    kept = _copies.setdefault(optimizer, WeakTensorKeyDictionary())
    control = installed_step_control(optimizer)
    if control is not None and control.evaluations.start_weights:
        start = control.evaluations.start_weights
        return [to_local(start[parameter]) for parameter in parameters]
    is_repeated = control is not None and control.evaluations.number > 1
    if is_repeated and all(parameter in kept for parameter in parameters):
        # The step began at the weights of its first evaluation.
        return [kept[parameter] for parameter in parameters]
    weights = [to_local(parameter) for parameter in parameters]
    copies = []
    for parameter, weight in zip(parameters, weights, strict=True):
        copy: Tensor | None = kept.get(parameter)  # type: ignore[no-untyped-call]
        if copy is None or (copy.shape, copy.dtype, copy.device) != (
            weight.shape,
            weight.dtype,
            weight.device,
        ):
            copy = kept[parameter] = torch.empty_like(weight)
        copies.append(copy)
    if copies:
        with torch.no_grad():
            torch._foreach_copy_(copies, weights)
    return copies


def chunks(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yields indices, as many at a time as temporary memory allows."""
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
