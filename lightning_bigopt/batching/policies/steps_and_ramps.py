"""Batch-size policies that change at thresholds fixed in advance: steps and ramps."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import ClassVar, TypeAlias

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.batching.policies.batch_size_policy import (
    BatchContext,
    BatchSizePolicy,
    Rounding,
)
from lightning_bigopt.batching.step_function import StepFunction, threshold_of
from lightning_bigopt.checks import check_choice, check_count, shown
from lightning_bigopt.durations.duration import Duration, Unit
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.type_checks import check_instance

__all__ = ["BatchSizeRamp", "BatchSizeSteps"]

_PAIR = re.compile(r"([\d_.]+(?:[eE][+-]?\d+)?[KMBT]?%?):(\d[\d_]{0,30})")
_HINT = "write an int such as 256"
_MOST_STEPS = 100_000
"""Increments up to which a simulation takes one step for each; beyond, one step for each update."""
Thresholds: TypeAlias = (
    Mapping[str | int | float, int] | tuple[tuple[str | int | float, int], ...] | str
)


@explain_arguments
@dataclass(frozen=True)
class BatchSizeSteps(BatchSizePolicy):
    """A piecewise-constant batch size; the last threshold reached, in the order written, applies.

    Args:
        sizes: A mapping from threshold to global batch in samples, such as
            ``{"0%": 256, "30%": 512, "2e9 tokens": 1024}``; it is stored as a tuple of pairs.
            Thresholds may be in different units. A string is read by :meth:`parse`.

    Raises:
        ValueError: If the first threshold is not zero, if the thresholds of one unit do not
            ascend, if a size is not a positive integer, or if the size never changes.

    Example:
        >>> policy = BatchSizeSteps({"0%": 256, "30%": 512})
        >>> [policy(Progress(fraction=f)) for f in (0.0, 0.29, 0.3, 1.0)]
        [256, 256, 512, 512]
        >>> policy.sizes
        (('0%', 256), ('30%', 512))
    """

    sizes: Thresholds

    def __post_init__(self) -> None:
        if isinstance(self.sizes, str):
            pairs = _read_pairs(self.sizes, unit="tokens")
        elif isinstance(self.sizes, Mapping):
            pairs = tuple(self.sizes.items())
        else:
            try:
                pairs = tuple((threshold, size) for threshold, size in self.sizes)
            except (TypeError, ValueError):
                raise ValueError(
                    "sizes must be a mapping from threshold to global batch, got "
                    f"{shown(self.sizes)}; write {{'0%': 32, '50%': 64}}"
                ) from None
        given = self.sizes
        object.__setattr__(self, "sizes", pairs)
        self._check(given)

    def _check(self, given: object) -> None:
        if not self._pairs:
            raise ValueError(
                f"sizes must not be empty, got {shown(given)}; write {{'0%': 256, '50%': 512}}"
            )
        last: dict[Unit, float] = {}
        for position, (threshold, size) in enumerate(self._pairs):
            length = Duration.parse(threshold, name="a threshold of sizes")
            check_count(f"sizes[{shown(threshold)}]", size, of="samples", hint=_HINT)
            if position == 0 and length.value != 0:
                raise ValueError(
                    f"sizes must start at zero, got {shown(threshold)} as the first threshold; "
                    "put '0%' before it"
                )
            if length.value <= last.get(length.unit, -1.0):
                raise ValueError(
                    f"sizes must have ascending thresholds in {length.unit}, got "
                    f"{shown(threshold)} after {Duration(last[length.unit], length.unit)}; sort "
                    "them"
                )
            last[length.unit] = length.value
        if len({size for _, size in self._pairs}) == 1:
            size = self._pairs[0][1]
            raise ValueError(
                f"sizes must change, got {size} at every threshold; use ConstantBatchSize({size})"
            )

    @classmethod
    def parse(cls, text: str, *, unit: Unit = "tokens") -> BatchSizeSteps:
        """Reads Megatron's ``--step-batch-size-schedule``: ``"0:768 250B:1536 500B:3072"``.

        Args:
            text: Pairs ``threshold:size``, separated by spaces; the suffixes K, M, B and T
                multiply a threshold by 1e3, 1e6, 1e9 and 1e12; ``30%`` is a fraction of the budget.
            unit: Unit of thresholds without ``%``. Megatron's command line counts tokens.

        Returns:
            The policy.

        Raises:
            ValueError: If ``text`` has another form.

        Example:
            >>> BatchSizeSteps.parse("0:768 250B:1536").sizes
            (('0 tokens', 768), ('250B tokens', 1536))
            >>> BatchSizeSteps.parse("0:32 10K:64", unit="samples").sizes
            (('0 samples', 32), ('10K samples', 64))
        """
        check_instance("text", text, str, hint="write '0:768 250B:1536'")
        check_choice("unit", unit, Unit)
        return cls(_read_pairs(text, unit=unit))

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Returns the size of the last threshold reached."""
        return self._step_function.at(progress)

    @property
    def explicit_sizes(self) -> dict[str, int]:
        """Every size, by its threshold."""
        return {f"sizes[{shown(threshold)}]": size for threshold, size in self._pairs}

    @property
    def units(self) -> frozenset[Unit]:
        """Units of the thresholds; the first is zero and needs no count."""
        return frozenset(Duration.parse(threshold).unit for threshold, _ in self._pairs[1:])

    def step_function(self, *, context: BatchContext | None = None) -> StepFunction:
        """Returns one step per threshold."""
        return self._step_function

    @property
    def _pairs(self) -> tuple[tuple[str | int | float, int], ...]:
        assert isinstance(self.sizes, tuple)  # normalized in __post_init__
        return self.sizes

    @cached_property
    def _step_function(self) -> StepFunction:
        return StepFunction([(Duration.parse(threshold), size) for threshold, size in self._pairs])


def _read_pairs(text: str, *, unit: Unit) -> tuple[tuple[str | int | float, int], ...]:
    pairs: list[tuple[str | int | float, int]] = []
    for word in text.split():
        match = _PAIR.fullmatch(word)
        if match is None:
            raise ValueError(
                f"sizes must be pairs 'threshold:size' when it is a string, got {shown(word)} in "
                f"the text {shown(text)}; write '0:768 250B:1536'"
            )
        threshold = match[1] if match[1].endswith("%") else f"{match[1]} {unit}"
        pairs.append((threshold, int(match[2])))
    return tuple(pairs)


@explain_arguments
@dataclass(frozen=True)
class BatchSizeRamp(BatchSizePolicy):
    r"""A ramp from ``start`` to ``end`` in equal increments, flat afterwards.

    It equals Megatron's ``--rampup-batch-size``: with :math:`n = (end - start) / increment`, each
    increment lasts :math:`over / n`, so that ``end`` is reached when ``over`` has passed.

    Args:
        start: Global batch in samples of the first update.
        end: Global batch in samples from ``over`` on.
        over: Duration of the ramp, in any unit.
        increment: Samples by which the batch changes at a time; None for the smallest change that
            fits micro-batch and processes.

    Raises:
        ValueError: If a size is not a positive integer, ``start`` equals ``end``, ``over`` is zero,
            or ``increment`` does not divide the difference.

    Example:
        >>> ramp = BatchSizeRamp(start=32, end=128, over="3000 samples", increment=32)
        >>> [ramp(Progress(fraction=0.0, samples=n)) for n in (0, 999, 1000, 2999, 3000, 9000)]
        [32, 32, 64, 96, 128, 128]
    """

    rounding: ClassVar[Rounding] = "nearest"

    start: int
    _: KW_ONLY
    end: int
    over: str | int | float
    increment: int | None = None

    def __post_init__(self) -> None:
        check_count("start", self.start, of="samples", hint=_HINT)
        check_count("end", self.end, of="samples", hint=_HINT)
        length = Duration.parse(self.over, name="over")
        if length.value == 0:
            raise ValueError(f"over must be positive, got {shown(self.over)}; write over='30%'")
        if self.start == self.end:
            raise ValueError(
                f"end must differ from start, got {self.end} for both; use "
                f"ConstantBatchSize({self.end})"
            )
        if self.increment is None:
            return
        check_count("increment", self.increment, of="samples", hint="write an int such as 32")
        difference = abs(self.end - self.start)
        if difference % self.increment:
            nearby = range(min(self.increment, difference), 0, -1)[:100_000]
            divisors = (n for n in nearby if difference % n == 0)
            below = next(divisors, math.gcd(difference, self.increment))
            raise ValueError(
                f"increment must divide end - start = {difference}, got {self.increment}; write "
                f"{below}, or None for the smallest change that fits"
            )

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Returns ``start`` plus the increments reached."""
        consumed = progress.consumed(self._length.unit)
        increments = range(self._increments + 1)
        reached = bisect_right(increments, consumed, key=self._threshold) - 1
        return self.start + max(0, reached) * self._step

    @property
    def explicit_sizes(self) -> dict[str, int]:
        """``start`` and ``end``."""
        return {"start": self.start, "end": self.end}

    @property
    def units(self) -> frozenset[Unit]:
        """Unit of ``over``."""
        return frozenset({self._length.unit})

    def step_function(self, *, context: BatchContext | None = None) -> StepFunction | None:
        """Returns one step per increment; None for more increments than a run has updates."""
        return None if self._increments > _MOST_STEPS else self._step_function

    @cached_property
    def _step_function(self) -> StepFunction:
        unit = self._length.unit
        return StepFunction(
            [
                (Duration(self._amount(i), unit), self.start + i * self._step)
                for i in range(self._increments + 1)
            ]
        )

    @cached_property
    def _length(self) -> Duration:
        return Duration.parse(self.over)

    @cached_property
    def _step(self) -> int:
        # Without an increment the ramp has a step for every sample; rounding to the nearest size
        # that fits makes these steps as large as micro-batch and processes require.
        return (self.increment or 1) * (1 if self.end > self.start else -1)

    @cached_property
    def _increments(self) -> int:
        return (self.end - self.start) // self._step

    def _amount(self, index: int) -> float:
        return index * self._length.value / self._increments

    def _threshold(self, index: int) -> float:
        return threshold_of(self._amount(index), self._length.unit)
