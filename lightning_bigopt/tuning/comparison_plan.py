"""The options of a comparison, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from typing import Any

from lightning_bigopt.checks import check_choice, check_count, check_positive, shown
from lightning_bigopt.reporting.study import Direction
from lightning_bigopt.tuning.space import Space, checked_space
from lightning_bigopt.tuning.tuned_ranges import checked_paths
from lightning_bigopt.type_checks import check_instance, path_or_none

__all__ = ["ComparisonPlan"]


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """The options of :func:`~lightning_bigopt.tuning.compare.compare`, with their names there.

    Raises:
        ValueError: If an option is invalid.

    Example:
        >>> plan = ComparisonPlan(seeds=3, tune="lr")
        >>> plan.seed_numbers, plan.paths
        ((1, 2, 3), (('lr',), ('lr',)))
    """

    seeds: int | Sequence[int] = 8
    tune: str | Sequence[str] | None = None
    tune_b: str | Sequence[str] | None = None
    space: Space | None = None
    trials: int = 16
    monitor: str = "val_loss"
    direction: Direction = "minimize"
    sampler: Any = "TPE"
    pruner: Any = "auto"
    seed: int = 0
    relevant: float | None = None
    folder: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        seeds: Any = self.seeds
        if type(seeds) is not bool and isinstance(seeds, Integral):
            object.__setattr__(self, "seeds", int(seeds))  # an integer of numpy
        check_count("seed", self.seed, minimum=0, hint="write 0")
        check_count("trials", self.trials, of="trials", hint="write 16")
        check_choice("direction", self.direction, Direction)
        check_instance("monitor", self.monitor, str, hint="write monitor='val_loss'")
        if self.relevant is not None:
            hint = "write the smallest difference that matters"
            check_positive("relevant", self.relevant, hint=hint)
        path_or_none("folder", self.folder, hint="write folder='comparison'")
        if self.tune_b is not None and self.tune is None:
            raise ValueError(
                f"tune must name the paths of the first side to tune, got None with tune_b="
                f"{shown(self.tune_b)}: both sides are tuned, or none; write tune='lr'"
            )
        self._check_seeds()
        self._check_space()

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds of the comparison."""
        if isinstance(self.seeds, int):
            return tuple(range(self.seed + 1, self.seed + 1 + self.seeds))
        return tuple(self.seeds)

    @property
    def paths(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Paths of the tuned fields of both sides."""
        first = checked_paths("tune", self.tune)
        return first, checked_paths("tune_b", self.tune_b) or first

    def _check_seeds(self) -> None:
        seeds: Any = self.seeds
        if isinstance(seeds, int):
            check_count("seeds", seeds, minimum=2, hint="write 8: a test needs pairs")
            return
        if not isinstance(seeds, Sequence) or isinstance(seeds, str) or len(seeds) < 2:
            raise ValueError(
                f"seeds must be a number of seeds or a list of at least two, got {shown(seeds)}; "
                "write seeds=8"
            )
        for seed in seeds:
            check_count("every seed", seed, minimum=0, hint="write seeds=8")
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"seeds must be different from each other, got {shown(list(seeds))}; the same seed "
                "trains the same again: remove the repeated one"
            )
        if self.seed in seeds and self.paths != ((), ()):
            raise ValueError(
                f"seeds must not contain the seed of the search, got {self.seed}: the best values "
                "were chosen at it; pass another seed="
            )

    def _check_space(self) -> None:
        tuned = {path for paths in self.paths for path in paths}
        if self.space is None:
            return
        if not tuned:
            raise ValueError(
                "tune must name the paths of the space to tune, got None; write tune="
                f"{shown(list(checked_space(self.space)))}"
            )
        for path in checked_space(self.space):
            if path not in tuned:
                raise ValueError(
                    f"space must contain paths of tune, got {path!r}; add it to tune, or remove it"
                )
