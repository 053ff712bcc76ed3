"""Chain: schedules one after another."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_choice, shown
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.schedules.base import Schedule, check_schedule
from lightning_bigopt.schedules.part_lengths import check_fit, part_horizon, resolved_share
from lightning_bigopt.schedules.shapes import TOLERANCE, position

__all__ = ["Chain"]


class _Piece(NamedTuple):
    """A part with a positive length: its beginning, length, schedule and multiplier."""

    begin: float
    length: float
    schedule: Schedule
    scale: float


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class Chain(Schedule):
    r"""Schedules one after another, each over its own part of the budget.

    .. math:: s(\tau) = k_i\, s_i\!\left(\frac{\tau - a_i}{d_i}\right)
        \quad \text{for } a_i \le \tau < a_i + d_i

    A percentage as length of a part refers to the whole chain; within a part it refers to that
    part. Other durations within a part are counted from the beginning of the part.

    Args:
        parts: Pairs (length :math:`d_i`, schedule :math:`s_i`), then one schedule without a
            length, which takes the rest.
        seams: Treatment of a part that does not begin at the last factor of the previous part:
            ``"raise"`` an error, ``"jump"``, or ``"scale"`` the part by :math:`k_i` so that it
            does.

    Raises:
        ValueError: If ``parts`` has another form, the lengths exceed the budget, or the factor
            jumps between two parts (found when the chain is resolved).

    Example:
        >>> from lightning_bigopt.schedules import Constant, Linear
        >>> chain = Chain([("50%", Constant()), Linear()])
        >>> [chain(tau) for tau in (0.25, 0.5, 0.75, 1.0)]
        [1.0, 1.0, 0.5, 0.0]

    References:
        torch, ``SequentialLR``, whose parts may jump without an error.
    """

    parts: Sequence[tuple[DurationLike, Schedule] | Schedule] = field(kw_only=False)
    seams: Literal["raise", "jump", "scale"] = "raise"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("seams", self.seams, Literal["raise", "jump", "scale"])
        parts: Any = self.parts
        if not isinstance(parts, list | tuple) or not parts:
            raise ValueError(
                f"parts must be a list that ends with a Schedule, got {shown(parts)}; for instance "
                "[('50%', Constant()), Linear()]"
            )
        *timed, last = parts
        pairs: list[tuple[Duration, Schedule]] = []
        for index, part in enumerate(timed):
            if not isinstance(part, list | tuple) or len(part) != 2:
                raise ValueError(
                    f"parts[{index}] must be a pair (duration, schedule), got {shown(part)}; only "
                    "the last part has no duration"
                )
            check_schedule(f"parts[{index}][1]", part[1])
            pairs.append((Duration.parse(part[0], name=f"parts[{index}][0]"), part[1]))
        if not isinstance(last, Schedule):
            raise ValueError(
                f"parts[{len(timed)}] must be a Schedule without a duration, because it takes the "
                f"rest, got {shown(last)}; add one at the end, such as Linear()"
            )
        self._set(parts=(*pairs, last))
        check_fit({f"parts[{i}]": length for i, (length, _) in enumerate(pairs)})

    @property
    def _lengths(self) -> list[Duration]:
        """Lengths of all parts but the last."""
        return [Duration.parse(part[0]) for part in self.parts if not isinstance(part, Schedule)]

    @property
    def _schedules(self) -> list[Schedule]:
        """Schedules of all parts."""
        return [part if isinstance(part, Schedule) else part[1] for part in self.parts]

    @cached_property
    def _pieces(self) -> tuple[list[float], list[_Piece]]:
        """Beginnings of the parts with a positive length, and these parts."""
        shares = [resolved_share(d, f"Chain.parts[{i}][0]") for i, d in enumerate(self._lengths)]
        begins = list(accumulate(shares, initial=0.0))
        lengths = [*shares, 1.0 - begins[-1]]
        pieces: list[_Piece] = []
        for begin, length, schedule in zip(begins, lengths, self._schedules, strict=True):
            if length > TOLERANCE:
                scale = self._scale(pieces[-1], begin, schedule) if pieces else 1.0
                pieces.append(_Piece(begin, length, schedule, scale))
        return [piece.begin for piece in pieces], pieces

    def _scale(self, before: _Piece, begin: float, schedule: Schedule) -> float:
        """Returns the multiplier that makes a part begin where the previous part ended."""
        if self.seams == "jump":
            return 1.0
        reached, first = before.schedule.factor(1.0) * before.scale, schedule.factor(0.0)
        if math.isclose(reached, first, rel_tol=1e-6, abs_tol=1e-9):
            return 1.0
        if self.seams == "scale" and first:
            return reached / first
        raise ValueError(
            f"parts must meet at their seams, got a jump from {reached:g} to {first:g} at "
            f"{begin:.1%} of the chain; pass seams='jump' to allow it, or seams='scale' to scale "
            "the later part"
        )

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        begins, pieces = self._pieces
        # With the tolerance: a boundary that is reached up to a rounding error belongs to the later
        # part, as the update there does.
        begin, length, schedule, scale = pieces[bisect_right(begins, fraction + TOLERANCE) - 1]
        return scale * schedule.factor(position(fraction, begin, length))

    def resolve(self, horizon: Horizon) -> Schedule:
        """Resolves each schedule on its own part of the horizon.

        Raises:
            ValueError: If a duration cannot be converted, the parts are longer than the budget, or
                the factor jumps between two parts.
        """
        named = {f"parts[{index}]": length for index, length in enumerate(self._lengths)}
        shares = horizon.shares(named)
        begins = list(accumulate(shares, initial=0.0))
        lengths = [*shares, 1.0 - begins[-1]]
        schedules = [
            schedule.resolve(part_horizon(horizon, begin, length))
            for begin, length, schedule in zip(begins, lengths, self._schedules, strict=True)
        ]
        timed = zip(shares, schedules[:-1], strict=True)
        pairs = [(Duration(share, "fraction"), schedule) for share, schedule in timed]
        resolved = self._changed(parts=(*pairs, schedules[-1]))
        resolved(0.0)  # raises for a jump before the training begins
        return resolved

    def boundaries(self) -> dict[str, float]:
        """Returns the boundaries between the parts, and those of each part."""
        found: dict[str, float] = {}
        for number, piece in enumerate(self._pieces[1], start=1):
            if number > 1:
                found[f"part {number} starts"] = piece.begin
            for name, at in piece.schedule.boundaries().items():
                found[f"part {number}: {name}"] = piece.begin + at * piece.length
        return found

    def warmup_end(self) -> float:
        """Returns the end of the first rise.

        A part that only rises, such as ``Linear(start=0.0, end=1.0)``, is a warm-up if another part
        follows, and the warm-up may continue in that part.
        """
        pieces, end = self._pieces[1], 0.0
        for piece in pieces:
            rise = piece.schedule.warmup_end()
            if not rise and piece is not pieces[-1] and _only_rises(piece.schedule):
                rise = 1.0
            if rise:
                end = piece.begin + rise * piece.length
            if rise < 1.0 or self.seams == "jump":
                break
        return end


def _only_rises(schedule: Schedule) -> bool:
    """Samples a schedule and returns True if it ends above its beginning and never falls."""
    factors = [schedule.factor(index / 16) for index in range(17)]
    return factors[0] < factors[-1] and all(a <= b for a, b in pairwise(factors))
