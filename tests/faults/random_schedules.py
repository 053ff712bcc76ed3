"""Random schedules, each with its closed form."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from lightning_bigopt import schedules as s
from tests.faults import run_oracle as oracle
from tests.faults.run_oracle import Curve, Length
from tests.oracles import schedules as paper


@dataclass(frozen=True)
class Run:
    """Amounts of a run, for durations that fit into it."""

    updates: int
    samples: int
    epochs: float


class Maker:
    """Makes random schedules for a run.

    Args:
        generator: The random numbers.
        run: Amounts of the run.
    """

    def __init__(self, generator: random.Random, run: Run) -> None:
        self.random, self.run = generator, run

    def number(self, low: float = 0.0, high: float = 1.0) -> float:
        return round(self.random.uniform(low, high), 3)

    def length(self, low: float, high: float) -> Length:
        """Returns a duration of about a part of the run between two fractions."""
        share = self.random.uniform(low, high)
        unit = self.random.choice(("percent", "percent", "steps", "samples", "epochs"))
        if unit == "percent":
            return Length(round(100 * share, 1), "percent")
        if unit == "epochs":
            return Length(round(share * self.run.epochs, 3) or 0.05, "epochs")
        total = self.run.updates if unit == "steps" else self.run.samples
        return Length(max(1, round(share * total)), unit)

    def make(self, depth: int = 0) -> tuple[s.Schedule, Curve]:
        """Returns a schedule and its closed form."""
        simple = [
            *(self.constant, self.linear, self.cosine, self.polynomial, self.rex, self.cooldown),
            *(self.exponential, self.step_decay, self.multi_step, self.piecewise, self.power),
            *(self.inverse_square_root, self.restarts, self.cyclic),
        ]
        recipes = [
            *(self.warmup_constant, self.warmup_linear, self.warmup_cosine, self.stable_decay),
            *(self.warmup_inverse_square_root, self.infinite, self.tri_stage, self.one_cycle),
            self.noam,
        ]
        composed = [self.warmup, self.chain, self.product, self.clamp]
        kinds: list[Callable[[], tuple[s.Schedule, Curve]]] = simple
        if not depth:
            kinds = self.random.choice((simple, recipes, composed))
        return self.random.choice(kinds)()

    # ------------------------------------------------------------------------------- simple

    def constant(self) -> tuple[s.Schedule, Curve]:
        level = self.number()
        return s.Constant(level), lambda tau, part: level

    def linear(self) -> tuple[s.Schedule, Curve]:
        start, end = self.number(), self.number()
        return s.Linear(start=start, end=end), lambda tau, part: start + (end - start) * tau

    def cosine(self) -> tuple[s.Schedule, Curve]:
        start, end = self.number(), self.number()
        schedule = s.Cosine(start=start, end=end)
        return schedule, lambda tau, part: paper.sgdr(tau, 1.0, end, start)

    def polynomial(self) -> tuple[s.Schedule, Curve]:
        power, end = self.number(0.5, 3.0), self.number()
        schedule = s.Polynomial(power=power, end=end)
        return schedule, lambda tau, part: end + (1 - end) * paper.polynomial(tau, 1.0, power)

    def rex(self) -> tuple[s.Schedule, Curve]:
        end = self.number()
        return s.REX(end=end), lambda tau, part: end + (1 - end) * paper.rex(tau, 1.0)

    def cooldown(self) -> tuple[s.Schedule, Curve]:
        shape = self.random.choice(("linear", "cosine", "1-sqrt", "exponential"))
        start, end = self.number(), self.number()
        schedule = s.Cooldown(shape=shape, start=start, end=end)
        return schedule, lambda tau, part: end + (start - end) * oracle.fall(shape, tau)

    def exponential(self) -> tuple[s.Schedule, Curve]:
        decay, every = self.number(0.1, 1.0), self.length(0.2, 0.9)
        schedule = s.Exponential(decay=decay, every=every.text(self.random))
        return schedule, lambda tau, part: decay ** oracle.periods(tau, part, every)

    def step_decay(self) -> tuple[s.Schedule, Curve]:
        decay, every = self.number(0.1, 1.0), self.length(0.15, 0.6)
        schedule = s.StepDecay(decay=decay, every=every.text(self.random))
        return (
            schedule,
            lambda tau, part: decay ** math.floor(oracle.periods(tau, part, every) + oracle.NEAR),
        )

    def _table(self) -> list[tuple[Length, float]]:
        moments = sorted({round(100 * self.random.uniform(0.05, 0.95), 1) for _ in range(3)})
        return [(Length(moment, "percent"), self.number()) for moment in moments]

    def multi_step(self) -> tuple[s.Schedule, Curve]:
        table = self._table()
        schedule = s.MultiStep({f"{moment.value}%": factor for moment, factor in table})
        return schedule, lambda tau, part: oracle.milestones(tau, part, table)

    def piecewise(self) -> tuple[s.Schedule, Curve]:
        table = self._table()
        schedule = s.PiecewiseLinear({f"{moment.value}%": factor for moment, factor in table})
        return schedule, lambda tau, part: oracle.piecewise(tau, part, table)

    def power(self) -> tuple[s.Schedule, Curve]:
        exponent, scale = -self.number(0.1, 1.5), self.length(0.05, 0.3)
        schedule = s.Power(exponent, timescale=scale.text(self.random))
        return schedule, lambda tau, part: (1 + oracle.periods(tau, part, scale)) ** exponent

    def inverse_square_root(self) -> tuple[s.Schedule, Curve]:
        scale = self.length(0.05, 0.3)
        schedule = s.InverseSquareRoot(timescale=scale.text(self.random))
        return schedule, lambda tau, part: (1 + oracle.periods(tau, part, scale)) ** -0.5

    def restarts(self) -> tuple[s.Schedule, Curve]:
        first, decay, end = self.length(0.15, 0.5), self.number(0.2, 1.0), self.number(0.0, 0.5)
        schedule = s.CosineWithRestarts(
            first_cycle=first.text(self.random), cycle_decay=decay, end=end
        )
        return schedule, lambda tau, part: oracle.restarts(
            tau, part, first=first, decay=decay, end=end
        )

    def cyclic(self) -> tuple[s.Schedule, Curve]:
        low, up, decay = self.number(), self.length(0.1, 0.4), self.number(0.2, 1.0)
        mode = self.random.choice(("triangular", "triangular2", "exp_range"))
        schedule = s.Cyclic(low=low, up=up.text(self.random), mode=mode, cycle_decay=decay)
        return schedule, lambda tau, part: oracle.cyclic(
            tau, part, low=low, up=up, mode=mode, decay=decay
        )

    # ------------------------------------------------------------------------------ recipes

    def _warmup(self) -> tuple[Length, str, float, dict[str, object]]:
        length, start = self.length(0.05, 0.4), self.number(0.0, 0.5)
        shape = self.random.choice(("linear", "cosine", "1-sqrt"))
        written = {"warmup": length.text(self.random), "warmup_shape": shape, "start": start}
        return length, shape, start, written

    def warmup_constant(self) -> tuple[s.Schedule, Curve]:
        length, shape, start, written = self._warmup()
        curve = oracle.warmed_up(length, lambda tau, part: 1.0, shape=shape, start=start)
        return s.WarmupConstant(**written), curve

    def warmup_linear(self) -> tuple[s.Schedule, Curve]:
        length, shape, start, written = self._warmup()
        end = self.number()
        inner: Curve = lambda tau, part: 1 + (end - 1) * tau  # noqa: E731
        curve = oracle.warmed_up(length, inner, shape=shape, start=start)
        return s.WarmupLinear(**written, end=end), curve

    def warmup_cosine(self) -> tuple[s.Schedule, Curve]:
        length, shape, start, written = self._warmup()
        end = self.number()
        inner: Curve = lambda tau, part: paper.sgdr(tau, 1.0, end, 1.0)  # noqa: E731
        curve = oracle.warmed_up(length, inner, shape=shape, start=start)
        return s.WarmupCosine(**written, end=end), curve

    def warmup_inverse_square_root(self) -> tuple[s.Schedule, Curve]:
        length, shape, start, written = self._warmup()
        scale = self.length(0.05, 0.3)

        def inner(tau: float, part: oracle.Part) -> float:
            if scale.unit == "percent":  # a percentage refers to the whole budget
                return (1 + 100 * tau * part.length / scale.value) ** -0.5
            return (1 + oracle.periods(tau, part, scale)) ** -0.5

        curve = oracle.warmed_up(length, inner, shape=shape, start=start)
        schedule = s.WarmupInverseSquareRoot(**written, timescale=scale.text(self.random))
        return schedule, curve

    def stable_decay(self) -> tuple[s.Schedule, Curve]:
        warmup, decay = self.length(0.05, 0.4), self.length(0.1, 0.45)
        shape = self.random.choice(("linear", "cosine", "1-sqrt", "exponential"))
        start, end = self.number(0.0, 0.5), self.number(0.0, 0.5)
        schedule = s.WarmupStableDecay(
            warmup=warmup.text(self.random),
            start=start,
            decay=decay.text(self.random),
            cooldown=shape,
            end=end,
        )
        return schedule, lambda tau, part: oracle.stable_decay(
            tau, part, warmup=warmup, decay=decay, shape=shape, start=start, end=end
        )

    def infinite(self) -> tuple[s.Schedule, Curve]:
        warmup, decay, plateau = self.length(0.05, 0.3), self.length(0.1, 0.5), self.number()
        schedule = s.InfiniteSchedule(
            warmup=warmup.text(self.random), decay=decay.text(self.random), plateau=plateau
        )
        return schedule, lambda tau, part: oracle.infinite(
            tau, part, warmup=warmup, decay=decay, plateau=plateau
        )

    def tri_stage(self) -> tuple[s.Schedule, Curve]:
        warmup, hold, decay = (self.length(0.05, 0.3) for _ in range(3))
        start, end = self.number(0.0, 0.5), self.number(0.01, 0.5)
        schedule = s.TriStage(
            warmup=warmup.text(self.random),
            hold=hold.text(self.random),
            decay=decay.text(self.random),
            start=start,
            end=end,
        )
        return schedule, lambda tau, part: oracle.tri_stage(
            tau, part, warmup=warmup, hold=hold, decay=decay, start=start, end=end
        )

    def one_cycle(self) -> tuple[s.Schedule, Curve]:
        warmup, start, end = self.length(0.1, 0.5), self.number(0.0, 0.5), self.number(0.0, 0.2)
        shape = self.random.choice(("cosine", "linear"))
        schedule = s.OneCycle(warmup=warmup.text(self.random), start=start, end=end, shape=shape)
        return schedule, lambda tau, part: oracle.one_cycle(
            tau, part, warmup=warmup, start=start, end=end, shape=shape
        )

    def noam(self) -> tuple[s.Schedule, Curve]:
        # Vaswani et al. 2017, Eq. 3, divided by its value at the end of the warm-up, in fractions.
        warmup = self.length(0.05, 0.4)

        def curve(tau: float, part: oracle.Part) -> float:
            share = part.share(warmup)
            oracle.check_fit(share)
            passed = tau / share
            return min(passed, passed**-0.5) if passed else 0.0

        return s.Noam(warmup=warmup.text(self.random)), curve

    # --------------------------------------------------------------------------- compositions

    def warmup(self) -> tuple[s.Schedule, Curve]:
        length, shape, start, _ = self._warmup()
        schedule, inner = self.make(1)
        written = s.Warmup(length.text(self.random), schedule, shape=shape, start=start)
        return written, oracle.warmed_up(length, inner, shape=shape, start=start)

    def chain(self) -> tuple[s.Schedule, Curve]:
        pieces = [(self.length(0.1, 0.4), self.make(1)) for _ in range(self.random.randint(1, 2))]
        last, last_curve = self.make(1)
        parts = [(length.text(self.random), schedule) for length, (schedule, _) in pieces]
        written = s.Chain([*parts, last], seams="jump")
        return written, oracle.chain([(n, curve) for n, (_, curve) in pieces], last_curve)

    def product(self) -> tuple[s.Schedule, Curve]:
        (first, a), (second, b) = self.make(1), self.make(1)
        return s.Product([first, second]), lambda tau, part: a(tau, part) * b(tau, part)

    def clamp(self) -> tuple[s.Schedule, Curve]:
        schedule, curve = self.make(1)
        low, high = sorted((self.number(), self.number()))
        return s.Clamp(schedule, low=low, high=high), lambda tau, part: min(
            max(curve(tau, part), low), high
        )
