"""Rules that scale hyperparameters when the batch changes by a factor κ."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from lightning_bigopt.checks import check_between, check_choice, check_number, check_positive
from lightning_bigopt.type_checks import check_instance

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
    r"""Returns the factor on the learning rate: :math:`\sqrt\kappa` or :math:`\kappa`.

    Args:
        kappa: New batch divided by base batch; positive.
        rule: ``"sqrt"`` for Adam and its variants, ``"linear"`` for SGD.
        max_kappa: Upper bound on ``kappa``, because beyond the noise scale a larger batch needs no
            larger learning rate; None for no bound.

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
    check_choice("rule", rule, ScalingRule, hint="see recommended_rule")
    ratio = _bounded(kappa, max_kappa)
    return math.sqrt(ratio) if rule == "sqrt" else ratio


def scaled_beta(beta: float, *, kappa: float, max_kappa: float | None = None) -> float:
    r"""Returns the decay :math:`\beta^\kappa`, which keeps the half-life in samples or tokens.

    Args:
        beta: Decay per update at the base batch, in [0, 1); usually Adam's second decay.
        kappa: New batch divided by base batch; positive.
        max_kappa: Upper bound on ``kappa``; None for no bound.

    Returns:
        The decay per update at the new batch.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(scaled_beta(0.95, kappa=4), 6)
        0.814506

    References:
        Marek et al., "Small Batch Size Training for Language Models", 2025.
    """
    check_between("beta", beta, 0, 1, ends="[)", hint="write 0.95")
    return float(beta ** _bounded(kappa, max_kappa))


def weight_decay_factor(kappa: float, *, max_kappa: float | None = None) -> float:
    r"""Returns the factor :math:`\sqrt\kappa` on decoupled weight decay, for a fixed data budget.

    Together with the square-root rule for the learning rate, one update decays the weights
    :math:`\kappa` times as much, and the run has :math:`1/\kappa` times as many updates.

    Args:
        kappa: New batch divided by base batch; positive.
        max_kappa: Upper bound on ``kappa``; None for no bound.

    Returns:
        The factor, dimensionless.

    Raises:
        ValueError: If an argument is not positive.

    Example:
        >>> weight_decay_factor(4)
        2.0
    """
    return math.sqrt(_bounded(kappa, max_kappa))


def recommended_rule(optimizer: str) -> ScalingRule | None:
    """Returns the rule that fits an optimizer, by the name of its class.

    Args:
        optimizer: Class name, such as ``"AdamW"``.

    Returns:
        ``"linear"`` for SGD and LARS, ``"sqrt"`` for optimizers that normalize each update (Adam
        and its variants, Lion, Muon, Shampoo), None for an unknown name.

    Example:
        >>> recommended_rule("AdamW"), recommended_rule("SGD"), recommended_rule("MyOptimizer")
        ('sqrt', 'linear', None)
    """
    check_instance("optimizer", optimizer, str, hint="write the name of its class, such as 'AdamW'")
    name = optimizer.lower()
    if any(word in name for word in _SQRT):
        return "sqrt"
    return "linear" if any(word in name for word in _LINEAR) else None


def adascale_gain(kappa: float, *, variance: float, square_norm: float) -> float:
    r"""Returns AdaScale's gain: the progress of one large batch in units of base batches.

    .. math:: r = \frac{\sigma^2 + \mu^2}{\sigma^2 / \kappa + \mu^2} \in [1, \kappa]

    In terms of the noise scale, :math:`\sigma^2 / \mu^2` is ``noise_scale / base batch``.

    Args:
        kappa: Large batch divided by base batch, at least 1.
        variance: :math:`\sigma^2`, variance of the gradient at the base batch, summed over
            parameters; a negative estimate counts as 0.
        square_norm: :math:`\mu^2`, squared norm of the true gradient; a negative estimate counts
            as 0.

    Returns:
        The gain, dimensionless; 1.0 if variance and squared norm are 0.

    Raises:
        ValueError: If ``kappa`` is below 1.

    Example:
        >>> round(adascale_gain(2, variance=1.0, square_norm=1.0), 4)
        1.3333

    References:
        Johnson et al., "AdaScale SGD", ICML 2020, Sec. 3.
    """
    hint = "divide the large batch by the base batch"
    check_between("kappa", kappa, 1, math.inf, ends="[]", hint=hint)
    check_number("variance", variance)
    check_number("square_norm", square_norm)
    sigma, mu = max(float(variance), 0.0), max(float(square_norm), 0.0)
    if not sigma + mu:
        return 1.0
    large = sigma / kappa + mu
    return (sigma + mu) / large if large else float(kappa)


def _bounded(kappa: float, max_kappa: float | None) -> float:
    check_positive("kappa", kappa, hint="divide the new batch by the base batch")
    if max_kappa is None:
        return float(kappa)
    check_positive("max_kappa", max_kappa, hint="write None for no bound")
    return float(min(kappa, max_kappa))
