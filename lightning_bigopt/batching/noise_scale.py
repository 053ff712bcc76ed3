"""The gradient noise scale: unbiased terms, their running means, and how far to trust the ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["NoiseScaleEstimator", "NoiseScaleReport", "noise_scale_terms"]


def noise_scale_terms(
    small_square: float, *, big_square: float, small: float, big: float
) -> tuple[float, float]:
    r"""Unbiased noise and signal from the gradient at two batch sizes.

    .. math::
        S = \frac{|G_b|^2 - |G_B|^2}{1/b - 1/B}, \qquad
        |G|^2 = \frac{B |G_B|^2 - b |G_b|^2}{B - b}

    The small batches must be part of the big one or independent of it; with the mean of
    :math:`|G_b|^2` over several of them the variance falls. Either value may come out negative:
    only their means are meaningful.

    Args:
        small_square: :math:`|G_b|^2`, squared norm of the gradient averaged over ``small`` samples
            (or its mean over micro-batches).
        big_square: :math:`|G_B|^2`, the same over ``big`` samples.
        small: Samples :math:`b`.
        big: Samples :math:`B`, more than ``small``.

    Returns:
        :math:`S`, the trace of the per-sample gradient covariance, and :math:`|G|^2`.

    Raises:
        ValueError: If ``big`` is not more than ``small``.

    Example:
        >>> noise_scale_terms(3.0, big_square=1.5, small=1, big=4)
        (2.0, 1.0)

    References:
        McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, App. A.1.
    """
    if not 0 < small < big:
        raise ValueError(
            f"big must be more than small = {small!r}, got {big!r}; accumulate two micro-batches "
            "or more, or use two processes"
        )
    noise = (small_square - big_square) / (1 / small - 1 / big)
    signal = (big * big_square - small * small_square) / (big - small)
    return noise, signal


@dataclass(frozen=True, kw_only=True)
class NoiseScaleReport:
    """What is known of the noise scale.

    Args:
        noise_scale: Samples at which noise and signal are equal; None where it is hopeless.
        standard_error: Of ``noise_scale``, in samples.
        noise: Mean of :math:`S`; None before the first update.
        signal: Mean of :math:`|G|^2`; None before the first update.
        updates: Updates measured.
        reason: Why there is no ``noise_scale``; None where there is.

    Example:
        >>> NoiseScaleEstimator().report().reason
        'too few updates measured (0 of 16)'
    """

    noise_scale: float | None = None
    standard_error: float | None = None
    noise: float | None = None
    signal: float | None = None
    updates: int = 0
    reason: str | None = None


class NoiseScaleEstimator:
    r"""Running means of :math:`S` and :math:`|G|^2`, their ratio, and its standard error.

    Both are averaged apart, with the same exponential weights :math:`w_i` over updates and bias
    correction, and divided last: the mean of ratios does not exist. The standard error comes from
    the scatter of the estimates themselves, by the delta method:

    .. math::
        \mathrm{Var}(\hat B) \approx \frac{\sum w_i^2}{(\sum w_i)^2} \cdot
            \frac{\mathrm{Var}(S_i - \hat B |G|^2_i)}{\bar{|G|^2}^2}

    The closed forms for these variances need :math:`\mathrm{tr}\,\Sigma^2`, which norms do not
    tell, and a noise that is Gaussian; the scatter needs neither, and drift only makes it larger.
    Where :math:`\bar{|G|^2}` is not ``confidence`` standard errors above zero, the ratio has no
    useful error and none is given.

    Args:
        decay: Of the weights from one update to the next, in [0, 1).
        minimum_updates: Updates before anything is reported; at least 2.
        confidence: Standard errors that :math:`\bar{|G|^2}` must be above zero.

    Raises:
        ValueError: If an argument is out of range.

    State:
        Sums of the weights and of weighted moments, as plain numbers.

    Example:
        >>> estimator = NoiseScaleEstimator(minimum_updates=2)
        >>> for noise, signal in ((8.0, 1.1), (12.0, 0.9), (10.0, 1.0)):
        ...     estimator.update(noise, signal=signal)
        >>> report = estimator.report()
        >>> round(report.noise_scale, 1), round(report.standard_error, 1)
        (10.0, 1.7)
    """

    version = 1

    def __init__(
        self, *, decay: float = 0.99, minimum_updates: int = 16, confidence: float = 2.0
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay!r}; write 0.99")
        if minimum_updates < 2:
            raise ValueError(
                f"minimum_updates must be at least 2, got {minimum_updates!r}: one estimate has "
                "no scatter; write 16"
            )
        if not confidence > 0:
            raise ValueError(f"confidence must be positive, got {confidence!r}; write 2.0")
        self.decay = decay
        self.minimum_updates = minimum_updates
        self.confidence = confidence
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.updates = 0
        self.ignored = 0
        self._weight = self._weight_squares = 0.0
        self._noise = self._signal = 0.0
        self._noise_noise = self._noise_signal = self._signal_signal = 0.0

    def update(self, noise: float, *, signal: float) -> None:
        """Takes one update's terms; non-finite ones are counted and ignored.

        Args:
            noise: :math:`S` of :func:`noise_scale_terms`.
            signal: :math:`|G|^2` of :func:`noise_scale_terms`.
        """
        if not (math.isfinite(noise) and math.isfinite(signal)):
            self.ignored += 1
            return
        self.updates += 1
        # Means and central moments are moved, not raw moments: S is far from 0 for its scatter.
        kept = self.decay * self._weight
        total = kept + 1
        by_noise, by_signal = noise - self._noise, signal - self._signal
        share = kept / total
        self._noise += by_noise / total
        self._signal += by_signal / total
        self._noise_noise = share * (self._noise_noise + by_noise * by_noise / total)
        self._noise_signal = share * (self._noise_signal + by_noise * by_signal / total)
        self._signal_signal = share * (self._signal_signal + by_signal * by_signal / total)
        self._weight = total
        self._weight_squares = self.decay**2 * self._weight_squares + 1

    def report(self) -> NoiseScaleReport:
        """The estimate, or the reason why it is hopeless."""
        known = NoiseScaleReport(
            noise=self._noise if self.updates else None,
            signal=self._signal if self.updates else None,
            updates=self.updates,
        )
        if self.updates < self.minimum_updates:
            return _without(
                known, f"too few updates measured ({self.updates} of {self.minimum_updates})"
            )
        effective = self._weight**2 / self._weight_squares
        if effective <= 1:
            return _without(known, "decay forgets all updates but one, which has no scatter")
        spread = 1 / (effective - 1)  # of a weighted mean, Bessel's correction included
        least = self.confidence * math.sqrt(spread * self._signal_signal)
        if self._signal <= least:
            return _without(
                known,
                f"the signal |G|² = {self._signal:.3g} is not {self.confidence:g} standard errors "
                f"above zero ({least:.3g}); a larger batch or a decay nearer to 1 would measure it",
            )
        ratio = self._noise / self._signal
        if ratio <= 0:
            return _without(known, f"the noise S = {self._noise:.3g} is not above zero")
        scatter = (
            self._noise_noise - 2 * ratio * self._noise_signal + ratio**2 * self._signal_signal
        )
        return NoiseScaleReport(
            noise_scale=ratio,
            standard_error=math.sqrt(spread * max(scatter, 0.0)) / self._signal,
            noise=self._noise,
            signal=self._signal,
            updates=self.updates,
        )

    def state_dict(self) -> dict[str, float]:
        """Sums of weights and moments."""
        return {"version": self.version, **{name: getattr(self, name) for name in _STATE}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = (
    "updates",
    "ignored",
    "_weight",
    "_weight_squares",
    "_noise",
    "_signal",
    "_noise_noise",
    "_noise_signal",
    "_signal_signal",
)


def _without(known: NoiseScaleReport, reason: str) -> NoiseScaleReport:
    return NoiseScaleReport(
        noise=known.noise, signal=known.signal, updates=known.updates, reason=reason
    )
