"""One side of a comparison as plain data: its trainings, one for each seed, and its search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lightning_bigopt.reporting.study import StudyRecord

__all__ = ["ComparedSide", "SeedRun"]


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

    def diverged(self) -> list[int]:
        """Returns the seeds at which the training has diverged."""
        return [run.seed for run in self.runs if run.loss is None]
