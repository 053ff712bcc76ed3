"""Counts how often a clipping rule acts, without reading the device during training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_bigopt.durations.duration import amount_of
from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.gradient_norms import GradientNorms
from lightning_bigopt.gradients.norm_sample import NormSample, Repetition, repetition
from lightning_bigopt.gradients.rules.adaptive_norm_clip import ZClip
from lightning_bigopt.gradients.rules.clipping_rule import ClippingRule
from lightning_bigopt.gradients.rules.norm_clip import NormClip
from lightning_bigopt.gradients.rules.rule_groups import Groups

__all__ = [
    "ClipReport",
    "ClipStatistics",
    "advice",
    "loaded_counts",
    "saved_counts",
    "summaries",
]

_FOLD_EVERY = 64
_ENOUGH_UPDATES = 32


@dataclass(frozen=True, kw_only=True)
class ClipReport:
    """Summary of the updates that a rule has decided on.

    Args:
        updates: Number of updates with a finite gradient.
        clipped: Number of these that were clipped; for a rule with one coefficient for each
            tensor, the sum of the fractions of clipped tensors.
        threshold: The last threshold; None if it is not one number.
        median: Median norm before clipping, of at most 512 norms spread evenly over the run.
        p95: 95th percentile of the same norms.
        largest: The largest finite norm.
        repeated: A norm that clipping by other code has given to many of the updates, or None.

    Example:
        >>> print(ClipReport(updates=1000, clipped=50, threshold=1.0, median=0.25, p95=0.5))
        5.0 % of 1000 updates clipped; threshold 1 is 4.0 × the median norm 0.25 (95th percentile \
0.5)
    """

    updates: int
    clipped: float
    threshold: float | None
    median: float
    p95: float
    largest: float = 0.0
    repeated: Repetition | None = None

    @property
    def fraction(self) -> float:
        """Fraction of the updates that were clipped."""
        return self.clipped / self.updates if self.updates else 0.0

    def __str__(self) -> str:
        norms = f"median norm {self.median:.3g} (95th percentile {self.p95:.3g})"
        if self.threshold is not None and math.isfinite(self.threshold) and self.median > 0:
            ratio = self.threshold / self.median
            times = f"{ratio:.1f}" if 0.95 <= ratio < 100 else f"{ratio:.3g}"
            norms = f"threshold {self.threshold:.3g} is {times} × the {norms}"
        updates = amount_of(self.updates, "updates")
        return f"{self.fraction:.1%} of {updates} clipped; {norms}".replace("%", " %")


def advice(report: ClipReport, rule: ClippingRule) -> str | None:
    """Returns advice on the threshold of a rule.

    Args:
        report: The summary of its decisions.
        rule: The rule.

    Returns:
        Two or three sentences; None if the threshold is reasonable, if there are fewer than 32
        updates, or for rules other than :class:`NormClip` and :class:`ZClip`.

    Example:
        >>> from lightning_bigopt.gradients import NormClip
        >>> report = ClipReport(updates=100, clipped=80, threshold=1.0, median=3.0, p95=7.0)
        >>> advice(report, NormClip(1.0)).split(":")[0]
        'More than half of the updates are clipped'
    """
    if report.updates < _ENOUGH_UPDATES or not isinstance(rule, NormClip | ZClip):
        return None  # other rules clip often by design, or count tensors instead of updates
    if report.repeated is not None:
        return None  # the norms are those after another clipping, which has its own warning
    if report.fraction > 0.5 and rule.max_norm is not None:
        return (
            "More than half of the updates are clipped: max_norm sets the length of most "
            f"gradients. To clip outliers only, raise it above {report.p95:.2g}. With Adam this "
            "makes little difference; with SGD the limit acts as a lower learning rate."
        )
    if report.clipped == 0 and isinstance(rule, NormClip):
        text = (
            f"No update was clipped: the largest norm was {report.largest:.3g}. A threshold that "
            "is only a safety limit may stay."
        )
        lower = _rounded_down(report.p95)
        if lower >= report.largest:
            return text
        return f"{text} To clip one update in twenty, lower it to {lower:.3g}."
    return None


def _rounded_down(value: float) -> float:
    """Rounds to three digits, downward."""
    if value <= 0:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.floor(value / unit) * unit


class ClipStatistics:
    """Running counts of the decisions of one rule for one optimizer, in bounded memory.

    Example:
        >>> from lightning_bigopt.gradients import NormClip, clip_gradients_
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> statistics = ClipStatistics()
        >>> for norm in (0.5, 2.0):
        ...     weight.grad = torch.tensor([0.0, norm])
        ...     statistics.add(clip_gradients_([weight], NormClip(1.0)))
        >>> statistics.report().fraction
        0.5
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._threshold: Tensor | float | None = None
        self._updates: Tensor | int = 0
        self._clipped: Tensor | float = 0.0
        self._logged: tuple[Tensor | int, Tensor | float] = (0, 0.0)
        self._largest: Tensor | float = 0.0
        self._sample = NormSample()

    def add(self, decision: ClipDecision) -> None:
        """Adds one decision. Does not synchronize.

        Decisions without a coefficient, of rules that write the gradients, are not counted.
        """
        norms, coefficient = decision.norms, decision.coefficient
        if coefficient is None:
            coefficient = decision.coefficients
        if norms is None or coefficient is None or not coefficient.numel():
            return
        self._threshold = decision.threshold
        if norms.is_on_host and not coefficient.ndim and self._sample.is_on_host:
            self._add_numbers(norms, is_clipped=coefficient.item() < 1.0)
            return
        self._pending.append((norms.total, torch.as_tensor(norms.last), coefficient))
        if len(self._pending) >= _FOLD_EVERY:
            self._fold()

    def _add_numbers(self, norms: GradientNorms, *, is_clipped: bool) -> None:
        norm = norms.value
        is_finite = math.isfinite(norm)
        self._updates += is_finite
        self._clipped += is_clipped and is_finite
        if is_finite and norm > self._largest:
            self._largest = norm
        self._sample.add(norm, float(norms.last))

    def _fold(self) -> None:
        """Adds the pending decisions to the counts, on the device."""
        if not self._pending:
            return
        # On the device and every 64 updates: adding single numbers would launch several small
        # kernels per update, and reading them would synchronize.
        pending, self._pending = self._pending, []
        norms = torch.stack([norm for norm, _, _ in pending])
        lasts = torch.stack([last.to(norms) for _, last, _ in pending])
        finite = norms.isfinite()
        # A norm up to a millionth above the threshold has a coefficient of 1 in float32, and does
        # not count as clipped.
        factors = [coefficient for _, _, coefficient in pending]
        if all(factor.ndim == 0 for factor in factors):
            fractions = (torch.stack(factors) < 1).float()
        else:
            fractions = torch.stack([(factor < 1).float().mean() for factor in factors])
        self._updates = self._updates + finite.sum()
        self._clipped = self._clipped + (fractions * finite).sum()
        largest = torch.where(finite, norms, 0.0).max()
        self._largest = torch.maximum(largest, torch.as_tensor(self._largest).to(largest))
        self._sample.extend(torch.stack([norms, lasts], dim=1))

    def report(self) -> ClipReport | None:
        """Returns the summary; None before the first finite update. Synchronizes."""
        self._fold()
        updates = int(self._updates)
        if not updates:
            return None
        rows = self._sample.finite()
        norms = sorted(norm for norm, _ in rows)
        threshold = self._threshold
        if isinstance(threshold, Tensor):
            threshold = threshold.item() if threshold.numel() == 1 else None
        return ClipReport(
            updates=updates,
            clipped=float(self._clipped),
            threshold=threshold,
            median=median(norms) if norms else 0.0,
            p95=norms[min(len(norms) - 1, int(0.95 * len(norms)))] if norms else 0.0,
            largest=float(self._largest),
            repeated=repetition(rows),
        )

    def fraction_since_last_log(self) -> Tensor | float | None:
        """Returns the fraction of clipped updates since the last call. Does not synchronize.

        Returns:
            The fraction of the finite updates. Without any finite update it is None on the CPU and
            0 on a device, because the host does not read their number.
        """
        self._fold()
        updates, clipped = self._updates - self._logged[0], self._clipped - self._logged[1]
        self._logged = self._updates, self._clipped
        if isinstance(updates, Tensor):
            return clipped / updates.clamp(min=1)
        return clipped / updates if updates else None

    def state_dict(self) -> dict[str, Any]:
        """Returns counts and kept norms as plain numbers. Synchronizes."""
        self._fold()
        return {
            "updates": int(self._updates),
            "clipped": float(self._clipped),
            "logged": [int(self._logged[0]), float(self._logged[1])],
            "largest": float(self._largest),
            **self._sample.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the counts from a checkpoint."""
        self._pending = []
        self._updates, self._clipped = state["updates"], state["clipped"]
        updates, clipped = state.get("logged", (self._updates, self._clipped))
        self._logged = updates, clipped
        self._largest = state.get("largest", max(state["norms"], default=0.0))
        self._sample.load_state_dict(state)


def saved_counts(
    statistics: Mapping[str, Mapping[str, ClipStatistics]],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the states of statistics by label of the optimizer and group. Synchronizes."""
    return {
        label: {group: own.state_dict() for group, own in groups.items()}
        for label, groups in statistics.items()
    }


def loaded_counts(
    saved: Mapping[str, Mapping[str, dict[str, Any]]],
) -> dict[str, dict[str, ClipStatistics]]:
    """Returns the statistics whose states :func:`saved_counts` has returned."""
    loaded = {
        label: {group: ClipStatistics() for group in groups} for label, groups in saved.items()
    }
    for label, groups in loaded.items():
        for group, own in groups.items():
            own.load_state_dict(saved[label][group])
    return loaded


def summaries(rule: ClippingRule, reports: Mapping[tuple[str, str], ClipReport]) -> Iterator[str]:
    """Yields one line for each report: how often clipping acted, with advice on the threshold.

    Args:
        rule: The clipping rule.
        reports: Reports by label of the optimizer and group of the rule; both may be empty.
    """
    rules = dict(rule.pairs) if isinstance(rule, Groups) else {"": rule}
    for (label, group), report in reports.items():
        names = "".join(f", {name}" for name in (label, group) if name)
        own = rules[group]
        assert own is not None  # a group without a rule has no statistics
        hint = advice(report, own)
        yield f"{type(own).__name__}{names}: {report}." + (f" {hint}" if hint else "")
