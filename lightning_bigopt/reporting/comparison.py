"""The result of a comparison of two trainings as plain data: losses by seed, test and verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lightning_bigopt.reporting.paired_test import PairedTest, pairs_needed
from lightning_bigopt.reporting.study import Direction, StudyRecord

__all__ = ["ComparedSide", "ComparisonRecord", "SeedRun"]


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """One training of a side.

    Args:
        seed: Seed of the weights and of the order of the samples.
        loss: Monitored value at the end; None if the training has diverged.
        reason: Why it has no loss; "" if it has one.
        updates: Updates that were trained.
        seconds: Duration.
    """

    seed: int
    loss: float | None
    reason: str = ""
    updates: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ComparedSide:
    """One side of a comparison.

    Args:
        name: Name of the side, such as that of its config file.
        runs: One training for each seed.
        best_values: The tuned values by path; empty without a search.
        config: The config with these values, as YAML; of a side made by functions the values only.
        study: The search; None without one.
    """

    name: str
    runs: tuple[SeedRun, ...]
    best_values: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    study: StudyRecord | None = None

    @property
    def losses(self) -> tuple[float | None, ...]:
        """The monitored value of each seed; None for a training that has diverged."""
        return tuple(run.loss for run in self.runs)

    @property
    def updates(self) -> float:
        """Mean updates of the trainings that have not diverged; NaN without one."""
        found = [run.updates for run in self.runs if run.loss is not None]
        return fmean(found) if found else math.nan

    @property
    def seconds(self) -> float:
        """Duration of the trainings of all seeds together, without the search."""
        return sum(run.seconds for run in self.runs)

    @property
    def mean(self) -> float:
        """Mean of the monitored value over the seeds that have not diverged; NaN without one."""
        found = [loss for loss in self.losses if loss is not None]
        return fmean(found) if found else math.nan

    def diverged(self) -> list[int]:
        """Returns the seeds at which the training has diverged."""
        return [run.seed for run in self.runs if run.loss is None]


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
            complete = sum(None not in pair for pair in self._pairs())
            return (
                f"no verdict: {divergences}; a test needs two seeds without divergence on both "
                f"sides, got {complete}"
            )
        words = self._verdict_of(self.test)
        if not divergences:
            return words
        return f"{divergences}; at the other {self.test.count} seeds: {words}"

    def _pairs(self) -> list[tuple[float | None, float | None]]:
        return list(zip(self.a.losses, self.b.losses, strict=True))

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
        if -limit < low and high < limit:
            reason = (
                f"is smaller than the smallest that {test.count} seeds could have shown, "
                f"{_short(test.detectable)}"
                if self.relevant is None
                else f"is not significant, and one of {_short(limit)} is outside the interval"
            )
            return f"noise: the difference {size} {reason} ({statistics}){self._with_updates()}"
        return (
            f"inconclusive: the difference {size} is not significant, but one of {_short(limit)} "
            f"is inside the interval ({statistics}){self._seeds_needed(test)}"
            f"{self._with_updates()}"
        )

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
        wanted = max(abs(test.difference), 0.0) if self.relevant is None else self.relevant
        try:
            return (
                f"; about {pairs_needed(test.deviation, wanted)} seeds would show {_short(wanted)}"
            )
        except ValueError:  # more seeds than anybody trains
            return ""

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
        """Returns the table of losses as text: a head, one row per seed, and the mean."""
        head = ("seed", self.a.name, self.b.name, "b - a")
        rows = [
            (
                str(seed),
                _loss(first),
                _loss(second),
                "" if first is None or second is None else _short(second - first),
            )
            for seed, (first, second) in zip(self.seeds, self._pairs(), strict=True)
        ]
        means = ("mean", _loss(self.a.mean), _loss(self.b.mean), _loss(self.difference))
        updates = ("updates", *(f"{side.updates:,.6g}" for side in (self.a, self.b)), "")
        return [head, *rows, means, updates]

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


def _loss(value: float | None) -> str:
    """Returns a loss with five decimals, so that differences between seeds can be seen."""
    return "diverged" if value is None else f"{value:.5g}"
