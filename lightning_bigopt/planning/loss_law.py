"""LossLaw: predicts the loss of a run from its schedule, fitted to a few short runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_count, check_non_negative, check_positive, shown
from lightning_bigopt.planning.expected_loss import ExpectedLoss
from lightning_bigopt.planning.loss_curve import FEWEST_LOSSES, LossCurve
from lightning_bigopt.planning.loss_law_fit import LawFit
from lightning_bigopt.planning.multi_power_law import (
    Array,
    MultiPowerLaw,
    RateHistory,
    check_rates,
    numbers,
)
from lightning_bigopt.planning.pilots import check_pilots, decays
from lightning_bigopt.schedules.base import Schedule, check_schedule
from lightning_bigopt.type_checks import check_instance, checked_tuple

__all__ = ["LossLaw"]

_POINTS = 200
_QUANTILES = (0.05, 0.95)
_SAME = 1e-3  # relative difference of learning rates that are equal in a log of float32


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class LossLaw:
    """The loss of a model as a function of its learning rates, and how well it is known.

    A law is fitted to pilots: runs of the same model, data, batch size and optimizer that are
    shorter than the run to predict, or have another schedule. The Multi-Power Law then gives the
    loss of any schedule. It says nothing about the instability of a high learning rate, about
    overfitting, or about a batch size that changes.

    The band of 90 % contains five kinds of error: the noise of the losses (the blocks of the runs
    are weighted at random, Bayesian bootstrap); the exponents of the drop, which a few runs do not
    determine (drawn at random between their bounds); the difference from a law that fits only the
    second half of the losses that count, because short runs fall faster than the law at first;
    twice the error for an unseen schedule, which is measured by predicting each pilot from the
    others; and, for each doubling of the sum of the learning rates beyond that of the pilots, twice
    this error again and the error of predicting the second half of the losses from the first.

    Args:
        law: The law that fits best.
        draws: Other laws that fit as well, for the band.
        late: The law that fits the second halves of the losses best, for the band; None if a pilot
            has fewer than 8 losses there, or all are equal.
        unseen: Mean absolute error for a pilot that the fit does not see, the largest of all, in
            units of the loss; at least the residual of the fit.
        extrapolation: Error of a prediction for twice the updates, in units of the loss.
        peaks: Lowest and highest peak learning rate of the pilots.
        total: Largest sum of the learning rates of a pilot.

    Example:
        >>> from lightning_bigopt.schedules import WarmupCosine, WarmupLinear
        >>> law = MultiPowerLaw(
        ...     floor=3.0, scale=0.5, alpha=0.5, drop=400, drop_speed=2.0, beta=0.6, gamma=0.65
        ... )
        >>> known = LossLaw(law=law, peaks=(3e-4, 3e-4), total=6.0)
        >>> schedules = {"cosine": WarmupCosine(end=0.1), "linear": WarmupLinear(end=0.0)}
        >>> [e.name for e in known.rank(schedules, learning_rate=3e-4, updates=20_000)]
        ['cosine', 'linear']

    References:
        Luo et al., "A Multi-Power Law for Loss Curve Prediction Across Learning Rate Schedules",
        ICLR 2025; Rubin, "The Bayesian Bootstrap", Annals of Statistics, 1981.
    """

    law: MultiPowerLaw
    draws: tuple[MultiPowerLaw, ...] = ()
    late: MultiPowerLaw | None = None
    unseen: float = 0.0
    extrapolation: float = 0.0
    peaks: tuple[float, float]
    total: float

    def __post_init__(self) -> None:
        check_instance("law", self.law, MultiPowerLaw, hint="write LossLaw.fit(runs)")
        given: Any = self.draws
        is_empty = isinstance(given, (list, tuple)) and not given
        draws = () if is_empty else checked_tuple("draws", self.draws, MultiPowerLaw)
        if self.late is not None:
            check_instance("late", self.late, MultiPowerLaw, hint="leave it out")
        for name in ("unseen", "extrapolation"):
            check_non_negative(name, getattr(self, name))
        peaks = numbers("peaks", self.peaks, hint="write (3e-4, 3e-4)").tolist()
        if len(peaks) != 2 or peaks[0] > peaks[1]:
            raise ValueError(
                f"peaks must be the lowest and the highest peak, got {shown(self.peaks)}; write "
                "(3e-4, 3e-4)"
            )
        low, high = peaks
        for name, value in {"peaks[0]": low, "peaks[1]": high, "total": self.total}.items():
            check_positive(name, value)
        object.__setattr__(self, "draws", draws)
        object.__setattr__(self, "peaks", (low, high))

    @classmethod
    def fit(
        cls, runs: Sequence[LossCurve], *, start: int = 0, draws: int = 60, seed: int = 0
    ) -> LossLaw:
        """Fits the law to runs; it takes seconds.

        Args:
            runs: The losses of at least two runs, at least one of which decays its learning rate.
                Losses during the warm-up are left out; a loss of single batches is averaged over
                up to 64 bins. Take all losses of one kind, such as validation losses.
            start: Number of updates before the first loss that counts, if the warm-up is shorter.
                The loss of a very short run falls faster than the law at first.
            draws: Number of other laws for the band, at least 20.
            seed: Seed of the draws.

        Returns:
            The law.

        Raises:
            ValueError: If there are too few runs or losses, no run decays, or a loss is not
                positive.
            ImportError: If scipy is not installed.
        """
        curves = checked_tuple("runs", runs, LossCurve, hint="write [read_loss_curve('runs/a'), …]")
        check_count("start", start, minimum=0, of="updates", hint="write 0")
        check_count("draws", draws, minimum=20, hint="write 60")
        check_count("seed", seed, minimum=0, hint="write 0")
        check_pilots(curves, start=start)
        _require_scipy()
        fit = LawFit(curves, start=start)
        generator = np.random.default_rng(seed)
        peaks = [curve.peak for curve in curves]
        return cls(
            law=fit.law,
            draws=tuple(fit.draw(generator) for _ in range(draws)),
            late=_late_law(curves, start),
            unseen=max(fit.residual, *_errors_of_unseen(curves, fit.law, start)),
            extrapolation=fit.extrapolation_error(),
            peaks=(min(peaks), max(peaks)),
            total=max(sum(curve.learning_rates) for curve in curves),
        )

    def predict(
        self, schedule: Schedule, *, learning_rate: float, updates: int, name: str = ""
    ) -> ExpectedLoss:
        """Predicts the loss of a run after its warm-up.

        Args:
            schedule: The schedule of the run.
            learning_rate: Base learning rate, at which the schedule has the factor 1.
            updates: Number of updates of the run.
            name: Name of the result; "" for the class of the schedule.

        Returns:
            Expected losses with a band. Reasons to doubt them, such as a learning rate that no
            pilot had, are warnings and ``notes`` of the result.

        Raises:
            ValueError: If an argument is invalid.
        """
        check_schedule("schedule", schedule)
        check_positive("learning_rate", learning_rate)
        check_count("updates", updates, hint="write 10_000")
        found = self.predict_learning_rates(
            schedule.values(updates, base=learning_rate), name=name or type(schedule).__name__
        )
        for note in found.notes:
            warnings.warn(f"The prediction for {found.name}: {note}.", UserWarning, stacklevel=2)
        return found

    def predict_learning_rates(
        self, learning_rates: Sequence[float] | Array, *, name: str = ""
    ) -> ExpectedLoss:
        """Predicts the loss of a run from the learning rate of each of its updates.

        Args:
            learning_rates: Learning rate of each update, from the first on.
            name: Name of the result.
        """
        rates = check_rates(learning_rates)
        first = int(np.argmax(rates)) + 1
        count = min(_POINTS, rates.size - first + 1)
        ends = np.unique(np.linspace(first, rates.size, count).round().astype(np.int64))
        history = RateHistory(rates, [int(end) for end in ends])
        losses = self.law.losses_of(history)
        low, high = self._band(history, losses)
        return ExpectedLoss(
            name=name,
            updates=tuple(map(int, ends)),
            losses=tuple(map(float, losses)),
            low=tuple(map(float, low)),
            high=tuple(map(float, high)),
            notes=tuple(self._notes(rates, first)),
        )

    def rank(
        self,
        schedules: Mapping[str, Schedule],
        *,
        learning_rate: float | Mapping[str, float],
        updates: int,
    ) -> list[ExpectedLoss]:
        """Predicts several schedules, and returns them with the lowest final loss first.

        Args:
            schedules: The schedules by name.
            learning_rate: Base learning rate of all, or of each by name.
            updates: Number of updates of each run.
        """
        check_instance("schedules", schedules, Mapping, hint="write {'cosine': WarmupCosine()}")
        if not schedules:
            raise ValueError(
                "schedules must not be empty, got {}; write {'cosine': WarmupCosine()}"
            )
        rates = learning_rate
        if isinstance(rates, Mapping) and (missing := sorted(set(schedules) - set(rates))):
            raise ValueError(
                f"learning_rate must have an entry for each schedule, got none for {missing}; "
                "add it"
            )
        found = [
            self.predict(
                schedule,
                learning_rate=rates[name] if isinstance(rates, Mapping) else rates,
                updates=updates,
                name=name,
            )
            for name, schedule in schedules.items()
        ]
        return sorted(found, key=lambda expected: expected.final)

    def _band(self, history: RateHistory, losses: Array) -> tuple[Array, Array]:
        drawn = [losses, *(law.losses_of(history) for law in self.draws)]
        low, high = np.quantile(np.asarray(drawn), _QUANTILES, axis=0)
        others = [losses] if self.late is None else [losses, self.late.losses_of(history)]
        low, high = np.min([low, *others], axis=0), np.max([high, *others], axis=0)
        doublings = np.log2(np.maximum(history.sums / self.total, 1.0))
        margin = 2.0 * self.unseen * (1.0 + doublings) + self.extrapolation * doublings
        return low - margin, high + margin

    def _notes(self, rates: Array, first: int) -> list[str]:
        notes = []
        peak, (low, high) = float(rates.max()), self.peaks
        if not low * (1 - _SAME) <= peak <= high * (1 + _SAME):
            of_pilots = f"{low:.3g}" if math.isclose(low, high) else f"{low:.3g} to {high:.3g}"
            notes.append(
                f"its peak learning rate {peak:.3g} is outside those of the pilots, {of_pilots}, "
                "and the law does not know when training becomes unstable; train a pilot with it"
            )
        after = rates[first - 1 :]
        if (np.diff(after) > _SAME * peak).any():
            notes.append(
                "its learning rate rises again after the warm-up, and the law was measured for "
                "schedules that only decay"
            )
        return notes


def _late_law(curves: Sequence[LossCurve], start: int) -> MultiPowerLaw | None:
    """Returns the law of the second half of the counted losses; None if too few or all equal."""
    halves = []
    for curve in curves:
        updates, losses = (values.tolist() for values in curve.counted(start=start))
        middle = len(losses) // 2
        halves.append(replace(curve, updates=updates[middle:], losses=losses[middle:]))
    are_equal = all(len(set(half.losses)) == 1 for half in halves)
    if are_equal or min(len(half.losses) for half in halves) < FEWEST_LOSSES:
        return None
    return LawFit(halves).law


def _errors_of_unseen(curves: Sequence[LossCurve], best: MultiPowerLaw, start: int) -> list[float]:
    """Returns the mean absolute error of each run as predicted from the others.

    A run is left out only if another one decays: the drop would be unknown without it.
    """
    errors = []
    # From the parameters of all runs: their neighborhood contains the best ones of most runs.
    for unseen in curves:
        others = [curve for curve in curves if curve is not unseen]
        if any(map(decays, others)):
            law = LawFit(others, start=start, near=best).law
            ends, losses = unseen.binned(_POINTS, start=start)
            predicted = law.losses(unseen.learning_rates, [int(end) for end in ends])
            errors.append(float(np.abs(predicted - losses).mean()))
    return errors


def _require_scipy() -> None:
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "scipy must be installed to fit a law; run pip install 'lightning-bigopt[laws]'"
        ) from error
