"""What a clipping rule is: a frozen specification that decides on one update at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from lightning_bigopt.durations import Horizon
from lightning_bigopt.gradients.measuring import check_dense, measure
from lightning_bigopt.gradients.norms import GradientNorms

__all__ = [
    "ClipContext",
    "ClipDecision",
    "ClippingRule",
    "RuleState",
    "check_between",
    "check_count",
    "check_positive",
    "clip_coefficient",
    "total_coefficient",
]

RuleState: TypeAlias = dict[str, Any]
"""What a rule remembers: numbers, strings, lists, dicts and tensors, changed in place."""


# One of each of these is made every update, and a frozen one takes three times as long to make.
@dataclass(kw_only=True, eq=False)
class ClipContext:
    """What a rule may look at.

    Args:
        parameters: Names and parameters, those of the optimizer where there is one.
        norms: The gradients' norms where they were taken already; measured on demand else.
        optimizer: The optimizer about to step, owner of exactly these parameters.
        fraction: The share of the budget spent, for scheduled thresholds.
        process_group: As in :func:`~lightning_bigopt.gradients.measure`.
        is_sharded: As in :func:`~lightning_bigopt.gradients.measure`.
        all_names: The names that patterns must match, where ``parameters`` are only some of the
            module's.

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

    def known_names(self) -> tuple[str, ...]:
        """The names that patterns must match."""
        if self.all_names is not None:
            return tuple(self.all_names)
        return tuple(name for name, _ in self.parameters)

    def norms_of_type(self, norm_type: float = 2.0) -> GradientNorms:
        """The norms of an order: those given where they have it, measured otherwise."""
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
        """Names and parameters that have a gradient, each tensor once.

        Raises:
            ValueError: If a gradient is sparse where that is refused.
        """
        found = {id(p): (name, p) for name, p in self.parameters if p.grad is not None}
        pairs = list(found.values())
        if sparse == "refused":
            check_dense(pairs, [p.grad for _, p in pairs if p.grad is not None])
        return pairs


@dataclass(kw_only=True, eq=False)
class ClipDecision:
    """What a rule wants done; ``apply_`` does it. No field was read back from the device.

    Args:
        norms: The norms that it was made on; with ``coefficient`` and ``coefficients``.
        coefficient: 0-d, float32, at most 1: the factor for all gradients.
        coefficients: Shape (n,), float32, at most 1: a factor for each gradient of ``norms``.
        threshold: The norm from which on the rule acts; shape (n,) where it is one for each.
        parts: The decisions for groups of parameters, by the groups' patterns.
        write: Writes the gradients itself, element by element or unit by unit.
        after_step: Corrects the update once the optimizer has made it.

    Example:
        >>> ClipDecision(threshold=1.0).coefficient is None
        True
    """

    norms: GradientNorms | None = None
    coefficient: Tensor | None = None
    coefficients: Tensor | None = None
    threshold: Tensor | float | None = None
    parts: Mapping[str, ClipDecision] = field(default_factory=dict)
    write: Callable[[], None] | None = None
    after_step: Callable[[], None] | None = None

    @property
    def by_group(self) -> Mapping[str, ClipDecision]:
        """The decisions by pattern; itself under ``""`` where there are no groups."""
        return self.parts or {"": self}


class ClippingRule(ABC):
    """Decides how one update's gradients are limited.

    A rule is immutable. What it remembers lies in a state that the caller keeps and saves, one
    for each optimizer, as :meth:`initial_state` makes it; :meth:`decide` is called exactly once an
    update. Subclasses are frozen dataclasses.

    Example:
        >>> from lightning_bigopt.gradients import NormClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> context = ClipContext(parameters=[("weight", weight)])
        >>> NormClip(max_norm=1.0).decide(context, {}).coefficient
        tensor(0.2000)
    """

    @property
    def measures(self) -> float | None:
        """The order of the norms that it reads, 1, 2 or ``inf``; None where it reads none."""
        return 2.0

    @property
    def needs_horizon(self) -> bool:
        """Whether it follows a schedule, and so must know where the run ends."""
        return getattr(self, "schedule", None) is not None

    def initial_state(self) -> RuleState:
        """What it remembers before the first update; loads with ``weights_only=True``."""
        return {}

    def resolve(self, horizon: Horizon) -> ClippingRule:
        """The rule with every duration converted on a horizon."""
        return self

    @abstractmethod
    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """Decides on one update. Changes the state, never the gradients."""


def clip_coefficient(
    norm: Tensor, threshold: Tensor | float, *, finite: Tensor | None = None
) -> Tensor:
    """``min(1, threshold / (norm + 1e-6))`` as torch has it, and 1 for gradients not finite.

    A gradient with one NaN is not clipping's to mend: scaled by NaN, all others would be lost too.

    Args:
        norm: Any shape, float32.
        threshold: A number or a tensor of the same shape.
        finite: Whether the gradients are; whether ``norm`` is by default.

    Returns:
        The same shape, at most 1. Does not synchronize.

    Example:
        >>> clip_coefficient(torch.tensor([0.5, 4.0, float("nan")]), 2.0)
        tensor([1.0000, 0.5000, 1.0000])
    """
    if not isinstance(threshold, Tensor) and threshold == math.inf:
        return torch.ones_like(norm)  # of a norm that is infinite too, the quotient is NaN
    finite = norm.isfinite() if finite is None else finite
    return torch.where(finite, (threshold / (norm + 1e-6)).clamp(max=1.0), 1.0)


def total_coefficient(norms: GradientNorms, threshold: float) -> Tensor:
    """:func:`clip_coefficient` of the total, by arithmetic alone where it is a number already.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> total_coefficient(GradientNorms.of_numbers([("weight", weight)], [4.0], 2.0), 2.0)
        tensor(0.5000)
    """
    if not norms.is_on_host:
        return clip_coefficient(norms.total, threshold, finite=norms.finite)
    norm = norms.value
    if not norm + 1e-6 > threshold or not norms.finite:
        return torch.scalar_tensor(1.0)  # its own: a rule made of this one may write into it
    return torch.scalar_tensor(threshold / (norm + 1e-6))


def check_positive(name: str, value: float, *, hint: str = "") -> None:
    """Raises unless a number is positive and finite.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}{hint}")


def check_between(name: str, value: float, *, low: float, high: float) -> None:
    """Raises unless a number lies in the open interval (low, high).

    Raises:
        ValueError: If it does not.
    """
    if isinstance(value, bool) or not low < value < high:
        raise ValueError(f"{name} must be in ({low:g}, {high:g}), got {value!r}")


def check_count(name: str, value: object) -> None:
    """Raises unless a value is a positive integer.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
