"""Samples and learning-rate factors of every update of a run, by plain formulas.

The module does not import the package. A run is simulated window by window; schedules are the
formulas of the documentation and the papers in the fraction of the budget, durations are
converted along the simulated run.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

Unit = Literal["percent", "steps", "samples", "epochs"]
NEAR = 1e-9


@dataclass(frozen=True)
class Length:
    """A duration: an amount in a unit."""

    value: float
    unit: Unit

    def text(self, generator: random.Random) -> Any:
        """Returns one of the forms in which users write it."""
        if self.unit == "percent":
            return generator.choice([f"{self.value:g}%", self.value / 100])
        if self.unit == "steps":
            return generator.choice([int(self.value), f"{self.value:g} steps"])
        return f"{self.value:g} {self.unit}"


@dataclass(frozen=True)
class Limit:
    """The budget of the run: an amount in steps, epochs or samples."""

    value: float
    unit: Literal["steps", "epochs", "samples"]


@dataclass(frozen=True)
class Update:
    """One update: its samples, the planned global batch, and the amounts consumed before it."""

    rows: tuple[int, ...]
    planned: int | None
    fraction: float
    steps: int
    samples: int
    epochs: float


Size = Callable[[Callable[[Unit], float]], int]
"""A policy: the global batch, from a function that returns the amount consumed in a unit."""


def simulate(
    data: int, micro: int, *, limit: Limit, size: Size | None, accumulate: int, exact: bool
) -> tuple[list[Update], dict[str, list[float]]]:
    """Simulates a run.

    Args:
        data: Samples in an epoch, in order.
        micro: Samples in a batch of the loader; the last of an epoch may have less.
        limit: End of the run.
        size: The policy; None for a fixed number of batches.
        accumulate: Batches of an update without a policy.
        exact: Whether windows have any number of samples (GlobalBatchLoader).

    Returns:
        The updates, and the amounts consumed before each update and after the last, by unit.
    """
    batches = -(-data // micro)
    updates: list[Update] = []
    steps = samples = epoch = position = 0

    def consumed(unit: str) -> float:
        inside = position / data if exact else -(-position // micro) / batches
        amounts = {"steps": steps, "samples": samples, "epochs": epoch + inside}
        if unit == "percent":
            return 100 * amounts[limit.unit] / limit.value
        return amounts[unit]

    axis: dict[str, list[float]] = {unit: [] for unit in ("steps", "samples", "epochs", "percent")}

    def mark() -> None:
        for unit, amounts in axis.items():
            amounts.append(consumed(unit))

    while consumed(limit.unit) < limit.value - NEAR:
        mark()
        planned = None if size is None else size(consumed)
        width = accumulate * micro if planned is None else planned
        rows = tuple(range(position, min(position + width, data)))
        fraction = consumed("percent") / 100
        updates.append(Update(rows, planned, fraction, steps, samples, consumed("epochs")))
        steps, samples, position = steps + 1, samples + len(rows), position + len(rows)
        if position == data:
            epoch, position = epoch + 1, 0
    mark()
    return updates, axis


@dataclass(frozen=True)
class Part:
    """A part of the run on which a schedule is defined, from one fraction of the budget on."""

    axis: dict[str, list[float]]
    begin: float = 0.0
    length: float = 1.0

    def _convert(self, value: float, source: str, target: str) -> float:
        """Interpolates linearly between updates; the last update continues beyond the run."""
        xs, ys = self.axis[source], self.axis[target]
        index = min(max(bisect.bisect_right(xs, value) - 1, 0), len(xs) - 2)
        slope = (ys[index + 1] - ys[index]) / (xs[index + 1] - xs[index])
        return ys[index] + (value - xs[index]) * slope

    def amount(self, tau: float, unit: str) -> float:
        """Returns the amount consumed since the beginning of the part, at a fraction of it."""
        if unit == "percent":
            return 100 * tau
        at = 100 * (self.begin + tau * self.length)
        return self._convert(at, "percent", unit) - self._convert(100 * self.begin, "percent", unit)

    def share(self, length: Length, *, start: float = 0.0, stop: float | None = None) -> float:
        """Returns the fraction of the part that a duration takes, from ``start`` or to ``stop``."""
        if length.unit == "percent":
            return length.value / 100
        edge = 100 * (self.begin + (start if stop is None else stop) * self.length)
        amount = self._convert(edge, "percent", length.unit)
        other = amount + length.value if stop is None else amount - length.value
        return abs(self._convert(other, length.unit, "percent") - edge) / 100 / self.length

    def sub(self, begin: float, length: float) -> Part:
        """Returns a part of this part."""
        return Part(self.axis, self.begin + begin * self.length, length * self.length)


Curve = Callable[[float, Part], float]
"""A schedule: the factor at a fraction of a part of the run."""


class TooLong(Exception):  # noqa: N818
    """The parts of a schedule are longer than the run; the package must raise."""


def check_fit(*shares: float) -> None:
    """Raises unless parts fit into a run."""
    if sum(shares) > 1 + NEAR:
        raise TooLong


def fall(shape: str, r: float) -> float:
    """The cooldowns of Hägele et al. 2024 and Megatron, from 1 to 0."""
    return {
        "linear": 1 - r,
        "cosine": (1 + math.cos(math.pi * r)) / 2,
        "1-sqrt": 1 - math.sqrt(r),
        "exponential": 2 * 0.5**r - 1,
    }[shape]


def between(tau: float, begin: float, length: float) -> float:
    """Returns the position in an interval, in [0, 1]; a boundary reached but for rounding is 1."""
    if length <= 0:
        return 1.0
    r = (tau - begin) / length
    return 1.0 if r > 1 - NEAR else max(r, 0.0)


def warmed_up(length: Length, inner: Curve, *, shape: str = "linear", start: float = 0.0) -> Curve:
    """A rise from ``start`` to the first factor of a curve over the rest."""

    def curve(tau: float, part: Part) -> float:
        d = part.share(length)
        check_fit(d)
        rest = part.sub(d, 1 - d)
        r = between(tau, 0.0, d)
        if r == 1.0:
            return inner(between(tau, d, 1 - d), rest)
        rise = r if shape == "linear" else fall(shape, 1 - r)
        return start + rise * (inner(0.0, rest) - start)

    return curve


def periods(tau: float, part: Part, every: Length) -> float:
    """Returns the number of periods since the beginning of the part."""
    return part.amount(tau, every.unit) / every.value


def cyclic(tau: float, part: Part, *, low: float, up: Length, mode: str, decay: float) -> float:
    """Smith 2017, Sec. 3.1, with equal halves."""
    x = periods(tau, part, up)
    cycle = math.floor(1 + x / 2 + NEAR)
    wave = max(0.0, 1 - abs(x - 2 * cycle + 1))
    scale = {
        "triangular": 1.0,
        "triangular2": decay ** (cycle - 1),
        "exp_range": decay ** (x / 2),
    }[mode]
    return low + (1 - low) * wave * scale


def restarts(tau: float, part: Part, *, first: Length, decay: float, end: float) -> float:
    """SGDR with equal cycles; the last factor of a run that ends with a cycle is ``end``."""
    x = periods(tau, part, first)
    index = math.floor(x + NEAR)
    r = max(0.0, x - index)
    peak = max(decay**index, end)
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * r))


def milestones(tau: float, part: Part, table: Sequence[tuple[Length, float]]) -> float:
    """The factor of the last milestone reached; 1 before the first."""
    factor = 1.0
    for moment, value in table:
        if part.share(moment) <= tau + NEAR:
            factor = value
    return factor


def piecewise(tau: float, part: Part, table: Sequence[tuple[Length, float]]) -> float:
    """Straight lines between points, constant outside them."""
    xs = [part.share(moment) for moment, _ in table]
    ys = [factor for _, factor in table]
    if tau <= xs[0]:
        return ys[0]
    for (x0, x1), (y0, y1) in zip(pairwise(xs), pairwise(ys), strict=True):
        if tau <= x1:
            return y0 + (y1 - y0) * (tau - x0) / (x1 - x0)
    return ys[-1]


def stable_decay(
    tau: float, part: Part, *, warmup: Length, decay: Length, shape: str, start: float, end: float
) -> float:
    """Hägele et al. 2024: warm-up, constant, cooldown that ends with the budget."""
    w, d = part.share(warmup), part.share(decay, stop=1.0)
    check_fit(w, d)
    r = between(tau, 0.0, w)
    if r < 1:
        return start + r * (1 - start)
    return end + fall(shape, between(tau, 1 - d, d)) * (1 - end) if tau > 1 - d else 1.0


def tri_stage(
    tau: float, part: Part, *, warmup: Length, hold: Length, decay: Length, start: float, end: float
) -> float:
    """Park et al. 2019: linear rise, constant, exponential decay to ``end``, constant."""
    w = part.share(warmup)
    h = part.share(hold, start=w)
    d = part.share(decay, start=w + h)
    check_fit(w, h, d)
    if (r := between(tau, 0.0, w)) < 1:
        return start + r * (1 - start)
    return end ** between(tau, w + h, d) if tau > w + h else 1.0


def infinite(tau: float, part: Part, *, warmup: Length, decay: Length, plateau: float) -> float:
    """Ibrahim et al. 2024: warm-up, cosine to a constant factor."""
    w = part.share(warmup)
    d = part.share(decay, start=w)
    check_fit(w, d)
    if (r := between(tau, 0.0, w)) < 1:
        return r
    return plateau + (1 - plateau) * 0.5 * (1 + math.cos(math.pi * between(tau, w, d)))


def one_cycle(
    tau: float, part: Part, *, warmup: Length, start: float, end: float, shape: str
) -> float:
    """Smith & Topin 2018: two annealed curves that meet at the peak."""
    w = part.share(warmup)
    check_fit(w)

    def anneal(a: float, b: float, r: float) -> float:
        return a + (b - a) * (r if shape == "linear" else (1 - math.cos(math.pi * r)) / 2)

    r = between(tau, 0.0, w)
    return anneal(start, 1.0, r) if r < 1 else anneal(1.0, end, between(tau, w, 1 - w))


def chain(pieces: Sequence[tuple[Length, Curve]], last: Curve) -> Curve:
    """Curves one after another; the last takes the rest. Jumps are allowed."""

    def curve(tau: float, part: Part) -> float:
        begin = 0.0
        shares: list[float] = []
        for length, _ in pieces:
            shares.append(part.share(length, start=sum(shares)))
        check_fit(*shares)
        for length, inner in pieces:
            share = part.share(length, start=begin)
            if tau < begin + share - NEAR:
                return inner(between(tau, begin, share), part.sub(begin, share))
            begin += share
        return last(between(tau, begin, 1 - begin), part.sub(begin, 1 - begin))

    return curve
