"""Estimates the gradient noise scale: unbiased terms, running means, and a standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_bigopt.checks import check_between, check_count, check_number, check_positive, shown

__all__ = ["NoiseScaleEstimator", "NoiseScaleReport", "noise_scale_terms"]


def noise_scale_terms(
    small_square: float, *, big_square: float, small: float, big: float
) -> tuple[float, float]:
    r"""Estimates noise and signal, without bias, from the gradient at two batch sizes.

    .. math::
        S = \frac{|G_b|^2 - |G_B|^2}{1/b - 1/B}, \qquad
        |G|^2 = \frac{B |G_B|^2 - b |G_b|^2}{B - b}

    The small batches must be part of the big one, or independent of it. A mean of :math:`|G_b|^2`
    over several small batches has a lower variance. A single estimate may be negative; only means
    over updates are meaningful.

    Args:
        small_square: :math:`|G_b|^2`, squared norm of the mean gradient of ``small`` samples, or
            the mean of such squared norms over micro-batches.
        big_square: :math:`|G_B|^2`, squared norm of the mean gradient of ``big`` samples.
        small: Size :math:`b` of the small batches, in samples.
        big: Size :math:`B` of the big batch, in samples; more than ``small``.

    Returns:
        The noise :math:`S`, which is the trace of the covariance of per-sample gradients, and the
        signal :math:`|G|^2`, which is the squared norm of the true gradient.

    Raises:
        ValueError: If ``big`` is not more than ``small``.

    Example:
        >>> noise_scale_terms(3.0, big_square=1.5, small=1, big=4)
        (2.0, 1.0)

    References:
        McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, App. A.1.
    """
    check_number("small_square", small_square)
    check_number("big_square", big_square)
    check_number("small", small, hint="write a number of samples")
    check_positive("big", big, hint="write a number of samples")
    if not 0 < small < big:
        raise ValueError(
            f"big must be more than small = {shown(small)}, got {shown(big)}; accumulate at least "
            "two micro-batches, or use two processes"
        )
    small_square, big_square = float(small_square), float(big_square)
    small, big = float(small), float(big)
    noise = (small_square - big_square) / (1 / small - 1 / big)
    signal = (big * big_square - small * small_square) / (big - small)
    return noise, signal


@dataclass(frozen=True, kw_only=True)
class NoiseScaleReport:
    """An estimate of the noise scale, or the reason why there is none.

    Args:
        noise_scale: Batch size in samples at which noise and signal are equal; None without a
            reliable estimate.
        standard_error: Standard error of ``noise_scale``, in samples.
        noise: Mean of :math:`S`; None before the first update.
        signal: Mean of :math:`|G|^2`; None before the first update.
        updates: Number of updates measured.
        reason: The reason why ``noise_scale`` is None; None if there is an estimate.

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

    Noise and signal are averaged separately, with the same bias-corrected exponential weights
    :math:`w_i` over updates, and the means are divided: a mean of ratios has no finite expectation.
    The standard error is computed from the scatter of the terms, by the delta method:

    .. math::
        \mathrm{Var}(\hat B) \approx \frac{\sum w_i^2}{(\sum w_i)^2} \cdot
            \frac{\mathrm{Var}(S_i - \hat B |G|^2_i)}{\bar{|G|^2}^2}

    Closed forms of these variances need :math:`\mathrm{tr}\,\Sigma^2`, which cannot be computed
    from norms, and assume Gaussian noise. The scatter needs neither; a drift of the terms only
    makes it larger. If :math:`\bar{|G|^2}` is less than ``confidence`` standard errors above zero,
    the error of the ratio is not meaningful, and the report has a reason instead of a noise scale.

    Args:
        decay: Factor on the weights per update, in [0, 1).
        minimum_updates: Number of updates before the first report of a noise scale; at least 2.
        confidence: Number of standard errors by which :math:`\bar{|G|^2}` must exceed zero.

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
        check_between("decay", decay, 0, 1, ends="[)", hint="write 0.99")
        check_count(
            "minimum_updates",
            minimum_updates,
            minimum=2,
            of="updates",
            hint="one estimate has no scatter; write 16",
        )
        check_positive("confidence", confidence, hint="write 2.0")
        self.decay = decay
        self.minimum_updates = minimum_updates
        self.confidence = confidence
        self.reset()

    def reset(self) -> None:
        """Resets all sums."""
        self.updates = 0
        self.ignored = 0
        self._weight = self._weight_squares = 0.0
        self._noise = self._signal = 0.0
        self._noise_noise = self._noise_signal = self._signal_signal = 0.0

    def update(self, noise: float, *, signal: float) -> None:
        """Adds the terms of one update; counts and ignores them if one is not finite.

        Args:
            noise: :math:`S` from :func:`noise_scale_terms`.
            signal: :math:`|G|^2` from :func:`noise_scale_terms`.
        """
        if not (math.isfinite(noise) and math.isfinite(signal)):
            self.ignored += 1
            return
        self.updates += 1
        # Central moments, because raw moments cancel if S is large compared with its scatter.
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
        """Returns the estimate, or the reason why there is none."""
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
            return _without(
                known, f"with decay = {self.decay:g} only one update counts, which has no scatter"
            )
        spread = 1 / (effective - 1)  # variance of a weighted mean, with Bessel's correction
        least = self.confidence * math.sqrt(spread * self._signal_signal)
        if self._signal <= least:
            return _without(
                known,
                f"the signal |G|² = {self._signal:.3g} is not {self.confidence:g} standard errors "
                f"above zero ({least:.3g}); use a larger batch or a decay closer to 1",
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
        """Returns the sums of weights and moments as plain numbers."""
        return {"version": self.version, **{name: getattr(self, name) for name in _STATE}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned."""
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
