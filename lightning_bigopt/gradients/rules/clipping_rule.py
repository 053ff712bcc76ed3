"""The interface of clipping rules: frozen specifications that decide on one update at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from lightning_bigopt.arguments import Specification
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.gradient_norms import GradientNorms
from lightning_bigopt.gradients.measure import check_dense, measure
from lightning_bigopt.parameters import check_all_match
from lightning_bigopt.removed import RemovedAttribute

__all__ = [
    "ClipContext",
    "ClippingRule",
    "RuleState",
    "clip_coefficient",
    "total_coefficient",
]

RuleState: TypeAlias = dict[str, Any]
"""The state of a rule: numbers, strings, lists, dicts and tensors, changed in place."""


# Not frozen: one is created for every update, and creating a frozen one takes three times as long.
@dataclass(kw_only=True, eq=False)
class ClipContext:
    """The input of a rule's decision.

    Args:
        parameters: Names and parameters; those of the optimizer if there is one.
        norms: Norms of the gradients if they have been measured; None measures them on demand.
        optimizer: The optimizer that is about to step, which owns exactly these parameters.
        fraction: Fraction of the budget consumed, for scheduled thresholds.
        process_group: As in :func:`~lightning_bigopt.gradients.measure`.
        is_sharded: As in :func:`~lightning_bigopt.gradients.measure`.
        all_names: The names that patterns must match, if ``parameters`` has only some of the
            module's parameters.
        tied: Other names of some parameters, for messages about patterns.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> ClipContext(parameters=[("weight", weight)]).norms_of_type(1.0).value
        7.0
    """

    parameters: Sequence[tuple[str, nn.Parameter]]
    norms: GradientNorms | None = None
    optimizer: Optimizer | None = None
    fraction: float = 0.0
    process_group: ProcessGroup | None = None
    is_sharded: Callable[[nn.Parameter], bool] | None = None
    all_names: Sequence[str] | None = None
    tied: Sequence[tuple[str, str]] = ()

    def known_names(self) -> tuple[str, ...]:
        """Returns the names that patterns must match."""
        if self.all_names is not None:
            return tuple(self.all_names)
        return tuple(name for name, _ in self.parameters)

    def check_patterns(self, patterns: Sequence[str]) -> None:
        """Raises a ValueError unless each pattern is the first match of some parameter."""
        check_all_match(self.known_names(), tuple(patterns), tuple(self.tied))

    def norms_of_type(self, norm_type: float = 2.0) -> GradientNorms:
        """Returns norms of an order: :attr:`norms` if they have this order, else measured ones."""
        if self.norms is not None and self.norms.norm_type == norm_type:
            return self.norms
        return measure(
            self.parameters,
            norm_type=norm_type,
            process_group=self.process_group,
            is_sharded=self.is_sharded,
        )

    def with_gradients(
        self, *, sparse: Literal["refused", "allowed"] = "refused"
    ) -> list[tuple[str, nn.Parameter]]:
        """Returns names and parameters that have a gradient, each tensor once.

        Raises:
            ValueError: If a gradient is sparse and ``sparse`` is ``"refused"``.
        """
        found = {id(p): (name, p) for name, p in self.parameters if p.grad is not None}
        pairs = list(found.values())
        if sparse == "refused":
            check_dense(pairs, [p.grad for _, p in pairs if p.grad is not None])
        return pairs


class ClippingRule(Specification, ABC):
    """Decides how the gradients of an update are limited.

    A rule is immutable; subclasses are frozen dataclasses. The caller stores and saves a state for
    each optimizer, which :meth:`initial_state` creates. :meth:`decide` is called once for each
    update.

    Attributes:
        uses_total_norm: Whether the decision is one coefficient, computed from the total norm of
            the gradients; several optimizers can then share it (``scope="all"``).

    Example:
        >>> from lightning_bigopt.gradients import NormClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> context = ClipContext(parameters=[("weight", weight)])
        >>> NormClip(max_norm=1.0).decide(context, {}).coefficient
        tensor(0.2000)
    """

    uses_total_norm: ClassVar[bool] = False
    _used_in = "GradientClipping({})"

    measures = RemovedAttribute("0.2", "write norm_order")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "measures" in vars(cls):
            raise ValueError(
                f"norm_order must return the order of the norms that {cls.__name__} reads, got the "
                "property measures of version 0.1; rename it to norm_order"
            )

    @property
    def norm_order(self) -> float | None:
        """Order of the norms that the rule reads: 1, 2 or ``inf``; None if it reads no norms."""
        return 2.0

    @property
    def needs_horizon(self) -> bool:
        """Whether the rule has a schedule, which needs the length of the run."""
        return getattr(self, "schedule", None) is not None

    def initial_state(self) -> RuleState:
        """Returns the state before the first update; it loads with ``weights_only=True``."""
        return {}

    def accepts(self, state: RuleState) -> bool:
        """Returns whether a state may be of a rule of this class, by its keys.

        It is asked only for states of checkpoints of version 0.1, which do not name their rule. A
        rule whose :meth:`decide` adds keys to the state overrides it.
        """
        return state.keys() == self.initial_state().keys()

    def resolve(self, horizon: Horizon) -> ClippingRule:
        """Returns the rule with all durations converted to fractions of a horizon."""
        return self

    def forget(self, names: Collection[str], state: RuleState) -> None:
        """Removes the history of parameters that other tensors have replaced from the state."""

    @abstractmethod
    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """Decides on one update. Changes the state, not the gradients."""


def clip_coefficient(
    norm: Tensor, threshold: Tensor | float, *, finite: Tensor | None = None
) -> Tensor:
    """Computes ``min(1, threshold / (norm + 1e-6))`` as torch does, and 1 for non-finite gradients.

    Non-finite gradients are left unchanged: multiplying by NaN would spread it to all gradients.
    Does not synchronize.

    Args:
        norm: The norm, float32 of any shape.
        threshold: A number, or a tensor of the same shape.
        finite: Whether the gradients are finite; by default whether ``norm`` is.

    Returns:
        The coefficient, of the same shape, at most 1.

    Example:
        >>> clip_coefficient(torch.tensor([0.5, 4.0, float("nan")]), 2.0)
        tensor([1.0000, 0.5000, 1.0000])
    """
    threshold = threshold if isinstance(threshold, Tensor) else float(threshold)
    if not isinstance(threshold, Tensor) and threshold == math.inf:
        return torch.ones_like(norm)  # inf / inf is NaN
    finite = norm.isfinite() if finite is None else finite
    return torch.where(finite, (threshold / (norm + 1e-6)).clamp(max=1.0), 1.0)


def total_coefficient(norms: GradientNorms, threshold: float) -> Tensor:
    """Computes the :func:`clip_coefficient` of the total norm, on the host if the norm is there.

    Does not synchronize.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([0.0, 4.0])
        >>> total_coefficient(measure([("weight", weight)]), 2.0)
        tensor(0.5000)
    """
    if not norms.is_on_host:
        return clip_coefficient(norms.total, threshold, finite=norms.finite)
    norm = norms.value
    if not norm + 1e-6 > threshold or not norms.finite:
        return torch.scalar_tensor(1.0)  # a new tensor: a custom rule may modify it in place
    return torch.scalar_tensor(threshold / (norm + 1e-6))
