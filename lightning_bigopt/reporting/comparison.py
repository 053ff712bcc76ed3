"""The result of a comparison of two trainings as plain data: losses by seed, test and verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lightning_bigopt.reporting.compared_side import ComparedSide
from lightning_bigopt.reporting.paired_test import PairedTest, pairs_needed
from lightning_bigopt.reporting.study import Direction

__all__ = ["ComparisonRecord"]

_FEWEST_FOR_NOISE = 5
"""With fewer seeds the smallest difference that they could have shown is a large one."""


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord:
    """Two sides, trained with the same seeds, and what follows; ``print`` shows table and verdict.

    Args:
        a: The first side.
        b: The second side; its trainings have the seeds of the first one.
        monitor: Name of the monitored value.
        direction: ``"minimize"`` or ``"maximize"``.
        test: The paired t-test of the values b - a; None with fewer than two complete pairs.
        relevant: The smallest difference that matters; None for the smallest one that the seeds
            could have shown.
    """

    a: ComparedSide
    b: ComparedSide
    monitor: str
    direction: Direction = "minimize"
    test: PairedTest | None
    relevant: float | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(run.seed for run in self.a.runs)

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """The values of a and b at each seed at which neither side has diverged."""
        found = zip(self.a.losses, self.b.losses, strict=True)
        return [(a, b) for a, b in found if a is not None and b is not None]

    @property
    def means(self) -> tuple[float, float]:
        """Means of the values of a and b over the complete pairs; NaN without one."""
        if not self.pairs:
            return math.nan, math.nan
        first, second = zip(*self.pairs, strict=True)
        return fmean(first), fmean(second)

    @property
    def difference(self) -> float:
        """Mean difference b - a over the complete pairs; NaN without a test."""
        return math.nan if self.test is None else self.test.difference

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean difference; NaN without a test."""
        return (math.nan, math.nan) if self.test is None else self.test.interval

    @property
    def p_value(self) -> float:
        """The p-value of the paired t-test; NaN without one, or if all differences are equal."""
        return math.nan if self.test is None else self.test.p_value

    @property
    def detectable_difference(self) -> float:
        """The smallest difference that these seeds detect with a probability of 0.8."""
        return math.nan if self.test is None else self.test.detectable

    @property
    def updates_ratio(self) -> float:
        """Updates of b divided by those of a."""
        return self.b.updates / self.a.updates if self.a.updates else math.nan

    @property
    def winner(self) -> ComparedSide | None:
        """The side that is better with p < 0.05 and has not diverged at any seed; None without."""
        if self.test is None or not self.test.is_significant:
            return None
        better = self._better(self.test.difference)
        return None if better.diverged() else better

    @property
    def verdict(self) -> str:
        """The result in words."""
        divergences = self._divergences()
        if self.test is None:
            return (
                f"no verdict: {divergences}; a test needs two seeds without divergence on both "
                f"sides, got {len(self.pairs)}"
            )
        words = self._verdict_of(self.test)
        if not divergences:
            return words
        return f"{divergences}; at the other {self.test.count} seeds: {words}"

    def _better(self, difference: float) -> ComparedSide:
        is_lower_better = self.direction == "minimize"
        return self.b if (difference < 0) == is_lower_better else self.a

    def _divergences(self) -> str:
        sides = [
            f"{side.name} has diverged at {len(seeds)} of {len(side.runs)} seeds "
            f"({', '.join(map(str, seeds))})"
            for side in (self.a, self.b)
            if (seeds := side.diverged())
        ]
        return " and ".join(sides)

    def _verdict_of(self, test: PairedTest) -> str:
        count = f"n = {test.count}"
        if not test.is_defined:
            what = "are equal" if test.difference == 0 else f"differ by {_short(test.difference)}"
            return (
                f"no verdict: the sides {what} at every seed ({count}), so that there is no test; "
                "check that the configs are the intended ones, and that their trainings use the "
                "seed"
            )
        size = _short(abs(test.difference))
        if test.is_significant:
            return self._significant(test, size, count)
        low, high = test.interval
        statistics = (
            f"95 % interval of b - a {_short(low)} to {_short(high)}, p = {test.p_value:.2g}, "
            f"{count}"
        )
        limit = test.detectable if self.relevant is None else self.relevant
        what = (
            f"the smallest difference that {test.count} seeds could have shown"
            if self.relevant is None
            else "the smallest difference that matters"
        )
        start = f"the difference {size} is not significant"
        if not -limit < low <= high < limit:
            text = (
                f"inconclusive: {start}, and the interval reaches beyond ± {_short(limit)}, {what}"
            )
        elif self.relevant is None and test.count < _FEWEST_FOR_NOISE:
            text = (
                f"inconclusive: {start}, and without relevant it takes {_FEWEST_FOR_NOISE} "
                "seeds to call it noise"
            )
        else:
            inside = f"the whole interval lies within ± {_short(limit)}, {what}"
            return f"noise: {start}, and {inside} ({statistics}){self._with_updates()}"
        return f"{text} ({statistics}){self._seeds_needed(test)}{self._with_updates()}"

    def _significant(self, test: PairedTest, size: str, count: str) -> str:
        better = self._better(test.difference)
        other = self.a if better is self.b else self.b
        low, high = sorted(map(abs, test.interval))
        ratio = better.updates / other.updates if other.updates else math.nan
        share = "" if ratio == 1 else f" with {ratio:.2f} × the updates of {other.name}"
        text = (
            f"{better.name} is better by {size}{share} (95 % interval {_short(low)} to "
            f"{_short(high)}, p = {test.p_value:.2g}, {count})"
        )
        if self.relevant is not None and abs(test.difference) < self.relevant:
            text += f", which is less than the {_short(self.relevant)} that matters"
        return text

    def _with_updates(self) -> str:
        ratio = self.updates_ratio
        if ratio == 1:
            return ""
        return f"; {self.b.name} has trained {ratio:.2f} × the updates of {self.a.name}"

    def _seeds_needed(self, test: PairedTest) -> str:
        wanted = abs(test.difference) if self.relevant is None else self.relevant
        try:
            count = pairs_needed(test.deviation, wanted)
        except ValueError:  # more seeds than anybody trains
            return ""
        if count <= test.count:  # another draw of these seeds would have shown it
            return ""
        return f"; about {count} seeds would show {_short(wanted)}"

    def edges(self) -> list[str]:
        """Returns one sentence for each tuned value at an end of its range, with what to do."""
        return [
            f"{side.name}: {advice}"
            for side in (self.a, self.b)
            if side.study is not None
            for advice in side.study.edges()
        ]

    def divergences(self) -> list[str]:
        """Returns one sentence for each training that has diverged."""
        return [
            f"{side.name}, seed {run.seed}: {run.reason}"
            for side in (self.a, self.b)
            for run in side.runs
            if run.loss is None
        ]

    def cost(self) -> str:
        """Returns the updates and seconds of searches and trainings as text."""
        sides = (self.a, self.b)
        runs = [run for side in sides for run in side.runs]
        updates, seconds = sum(r.updates for r in runs), sum(r.seconds for r in runs)
        text = f"{updates:,} updates in {seconds:,.0f} s"
        studies = [side.study for side in sides if side.study is not None]
        if not studies:
            return text
        searched = sum(study.updates for study in studies)
        spent = sum(study.seconds for study in studies)
        return f"{text}, and {searched:,} updates in {spent:,.0f} s of search"

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the table as text: a head, one row per seed, means of the pairs, and updates."""
        losses = zip(self.seeds, self.a.losses, self.b.losses, strict=True)
        digits = self._decimals()
        rows = [
            (
                str(seed),
                *("diverged" if x is None else f"{x:.{digits}f}" for x in (first, second)),
                "" if first is None or second is None else f"{second - first:.{digits + 1}f}",
            )
            for seed, first, second in losses
        ]
        first, second = self.means
        means = ("mean", f"{first:.{digits}f}", f"{second:.{digits}f}")
        return [
            ("seed", self.a.name, self.b.name, "b - a"),
            *rows,
            (*means, f"{second - first:.{digits + 1}f}"),
            ("updates", *(f"{side.updates:,.6g}" for side in (self.a, self.b)), ""),
        ]

    def _decimals(self) -> int:
        """Returns the decimals with which the largest value has five digits."""
        largest = max((abs(x) for pair in self.pairs for x in pair), default=1.0) or 1.0
        return min(max(4 - math.floor(math.log10(largest)), 0), 15)

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        tuned = [
            f"{side.name}: {', '.join(f'{path}={_short(v)}' for path, v in values.items())}"
            for side in (self.a, self.b)
            if (values := side.best_values)
        ]
        return "\n".join(
            [
                f"{self.monitor} of {self.a.name} (a) and {self.b.name} (b), {self.direction}d",
                self.verdict,
                *self.edges(),
                *self.divergences(),
                *tuned,
                f"cost: {self.cost()}",
                "",
                *lines,
            ]
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
