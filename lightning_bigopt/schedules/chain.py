"""Schedules one after another."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

from lightning_bigopt.durations import Duration, DurationLike, Horizon
from lightning_bigopt.schedules.base import Schedule, check_schedule
from lightning_bigopt.schedules.checks import (
    SNAP,
    check_choice,
    check_fit,
    position,
    resolved_share,
)
from lightning_bigopt.schedules.composition import Composition, window

__all__ = ["Chain"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Chain(Composition):
    r"""Schedules one after another, each on its own 0 … 1.

    .. math:: s(\tau) = k_i\, s_i\!\left(\frac{\tau - a_i}{d_i}\right)
        \quad \text{for } a_i \le \tau < a_i + d_i

    A percentage as length of a part is a share of the chain's whole; inside a part it is a share
    of that part. Other durations inside a part are counted from where the part begins.

    Args:
        parts: Pairs (length :math:`d_i`, schedule :math:`s_i`), then one schedule without a
            length, which takes the rest.
        seams: What happens where a part does not begin at the factor that the one before reached:
            ``"raise"``, ``"jump"``, or ``"scale"`` it by :math:`k_i` so that it does.

    Raises:
        ValueError: If ``parts`` has another form, the lengths exceed the budget, or a seam jumps
            (found when the chain is resolved).

    Example:
        >>> from lightning_bigopt.schedules import Constant, Linear
        >>> chain = Chain([("50%", Constant()), Linear()])
        >>> [chain(tau) for tau in (0.25, 0.5, 0.75, 1.0)]
        [1.0, 1.0, 0.5, 0.0]

    References:
        torch, ``SequentialLR``, whose parts jump in silence.
    """

    parts: Sequence[tuple[DurationLike, Schedule] | Schedule] = field(kw_only=False)
    seams: Literal["raise", "jump", "scale"] = "raise"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("seams", self.seams, Literal["raise", "jump", "scale"])
        parts: Any = self.parts
        if not isinstance(parts, list | tuple) or not parts:
            raise ValueError(f"parts must be a list that ends with a Schedule, got {parts!r}")
        *timed, last = parts
        pairs: list[tuple[Duration, Schedule]] = []
        for index, part in enumerate(timed):
            if not isinstance(part, list | tuple) or len(part) != 2:
                raise ValueError(
                    f"parts[{index}] must be a pair (duration, schedule), got {part!r}; only the "
                    "last part has no duration"
                )
            check_schedule(f"parts[{index}][1]", part[1])
            pairs.append((Duration.parse(part[0], name=f"parts[{index}][0]"), part[1]))
        if not isinstance(last, Schedule):
            raise ValueError(
                f"parts[{len(timed)}] must be a Schedule without a duration, because it takes the "
                f"rest, got {last!r}"
            )
        self._set(parts=(*pairs, last))
        check_fit({f"parts[{i}]": length for i, (length, _) in enumerate(pairs)})

    @property
    def _lengths(self) -> list[Duration]:
        return [Duration.parse(part[0]) for part in self.parts if not isinstance(part, Schedule)]

    def _inner(self) -> tuple[Schedule, ...]:
        return tuple([part if isinstance(part, Schedule) else part[1] for part in self.parts])

    @cached_property
    def _pieces(self) -> tuple[list[float], list[tuple[float, float, Schedule, float]]]:
        """Beginnings, and (begin, length, schedule, scale) of every part that takes time."""
        shares = [resolved_share(d, f"Chain.parts[{i}][0]") for i, d in enumerate(self._lengths)]
        begins = list(accumulate(shares, initial=0.0))
        laid: list[tuple[float, float, Schedule, float]] = []
        rest = 1.0 - begins[-1]
        for begin, length, part in zip(begins, [*shares, rest], self._inner(), strict=True):
            if length > SNAP:
                laid.append((begin, length, part, self._scale(begin, laid[-1:], part)))
        return [begin for begin, *_ in laid], laid

    def _scale(
        self, begin: float, before: list[tuple[float, float, Schedule, float]], part: Schedule
    ) -> float:
        """What ``part`` is multiplied by so that it begins where the one before it ended."""
        if not before or self.seams == "jump" or before[0][2].needs_base or part.needs_base:
            return 1.0
        (_, _, previous, scale), first = before[0], part.factor(0.0)
        reached = previous.factor(1.0) * scale
        if math.isclose(reached, first, rel_tol=1e-6, abs_tol=1e-9):
            return 1.0
        if self.seams == "scale" and first:
            return reached / first
        raise ValueError(
            f"parts must meet at their seams, got a jump from {reached:g} to {first:g} at "
            f"{begin:.1%} of the chain; pass seams='jump' if it is meant, or seams='scale' to "
            "scale the later part"
        )

    def scaled(self, fraction: float, base: float) -> float:
        """Follows the formula above, times ``base``; ``fraction`` in [0, 1]."""
        begins, laid = self._pieces
        begin, length, part, scale = laid[bisect_right(begins, fraction + SNAP) - 1]
        return part.scaled(position(fraction, begin, length), base * scale)

    def resolve(self, horizon: Horizon) -> Schedule:
        """The same on resolved parts, each on its own part of the horizon."""
        named = {f"parts[{index}]": length for index, length in enumerate(self._lengths)}
        shares = horizon.shares(named)
        begins = list(accumulate(shares, initial=0.0))
        schedules = [
            part.resolve(window(horizon, begin, length))
            for begin, length, part in zip(
                begins, [*shares, 1.0 - begins[-1]], self._inner(), strict=True
            )
        ]
        timed = zip(shares, schedules[:-1], strict=True)
        pairs = [(Duration(share, "fraction"), schedule) for share, schedule in timed]
        resolved = self._changed(parts=(*pairs, schedules[-1]))
        resolved.scaled(0.0, 1.0)  # finds a seam that jumps before the training does
        return resolved

    def boundaries(self) -> dict[str, float]:
        """The seams of the parts, and those between them."""
        seams: dict[str, float] = {}
        for number, (begin, length, part, _) in enumerate(self._pieces[1], start=1):
            if number > 1:
                seams[f"part {number} starts"] = begin
            for name, at in part.boundaries().items():
                seams[f"part {number}: {name}"] = begin + at * length
        return seams
