"""The decision of a clipping rule on one update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_bigopt.gradients.gradient_norms import GradientNorms
from lightning_bigopt.removed import RemovedAttribute

__all__ = ["ClipDecision"]


@dataclass(kw_only=True, eq=False)
class ClipDecision:
    """The decision of a rule on one update, which ``apply_`` applies.

    Its tensors are on the device of the gradients, and were not read by the host.

    Args:
        norms: The norms of the gradients; required with ``coefficient`` and ``coefficients``.
        coefficient: Factor for all gradients, float32 of shape ``()``, at most 1.
        coefficients: Factor for each gradient of ``norms``, float32 of shape ``(n,)``, at most 1.
        threshold: Norm above which the rule acts; shape ``(n,)`` for one threshold per gradient.
        by_pattern: The decisions of :class:`Groups`, by pattern; empty for a single decision.
        write_gradients: Function that writes the gradients, by element or by unit.
        after_step: Function that corrects the update after the optimizer's step.

    Example:
        >>> ClipDecision(threshold=1.0).coefficient is None
        True
    """

    norms: GradientNorms | None = None
    coefficient: Tensor | None = None
    coefficients: Tensor | None = None
    threshold: Tensor | float | None = None
    by_pattern: Mapping[str, ClipDecision] = field(default_factory=dict)
    write_gradients: Callable[[], None] | None = None
    after_step: Callable[[], None] | None = None

    parts = RemovedAttribute("0.2", "write by_pattern")
    write = RemovedAttribute("0.2", "write write_gradients")
    by_group = RemovedAttribute("0.2", "write each_group")

    def each_group(self) -> Iterable[tuple[str, ClipDecision]]:
        """Returns pairs of pattern and decision: those of ``by_pattern``, or ``""`` and this one.

        Example:
            >>> [pattern for pattern, _ in ClipDecision(threshold=1.0).each_group()]
            ['']
        """
        return self.by_pattern.items() or [("", self)]
