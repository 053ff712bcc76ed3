"""Counts how often clipping acts, without looking at the device while it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_bigopt.gradients import ClipDecision, ClippingRule, NormClip, ZClip

__all__ = ["ClipAudit", "ClipReport", "advice"]

_FOLD_EVERY = 64
_KEPT = 512
_ENOUGH = 32
# Marks a norm that is not finite: norms are not negative, and NaN enters no state.
_NOT_FINITE = -1.0


@dataclass(frozen=True, kw_only=True)
class ClipReport:
    """What clipping did in the updates so far.

    Args:
        updates: Updates whose gradient was finite.
        clipped: Updates in which it acted; with a coefficient for each tensor, the sum of the
            shares of tensors.
        threshold: The last threshold; None where it is not one number.
        median: Median norm before clipping, of at most 512 norms spread evenly over the run.
        high: 95th percentile of the same.

    Example:
        >>> print(ClipReport(updates=1000, clipped=50, threshold=1.0, median=0.25, high=0.5))
        5.0 % of 1000 updates clipped; threshold 1 is 4.0 × the median norm 0.25 (95th percentile \
0.5)
    """

    updates: int
    clipped: float
    threshold: float | None
    median: float
    high: float

    @property
    def fraction(self) -> float:
        """Share of the updates that were clipped."""
        return self.clipped / self.updates if self.updates else 0.0

    def __str__(self) -> str:
        typical = f"median norm {self.median:.3g} (95th percentile {self.high:.3g})"
        where = typical
        if self.threshold is not None and math.isfinite(self.threshold) and self.median > 0:
            ratio = self.threshold / self.median
            where = f"threshold {self.threshold:.3g} is {ratio:.1f} × the {typical}"
        return f"{self.fraction:.1%} of {self.updates} updates clipped; {where}".replace("%", " %")


def advice(report: ClipReport, rule: ClippingRule) -> str | None:
    """What the counts say about the threshold; None where nothing, or too early.

    Example:
        >>> from lightning_bigopt.gradients import NormClip
        >>> report = ClipReport(updates=100, clipped=80, threshold=1.0, median=3.0, high=7.0)
        >>> advice(report, NormClip(1.0)).split(":")[0]
        'More than half of the updates are clipped'
    """
    if report.updates < _ENOUGH or not isinstance(rule, NormClip | ZClip):
        return None  # other rules are made to clip often, or count tensors
    if report.fraction > 0.5 and rule.max_norm is not None:
        return (
            "More than half of the updates are clipped: max_norm sets the length of most "
            f"gradients. To catch outliers only, raise it above {report.high:.2g}; under Adam the "
            "two differ little, under SGD this lowers the learning rate."
        )
    if report.clipped == 0 and isinstance(rule, NormClip):
        return (
            "No update was clipped: max_norm guards against spikes that did not come. To limit "
            f"the largest gradients of this run, lower it below {report.high:.2g}."
        )
    return None


class ClipAudit:
    """Running counts of one rule on one optimizer; memory and state are bounded.

    Of the norms every ``stride``-th is kept, and when there are 512 of them the stride doubles.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._threshold: Tensor | float | None = None
        self._updates: Tensor | int = 0
        self._clipped: Tensor | float = 0.0
        self._logged: tuple[Tensor | int, Tensor | float] = (0, 0.0)
        self._norms: list[float] | Tensor = []
        self._stride = 1
        self._seen = 0

    def add(self, decision: ClipDecision) -> None:
        """Takes an update in; rules that write entries leave no trace. Does not synchronize."""
        norms, coefficient = decision.norms, decision.coefficient
        if coefficient is None:
            coefficient = decision.coefficients
        if norms is None or coefficient is None or not coefficient.numel():
            return
        self._threshold = decision.threshold
        if norms.is_on_host and not coefficient.ndim and isinstance(self._norms, list):
            self._take(norms.value, is_clipped=coefficient.item() < 1.0)
            return
        self._pending.append((norms.total, coefficient))
        if len(self._pending) >= _FOLD_EVERY:
            self._fold()

    def _take(self, norm: float, *, is_clipped: bool) -> None:
        """What :meth:`_fold` does, of numbers."""
        assert isinstance(self._norms, list)  # add
        is_finite = math.isfinite(norm)
        self._updates += is_finite
        self._clipped += is_clipped and is_finite
        if self._seen % self._stride == 0:
            self._norms.append(norm if is_finite else _NOT_FINITE)
            if len(self._norms) > _KEPT:
                self._norms, self._stride = self._norms[::2], self._stride * 2
        self._seen += 1

    def _fold(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        norms = torch.stack([norm for norm, _ in pending])
        finite = norms.isfinite()
        # A coefficient of 1 in float32 may stand for a norm a millionth above the threshold.
        factors = [coefficient for _, coefficient in pending]
        if all(factor.ndim == 0 for factor in factors):
            shares = (torch.stack(factors) < 1).float()
        else:
            shares = torch.stack([(factor < 1).float().mean() for factor in factors])
        self._updates = self._updates + finite.sum()
        self._clipped = self._clipped + (shares * finite).sum()
        marked = torch.where(finite, norms, _NOT_FINITE)
        first = -self._seen % self._stride
        self._seen += len(marked)
        chosen = marked[first :: self._stride]
        kept = torch.cat([torch.as_tensor(self._norms).to(chosen), chosen])
        while len(kept) > _KEPT:
            kept, self._stride = kept[::2], self._stride * 2
        self._norms = kept

    def report(self) -> ClipReport | None:
        """The counts so far; None where no update was seen. Synchronizes."""
        self._fold()
        updates = int(self._updates)
        if not updates:
            return None
        norms = sorted(norm for norm in self._numbers() if norm >= 0)
        threshold = self._threshold
        if isinstance(threshold, Tensor):
            threshold = threshold.item() if threshold.numel() == 1 else None
        return ClipReport(
            updates=updates,
            clipped=float(self._clipped),
            threshold=threshold,
            median=median(norms) if norms else 0.0,
            high=norms[min(len(norms) - 1, int(0.95 * len(norms)))] if norms else 0.0,
        )

    def take_share(self) -> Tensor | float | None:
        """Share of the finite updates since it was last asked that were clipped.

        None where there were none, as far as is known without a look at the device.
        """
        self._fold()
        updates, clipped = self._updates - self._logged[0], self._clipped - self._logged[1]
        self._logged = self._updates, self._clipped
        if isinstance(updates, Tensor):
            return clipped / updates.clamp(min=1)
        return clipped / updates if updates else None

    def _numbers(self) -> list[float]:
        return self._norms if isinstance(self._norms, list) else self._norms.tolist()

    def state_dict(self) -> dict[str, Any]:
        """Counts and kept norms as plain numbers."""
        self._fold()
        return {
            "updates": int(self._updates),
            "clipped": float(self._clipped),
            "logged": [int(self._logged[0]), float(self._logged[1])],
            "norms": list(self._numbers()),
            "stride": self._stride,
            "seen": self._seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's counts."""
        self._pending = []
        self._updates, self._clipped = state["updates"], state["clipped"]
        updates, clipped = state.get("logged", (self._updates, self._clipped))
        self._logged = updates, clipped
        self._norms = list(state["norms"])
        self._stride, self._seen = state["stride"], state["seen"]
