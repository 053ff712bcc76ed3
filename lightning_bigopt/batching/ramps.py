"""Batch-size policies that change at places laid down before the run: steps and ramps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import ClassVar, TypeAlias

from lightning_bigopt.batching.policies import BatchContext, BatchSizePolicy, Rounding, check_size
from lightning_bigopt.batching.staircase import Staircase
from lightning_bigopt.durations import Duration, Progress, Unit

__all__ = ["BatchSizeRamp", "BatchSizeSteps"]

_PAIR = re.compile(r"([\d_.]+(?:[eE][+-]?\d+)?[KMBT]?%?):([\d_]+)")
Thresholds: TypeAlias = (
    Mapping[str | int | float, int] | tuple[tuple[str | int | float, int], ...] | str
)


@dataclass(frozen=True)
class BatchSizeSteps(BatchSizePolicy):
    """Sizes from thresholds on; of the thresholds reached, the last as written holds.

    Args:
        sizes: A mapping from threshold to global batch, such as
            ``{"0%": 256, "30%": 512, "2e9 tokens": 1024}``, kept as a tuple of pairs. Units may be
            mixed. Megatron's string form is read by :meth:`parse`.

    Raises:
        ValueError: If nothing starts at zero, if the thresholds of one unit do not ascend, if a
            size is not a positive integer, or if the size never changes.

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
            pairs = tuple((threshold, size) for threshold, size in self.sizes)
        object.__setattr__(self, "sizes", pairs)
        self._check()

    def _check(self) -> None:
        if not self._pairs:
            raise ValueError("sizes must not be empty, got {}; write {'0%': 256, '50%': 512}")
        last: dict[Unit, float] = {}
        for position, (threshold, size) in enumerate(self._pairs):
            length = Duration.parse(threshold, name="a threshold of sizes")
            check_size(f"sizes[{threshold!r}]", size)
            if position == 0 and length.value != 0:
                raise ValueError(
                    f"sizes must start at zero, got {threshold!r} as the first threshold; "
                    f"put '0%' before it"
                )
            if length.value <= last.get(length.unit, -1.0):
                raise ValueError(
                    f"sizes must have ascending thresholds in {length.unit}, got {threshold!r} "
                    f"after {Duration(last[length.unit], length.unit)}; sort them"
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
            text: Pairs ``threshold:size`` with spaces between; K, M, B and T multiply a threshold
                by 1e3, 1e6, 1e9 and 1e12; ``30%`` is a share of the budget.
            unit: What bare thresholds count. Megatron's command line counts tokens.

        Returns:
            The policy.

        Raises:
            ValueError: If ``text`` is not of this form.

        Example:
            >>> BatchSizeSteps.parse("0:768 250B:1536").sizes
            (('0 tokens', 768), ('250B tokens', 1536))
            >>> BatchSizeSteps.parse("0:32 10K:64", unit="samples").sizes
            (('0 samples', 32), ('10K samples', 64))
        """
        return cls(_read_pairs(text, unit=unit))

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """The size of the last threshold reached."""
        return self._stairs.at(progress)

    @property
    def written_sizes(self) -> dict[str, int]:
        """Every size, by its threshold."""
        return {f"sizes[{threshold!r}]": size for threshold, size in self._pairs}

    @property
    def units(self) -> frozenset[Unit]:
        """The units of the thresholds."""
        return frozenset(Duration.parse(threshold).unit for threshold, _ in self._pairs[1:])

    def staircase(self, *, context: BatchContext | None = None) -> Staircase:
        """The thresholds."""
        return self._stairs

    @property
    def _pairs(self) -> tuple[tuple[str | int | float, int], ...]:
        assert isinstance(self.sizes, tuple)  # normalized in __post_init__
        return self.sizes

    @cached_property
    def _stairs(self) -> Staircase:
        return Staircase([(Duration.parse(threshold), size) for threshold, size in self._pairs])


def _read_pairs(text: str, *, unit: Unit) -> tuple[tuple[str | int | float, int], ...]:
    pairs: list[tuple[str | int | float, int]] = []
    for word in text.split():
        match = _PAIR.fullmatch(word)
        if match is None:
            raise ValueError(
                f"sizes must be pairs 'threshold:size' when it is a string, got {word!r} in "
                f"{text!r}; write '0:768 250B:1536'"
            )
        threshold = match[1] if match[1].endswith("%") else f"{match[1]} {unit}"
        pairs.append((threshold, int(match[2])))
    return tuple(pairs)


@dataclass(frozen=True)
class BatchSizeRamp(BatchSizePolicy):
    r"""A ramp from ``start`` to ``end`` in equal increments, flat afterwards.

    As Megatron's ``--rampup-batch-size``: with :math:`n = (end - start) / increment`, each
    increment lasts :math:`over / n`, so that ``end`` is reached when ``over`` has passed.

    Args:
        start: Global batch of the first update.
        end: Global batch from ``over`` on.
        over: How long the ramp takes, in any unit.
        increment: Samples by which it changes at a time; None for the smallest change that the
            plan allows.

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
        check_size("start", self.start)
        check_size("end", self.end)
        length = Duration.parse(self.over, name="over")
        if length.value == 0:
            raise ValueError(f"over must be positive, got {self.over!r}; write over='30%'")
        if self.start == self.end:
            raise ValueError(
                f"end must differ from start, got {self.end} for both; use "
                f"ConstantBatchSize({self.end})"
            )
        if self.increment is None:
            return
        check_size("increment", self.increment)
        difference = abs(self.end - self.start)
        if difference % self.increment:
            below = next(n for n in range(self.increment, 0, -1) if difference % n == 0)
            raise ValueError(
                f"increment must divide end - start = {difference}, got {self.increment}; write "
                f"{below}, or None for the smallest change that the plan allows"
            )

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """``start`` plus the increments that are due."""
        return self._stairs.at(progress)

    @property
    def written_sizes(self) -> dict[str, int]:
        """Both ends."""
        return {"start": self.start, "end": self.end}

    @property
    def units(self) -> frozenset[Unit]:
        """The unit of ``over``."""
        return frozenset({Duration.parse(self.over).unit})

    def staircase(self, *, context: BatchContext | None = None) -> Staircase:
        """One stair an increment."""
        return self._stairs

    @cached_property
    def _stairs(self) -> Staircase:
        length = Duration.parse(self.over)
        step = (self.increment or 1) * (1 if self.end > self.start else -1)
        increments = (self.end - self.start) // step
        return Staircase(
            [
                (Duration(i * length.value / increments, length.unit), self.start + i * step)
                for i in range(increments + 1)
            ]
        )
