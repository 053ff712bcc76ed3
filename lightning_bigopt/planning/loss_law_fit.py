"""Fits the Multi-Power Law to loss curves with scipy, and draws other laws that fit as well."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lightning_bigopt.planning.loss_curve import LossCurve
from lightning_bigopt.planning.multi_power_law import Array, MultiPowerLaw, RateHistory

__all__ = ["EXPONENTS", "LawFit"]

EXPONENTS = (0.4, 0.8)
"""Bounds of the two exponents of the drop; published fits lie between 0.58 and 0.66."""

_POINTS, _GROUPS = 64, 128
_BLOCKS = 8
_LOSS_SCALE = 1e-3  # relative residual from which on the loss function grows linearly


class LawFit:
    r"""Fits a law to the binned losses of several runs.

    The learning rates are divided by the highest peak :math:`\eta` and their sums by the largest
    sum S, so that every parameter has a natural range: :math:`\alpha` in [0.05, 2], the drop
    :math:`B \eta` at most the largest fall of the loss in a run, the floor between 0 and the lowest
    loss. A few short runs do not determine both exponents of the drop, so that
    :math:`\beta = \gamma`, between 0.4 and 0.8.

    Args:
        curves: The runs.
        start: Number of updates before the first loss that counts.
        near: A law to start the search from; None for several starts.
    """

    def __init__(
        self, curves: Sequence[LossCurve], *, start: int = 0, near: MultiPowerLaw | None = None
    ) -> None:
        self.unit = max(curve.peak for curve in curves)
        binned = [curve.binned(_POINTS, start=start) for curve in curves]
        self.losses = np.concatenate([losses for _, losses in binned])
        histories = [
            RateHistory(
                np.asarray(curve.learning_rates) / self.unit, [int(e) for e in ends], groups=_GROUPS
            )
            for curve, (ends, _) in zip(curves, binned, strict=True)
        ]
        self.length = max(float(history.sums[-1]) for history in histories)
        for history in histories:
            history.sums = history.sums / self.length
            history.since = history.since / self.length
        self.histories = histories
        # Each run counts the same, and its blocks are drawn together: their errors are alike.
        sizes = [losses.size for _, losses in binned]
        self.early = np.concatenate([np.arange(n) < n // 2 for n in sizes])
        self.weights = np.concatenate([np.full(n, np.mean(sizes) / n) for n in sizes])
        self.blocks = [
            block + _BLOCKS * run
            for run, n in enumerate(sizes)
            for block in np.arange(n) * _BLOCKS // n
        ]
        spread = max(float(np.ptp(losses)) for _, losses in binned)
        lowest = float(self.losses.min())
        logs = np.log
        self.low = np.array(
            [logs(1e-3 * lowest), logs(1e-3 * spread), logs(0.05), *_drop(spread, 0)]
        )
        self.high = np.array([logs(lowest), logs(10 * spread), logs(2.0), *_drop(spread, 1)])
        self.starts = [
            logs([0.8 * lowest, 0.5 * spread, alpha, 0.2 * spread, speed, 0.6])
            for alpha in (0.3, 0.6)
            for speed in (10.0, 300.0)
        ]
        if near is not None:
            self.starts = [self._point_of(near)]

    @property
    def law(self) -> MultiPowerLaw:
        """The law that fits best."""
        return self._in_units(self._normalized(self._best))

    @property
    def residual(self) -> float:
        """Mean absolute residual of the law that fits best, in units of the loss."""
        predicted = self._predicted(self._normalized(self._best))
        return float(np.abs(predicted - self.losses).mean())

    @cached_property
    def _best(self) -> Array:
        found = min((self._solve(start) for start in self.starts), key=_cost)
        return np.asarray(found.x)

    def extrapolation_error(self) -> float:
        """Returns the error of the second halves of the runs as predicted from the first halves.

        Floor, scale and alpha are fitted to the first halves again, the drop stays as it is.

        Returns:
            The mean absolute error in units of the loss.
        """
        rest = self._best[3:]
        found = self._solve(self._best[:3], weights=self.early.astype(np.float64), rest=rest)
        law = self._normalized(np.concatenate([found.x, rest]))
        errors = np.abs(self._predicted(law) - self.losses)
        return float(errors[~self.early].mean())

    def draw(self, generator: np.random.Generator) -> MultiPowerLaw:
        """Returns the best law for random weights of the blocks and random exponents of the drop.

        The weights are those of a Bayesian bootstrap (exponential); the exponents are drawn between
        their bounds, each on its own, because the runs hardly determine them.
        """
        weights = generator.exponential(size=max(self.blocks) + 1)[self.blocks]
        exponents = generator.uniform(*EXPONENTS, size=2)
        found = self._solve(self._best[:5], weights=weights, exponents=exponents)
        return self._in_units(self._normalized(found.x, exponents))

    def _solve(
        self,
        start: Array,
        *,
        weights: Array | None = None,
        exponents: Array | None = None,
        rest: Array | None = None,
    ) -> Any:
        from scipy.optimize import least_squares

        size = start.size
        low, high = self.low[:size], self.high[:size]
        scales = np.sqrt(self.weights if weights is None else self.weights * weights)

        def residuals(point: Array) -> Array:
            if rest is not None:
                point = np.concatenate([point, rest])
            predicted = self._predicted(self._normalized(point, exponents))
            # The square root of Huber's function: large residuals count with their absolute value.
            errors = np.abs(predicted / self.losses - 1.0) / _LOSS_SCALE
            found: Array = scales * np.sqrt(np.where(errors < 1, errors**2, 2 * errors - 1))
            return found

        inner = np.clip(start, low + 1e-6, high - 1e-6)
        return least_squares(residuals, inner, bounds=(low, high), max_nfev=200)

    def _predicted(self, law: MultiPowerLaw) -> Array:
        return np.concatenate([law.losses_of(history) for history in self.histories])

    def _normalized(self, point: Array, exponents: Array | None = None) -> MultiPowerLaw:
        floor, scale, alpha, drop, speed = map(float, np.exp(point[:5]))
        beta, gamma = map(float, np.exp(point[[5, 5]]) if exponents is None else exponents)
        return MultiPowerLaw(
            floor=floor,
            scale=scale,
            alpha=alpha,
            drop=drop,
            drop_speed=speed,
            beta=beta,
            gamma=gamma,
        )

    def _in_units(self, law: MultiPowerLaw) -> MultiPowerLaw:
        """Returns a law of divided learning rates and sums as one of learning rates."""
        total = self.unit * self.length
        return MultiPowerLaw(
            floor=law.floor,
            scale=law.scale * total**law.alpha,
            alpha=law.alpha,
            drop=law.drop / self.unit,
            drop_speed=law.drop_speed * self.unit**law.gamma / total,
            beta=law.beta,
            gamma=law.gamma,
        )

    def _point_of(self, law: MultiPowerLaw) -> Array:
        """Returns the normalized parameters of a law in units: the inverse of the method above."""
        total = self.unit * self.length
        scale, drop = law.scale * total**-law.alpha, law.drop * self.unit
        speed = law.drop_speed * self.unit**-law.gamma * total
        return np.log([law.floor, scale, law.alpha, drop, speed, law.beta])


def _drop(spread: float, end: int) -> list[float]:
    """Returns the lower (0) or upper (1) bounds of drop, drop speed and exponent, as logarithms."""
    bounds = ((1e-3 * spread, spread), (1e-2, 1e5), EXPONENTS)
    return [float(np.log(pair[end])) for pair in bounds]


def _cost(found: Any) -> float:
    return float(found.cost)
