"""What else must change when the batch changes by a factor κ."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

__all__ = [
    "ScalingRule",
    "adascale_gain",
    "learning_rate_factor",
    "recommended_rule",
    "scaled_beta",
    "weight_decay_factor",
]

ScalingRule: TypeAlias = Literal["sqrt", "linear"]

_SQRT = ("ada", "came", "lamb", "lion", "muon", "prodigy", "rms", "shampoo", "soap", "sophia")
_LINEAR = ("sgd", "lars", "momentum")


def learning_rate_factor(
    kappa: float, *, rule: ScalingRule, max_kappa: float | None = None
) -> float:
    r"""The factor on the learning rate: :math:`\sqrt\kappa` for Adam's kin, :math:`\kappa` for SGD.

    Args:
        kappa: New batch over base batch.
        rule: ``"sqrt"`` or ``"linear"``.
        max_kappa: Cap on ``kappa``, because beyond the noise scale a larger batch wants no larger
            learning rate; None for no cap.

    Returns:
        The factor, dimensionless.

    Raises:
        ValueError: If ``kappa`` or ``max_kappa`` is not positive, or the rule is unknown.

    Example:
        >>> learning_rate_factor(4, rule="sqrt"), learning_rate_factor(4, rule="linear")
        (2.0, 4.0)
        >>> learning_rate_factor(16, rule="sqrt", max_kappa=4)
        2.0

    References:
        Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", 2022;
        Goyal et al., "Accurate, Large Minibatch SGD", 2017.
    """
    ratio = _capped(kappa, max_kappa)
    if rule == "sqrt":
        return math.sqrt(ratio)
    if rule == "linear":
        return ratio
    raise ValueError(f"rule must be 'sqrt' or 'linear', got {rule!r}; see recommended_rule")


def scaled_beta(beta: float, *, kappa: float, max_kappa: float | None = None) -> float:
    r"""The decay :math:`\beta^\kappa`, whose half-life in samples or tokens stays the same.

    Args:
        beta: Decay an update at the base batch, in [0, 1); Adam's second as a rule.
        kappa: New batch over base batch.
        max_kappa: Cap on ``kappa``; None for no cap.

    Returns:
        The decay an update at the new batch.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(scaled_beta(0.95, kappa=4), 6)
        0.814506

    References:
        Marek et al., "Small Batch Size Training for Language Models", 2025.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta!r}; write 0.95")
    return float(beta ** _capped(kappa, max_kappa))


def weight_decay_factor(kappa: float, *, max_kappa: float | None = None) -> float:
    r"""The factor :math:`\sqrt\kappa` on decoupled weight decay, at a fixed amount of data.

    With the square-root rule for the learning rate, an update then shrinks the weights by
    :math:`\kappa` times as much, and there are :math:`1/\kappa` times as many.

    Args:
        kappa: New batch over base batch.
        max_kappa: Cap on ``kappa``; None for no cap.

    Returns:
        The factor, dimensionless.

    Raises:
        ValueError: If an argument is not positive.

    Example:
        >>> weight_decay_factor(4)
        2.0
    """
    return math.sqrt(_capped(kappa, max_kappa))


def recommended_rule(optimizer: str) -> ScalingRule | None:
    """The rule that fits an optimizer, by the name of its class.

    Args:
        optimizer: Such as ``"AdamW"``.

    Returns:
        ``"linear"`` for SGD and LARS, ``"sqrt"`` for what normalizes each update (Adam's kin, Lion,
        Muon, Shampoo), None for a name that is not known.

    Example:
        >>> recommended_rule("AdamW"), recommended_rule("SGD"), recommended_rule("MyOptimizer")
        ('sqrt', 'linear', None)
    """
    name = optimizer.lower()
    if any(word in name for word in _SQRT):
        return "sqrt"
    return "linear" if any(word in name for word in _LINEAR) else None


def adascale_gain(kappa: float, *, variance: float, square_norm: float) -> float:
    r"""AdaScale's gain: by how much a batch :math:`\kappa` times as large is worth more.

    .. math:: r = \frac{\sigma^2 + \mu^2}{\sigma^2 / \kappa + \mu^2} \in [1, \kappa]

    In terms of the noise scale, :math:`\sigma^2 / \mu^2` is ``noise_scale / base batch``.

    Args:
        kappa: Large batch over base batch, at least 1.
        variance: :math:`\sigma^2`, variance of the base batch's gradient, summed over parameters;
            a negative estimate counts as 0.
        square_norm: :math:`\mu^2`, squared norm of the true gradient; a negative estimate counts
            as 0.

    Returns:
        The gain; 1.0 where both are 0.

    Raises:
        ValueError: If ``kappa`` is below 1.

    Example:
        >>> round(adascale_gain(2, variance=1.0, square_norm=1.0), 4)
        1.3333

    References:
        Johnson et al., "AdaScale SGD", ICML 2020, Sec. 3.
    """
    if not kappa >= 1:
        raise ValueError(f"kappa must be at least 1, got {kappa!r}; divide large by small batch")
    sigma, mu = max(variance, 0.0), max(square_norm, 0.0)
    return (sigma + mu) / (sigma / kappa + mu) if sigma + mu else 1.0


def _capped(kappa: float, max_kappa: float | None) -> float:
    for name, value in (("kappa", kappa), ("max_kappa", max_kappa)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(
                f"{name} must be positive and finite, got {value!r}; it is new over base batch"
            )
    return float(kappa if max_kappa is None else min(kappa, max_kappa))
