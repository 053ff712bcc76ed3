"""The critical batch size, measured by short branches with several batch sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from lightning_bigopt.checks import check_count, check_positive, shown
from lightning_bigopt.reporting.plots import axes_of
from lightning_bigopt.type_checks import check_instance

__all__ = ["CriticalBatchSize", "MeasurementError", "Verdict", "check_multiples"]

Verdict: TypeAlias = Literal["within", "above", "undecided"]

_STANDARD_ERRORS = 2.0  # about 95 % of a normal distribution on both sides


class MeasurementError(ValueError):
    """Raised if the branches of a measurement cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class CriticalBatchSize:
    """The result of :func:`critical_batch_size`.

    The difference of a multiple is the mean difference of its evaluation losses from those of
    multiple 1, batch by batch; positive differences are worse. Its standard error is that of the
    paired differences: it contains the noise of the evaluated batches, not that of the training of
    the branches. Batches whose loss is not finite with multiple 1 are left out. A multiple is
    ``"within"`` the tolerance if the difference plus two standard errors is, ``"above"`` it if the
    difference minus two standard errors is above it, and ``"undecided"`` otherwise.

    Args:
        batch_size: Global batch size of multiple 1, in samples.
        multiples: Multiples of the batch size, ascending, the first of them 1.
        losses: Evaluation losses of each multiple, on the same batches; an empty tuple for a branch
            that has diverged.
        tolerance: Largest difference that counts as no loss of efficiency, in units of the loss.
        window: Samples of each branch.
        samples: Samples of all branches, with the evaluated ones.
        updates: Updates of all branches.

    Attributes:
        differences: Difference of each multiple; infinite for a branch that has diverged.
        standard_errors: Standard error of each difference.
        verdicts: Verdict of each multiple.
        largest_batch_size: The largest batch size that is within the tolerance with all smaller
            multiples, in samples.
        critical_batch_size: The batch size at which the difference reaches the tolerance, in
            samples: interpolated in the logarithm of the batch size between the last multiple whose
            difference is below the tolerance and the next one. If no multiple exceeds the
            tolerance, the largest one: see :attr:`is_lower_bound`.
        is_lower_bound: Whether no difference is above the tolerance.
        is_decided: Whether the verdicts on both sides of the critical batch size, or that of the
            largest multiple, are ``"within"`` or ``"above"``.

    Raises:
        ValueError: If multiples and losses do not match, or an argument is out of range.

    Example:
        >>> found = CriticalBatchSize(
        ...     batch_size=32,
        ...     multiples=(1, 2, 4),
        ...     losses=((2.0, 2.2), (2.001, 2.203), (2.02, 2.22)),
        ...     tolerance=0.01,
        ...     window=1024,
        ...     samples=3200,
        ...     updates=56,
        ... )
        >>> found.verdicts, found.largest_batch_size, round(found.critical_batch_size)
        (('within', 'within', 'above'), 64, 87)

    References:
        Merrill et al., "Critical Batch Size Revisited", 2025 (arXiv 2505.23971), Sec. 3.
    """

    batch_size: int
    multiples: tuple[int, ...]
    losses: tuple[tuple[float, ...], ...]
    tolerance: float
    window: int
    samples: int
    updates: int
    differences: tuple[float, ...] = field(init=False)
    standard_errors: tuple[float, ...] = field(init=False)
    verdicts: tuple[Verdict, ...] = field(init=False)
    largest_batch_size: int = field(init=False)
    critical_batch_size: float = field(init=False)
    is_lower_bound: bool = field(init=False)
    is_decided: bool = field(init=False)

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size, of="samples")
        check_multiples(self.multiples)
        check_positive("tolerance", self.tolerance, hint="write 0.01")
        if len(self.losses) != len(self.multiples):
            raise ValueError(
                f"losses must contain those of each of the {len(self.multiples)} multiples, got "
                f"{len(self.losses)}; measure again"
            )
        used = [index for index, loss in enumerate(self.losses[0]) if math.isfinite(loss)]
        if len(used) < 2:
            raise MeasurementError(
                f"the branch with the current batch of {self.batch_size} must have two finite "
                f"losses, got {list(self.losses[0][:3]) or 'none, because it diverged'}; measure "
                "at another update, or lower the learning rate"
            )
        base = [self.losses[0][index] for index in used]
        pairs = [
            _paired([branch[index] for index in used] if branch else (), base)
            for branch in self.losses
        ]
        differences = tuple(difference for difference, _ in pairs)
        errors = tuple(error for _, error in pairs)
        verdicts = tuple(
            _verdict(difference, _STANDARD_ERRORS * error, self.tolerance)
            for difference, error in pairs
        )
        within = next(
            (i for i, verdict in enumerate(verdicts) if verdict != "within"), len(verdicts)
        )
        crossed = next(
            (i for i, difference in enumerate(differences) if difference > self.tolerance), None
        )
        around = verdicts[-1:] if crossed is None else verdicts[crossed - 1 : crossed + 1]
        for name, value in (
            ("is_decided", "undecided" not in around),
            ("differences", differences),
            ("standard_errors", errors),
            ("verdicts", verdicts),
            ("largest_batch_size", self.multiples[within - 1] * self.batch_size),
            ("critical_batch_size", self._crossing(differences, crossed)),
            ("is_lower_bound", crossed is None),
        ):
            object.__setattr__(self, name, value)

    def _crossing(self, differences: Sequence[float], crossed: int | None) -> float:
        """Returns the batch size at which the difference reaches the tolerance."""
        if crossed is None:
            return float(self.multiples[-1] * self.batch_size)
        low, high = differences[crossed - 1 : crossed + 1]
        share = 0.0 if math.isinf(high) else (self.tolerance - low) / (high - low)
        first, second = self.multiples[crossed - 1 : crossed + 1]
        return float(self.batch_size * first * (second / first) ** share)

    def __str__(self) -> str:
        rows = [f"{'batch':>8} {'loss':>9} {'difference':>22}  verdict"]
        columns = (self.multiples, self.losses, self.differences, self.standard_errors)
        for multiple, losses, difference, error, verdict in zip(
            *columns, self.verdicts, strict=True
        ):
            mean = sum(losses) / len(losses) if losses else math.nan
            shown_difference = f"{difference:+.4f} ± {error:.4f}"
            rows.append(
                f"{multiple * self.batch_size:8} {mean:9.4f} {shown_difference:>22}  {verdict}"
            )
        relation = "at least" if self.is_lower_bound else "about"
        rows.append(
            f"The critical batch size is {relation} {self.critical_batch_size:.0f} samples "
            f"(tolerance {self.tolerance:g}, {self.window} samples for each branch, "
            f"{self.updates} updates in all)."
            + ("" if self.is_decided else " This is undecided: raise evaluate or window.")
        )
        return "\n".join(rows)

    def plot(self, ax: Any = None) -> Any:
        """Plots the differences over the batch size, with tolerance and critical batch size.

        Args:
            ax: Matplotlib axes to draw on; None for new ones.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        ax = axes_of(ax)
        finite = [
            (multiple * self.batch_size, difference, _STANDARD_ERRORS * error)
            for multiple, difference, error in zip(
                self.multiples, self.differences, self.standard_errors, strict=True
            )
            if math.isfinite(difference)
        ]
        sizes, differences, errors = zip(*finite, strict=True)
        ax.errorbar(sizes, differences, yerr=errors, fmt="o-", capsize=3, label="± 2 std. errors")
        ax.axhline(
            self.tolerance, color="C1", linestyle="--", label=f"tolerance {self.tolerance:g}"
        )
        if not self.is_lower_bound:
            ax.axvline(
                self.critical_batch_size,
                color="C2",
                linestyle=":",
                label=f"critical batch size {self.critical_batch_size:.0f}",
            )
        ax.set_xscale("log", base=2)
        ax.set_xticks([m * self.batch_size for m in self.multiples])
        ax.set_xticklabels([str(m * self.batch_size) for m in self.multiples])
        ax.set(xlabel="global batch size (samples)", ylabel="difference of the loss")
        ax.legend()
        return ax


def check_multiples(multiples: Sequence[int]) -> None:
    """Raises unless multiples are ascending ints of which the first is 1.

    Raises:
        ValueError: If they are not, or there are fewer than two.
    """
    check_instance("multiples", multiples, (list, tuple), hint="write (1, 2, 4, 8)")
    for index, multiple in enumerate(multiples):
        check_count(f"multiples[{index}]", multiple)
    ascending = list(multiples) == sorted(set(multiples))
    if len(multiples) < 2 or multiples[0] != 1 or not ascending:
        raise ValueError(
            "multiples must be ascending, begin with 1 and have two entries or more, got "
            f"{shown(multiples)}; write (1, 2, 4, 8)"
        )


def _paired(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Returns mean and standard error of paired differences; infinite and 0 after a divergence."""
    if len(losses) != len(base) or not all(map(math.isfinite, losses)):
        return math.inf, 0.0
    differences = [loss - other for loss, other in zip(losses, base, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count == 1:
        return mean, math.inf
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    return mean, math.sqrt(variance / count)


def _verdict(difference: float, margin: float, tolerance: float) -> Verdict:
    if difference + margin <= tolerance:
        return "within"
    return "above" if difference - margin > tolerance else "undecided"
