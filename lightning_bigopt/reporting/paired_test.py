"""The paired t-test of two lists of numbers, and the smallest difference that it can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_bigopt.checks import check_between, check_count, check_number, check_positive, shown

__all__ = ["ALPHA", "POWER", "PairedTest", "detectable_difference", "paired_test", "pairs_needed"]

ALPHA, POWER = 0.05, 0.8
_MOST_PAIRS = 100_000
_LEAST_SPREAD = 1e-6  # of the differences, relative to the values: below is rounding


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """A two-sided paired t-test of the differences second - first.

    Args:
        count: Number of pairs.
        difference: Mean difference.
        deviation: Standard deviation of the differences, with n - 1 in the denominator.
        interval: 95 % confidence interval of the mean difference.
        statistic: The t statistic; NaN if all differences are equal.
        p_value: Its p-value; NaN if all differences are equal.
        detectable: The smallest difference that the test detects with a probability of 0.8, for
            this deviation and number of pairs; see :func:`detectable_difference`.
    """

    count: int
    difference: float
    deviation: float
    interval: tuple[float, float]
    statistic: float
    p_value: float
    detectable: float

    @property
    def is_defined(self) -> bool:
        """Whether the differences vary, so that there is a p-value."""
        return not math.isnan(self.p_value)

    @property
    def is_significant(self) -> bool:
        """Whether the p-value is below 0.05."""
        return self.p_value < ALPHA


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Tests whether the mean of the differences second - first is zero.

    The test is ``scipy.stats.ttest_rel``. It assumes that the differences, not the values, are
    about normally distributed. If the standard deviation of the differences is at most a millionth
    of the largest value, it is rounding, and there is no test: statistic and p-value are NaN.

    Args:
        first: Finite numbers, at least two.
        second: As many finite numbers, each paired with the one at its place in ``first``.

    Raises:
        ValueError: If the lists have different lengths or fewer than two numbers, or one is not
            finite.

    Example:
        >>> test = paired_test([2.0, 2.1, 2.2, 2.3], [1.9, 2.02, 2.09, 2.21])
        >>> f"{test.difference:.3f} [{test.interval[0]:.3f}, {test.interval[1]:.3f}]"
        '-0.095 [-0.116, -0.074]'
        >>> f"p = {test.p_value:.2g}, detectable {test.detectable:.3f}"
        'p = 0.00068, detectable 0.027'

    References:
        Student, "The probable error of a mean", Biometrika 6, 1908.
    """
    if len(first) != len(second):
        raise ValueError(
            f"second must have as many numbers as first, got {len(second)} and {len(first)}; pass "
            "one pair per seed"
        )
    check_count("the number of pairs", len(first), minimum=2, hint="use more seeds")
    for name, values in (("first", first), ("second", second)):
        for value in values:
            check_number(name, value, hint="leave out the pair, and say so")
    count = len(first)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean = math.fsum(differences) / count
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count - 1))
    if deviation <= _LEAST_SPREAD * max(map(abs, (*first, *second))):
        return PairedTest(
            count=count,
            difference=mean,
            deviation=0.0,
            interval=(mean, mean),
            statistic=math.nan,
            p_value=math.nan,
            detectable=0.0,
        )
    from scipy.stats import ttest_rel

    found = ttest_rel(second, first)
    interval = found.confidence_interval(1 - ALPHA)
    return PairedTest(
        count=count,
        difference=mean,
        deviation=deviation,
        interval=(float(interval.low), float(interval.high)),
        statistic=float(found.statistic),
        p_value=float(found.pvalue),
        detectable=detectable_difference(deviation, count),
    )


def detectable_difference(
    deviation: float, count: int, *, power: float = POWER, alpha: float = ALPHA
) -> float:
    r"""Returns the smallest true difference that a paired t-test detects with a given power.

    With a true mean difference :math:`d` the statistic of :math:`n` pairs has a noncentral t
    distribution with :math:`n - 1` degrees of freedom and the noncentrality
    :math:`\delta = \sqrt n\, d / s`. The result is the :math:`d` for which the statistic is beyond
    the critical value, on either side, with the probability ``power``. The measured standard
    deviation takes the place of the true one.

    Args:
        deviation: Standard deviation :math:`s` of the differences.
        count: Number :math:`n` of pairs, at least 2.
        power: Probability of detection, at least 0.5, and above ``alpha``.
        alpha: Level of the two-sided test.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(detectable_difference(0.01, 8), 4), round(detectable_difference(0.01, 32), 4)
        (0.0116, 0.0051)

    References:
        Cohen, "Statistical Power Analysis for the Behavioral Sciences", 2nd edition, 1988, Sec. 2.3
        and 2.4.
    """
    check_positive("deviation", deviation, hint="pass the standard deviation of the differences")
    check_count("count", count, minimum=2, of="pairs")
    check_between("alpha", alpha, 0, 1, hint="write 0.05")
    check_between("power", power, 0.5, 1, ends="[)", hint="write 0.8")
    if power <= alpha:
        raise ValueError(
            f"power must be above alpha, {shown(alpha)}, got {shown(power)}: without any "
            "difference the test is significant with the probability alpha; write alpha=0.05"
        )
    from scipy.optimize import brentq
    from scipy.stats import ncf, t

    critical = float(t.isf(alpha / 2, count - 1))

    def missing(noncentrality: float) -> float:
        # The square of a noncentral t is a noncentral F: both tails at once. scipy's noncentral t
        # is NaN in its far tail.
        return float(ncf.sf(critical**2, 1, count - 1, noncentrality**2)) - power

    high = critical
    while missing(high) < 0:
        high *= 2
    return float(brentq(missing, 1e-3, high)) * deviation / math.sqrt(count)


def pairs_needed(deviation: float, difference: float) -> int:
    """Returns the number of pairs with which a difference is detected with a probability of 0.8.

    Args:
        deviation: Standard deviation of the differences.
        difference: The difference, positive.

    Raises:
        ValueError: If it takes more than 100,000 pairs, or an argument is not positive.

    Example:
        >>> pairs_needed(0.01, 0.005)
        34
    """
    check_positive("deviation", deviation, hint="pass the standard deviation of the differences")
    check_positive("difference", difference, hint="pass its absolute value")
    from scipy.stats import norm

    # A known deviation would take so many pairs; the t-test takes a few more.
    shift = float(norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER))
    count = (shift * deviation / difference) ** 2
    if count > _MOST_PAIRS:
        raise ValueError(
            f"difference must be one that {_MOST_PAIRS:,} pairs can show, got "
            f"{shown(difference)} with the standard deviation {shown(deviation)}; pass a larger "
            "difference"
        )
    pairs = max(2, math.floor(count))
    while detectable_difference(deviation, pairs) > difference:
        pairs += 1
    return pairs
