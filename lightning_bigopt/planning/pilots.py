"""Checks the runs to which a loss law is fitted."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bigopt.planning.loss_curve import LossCurve

__all__ = ["check_pilots", "decays"]

_DECAYED = 0.9  # the lowest factor after the peak of a run that counts as constant


def check_pilots(curves: Sequence[LossCurve], *, start: int = 0) -> None:
    """Raises unless a loss law can be fitted to runs.

    Args:
        curves: The runs.
        start: Number of updates before the first loss that counts, if the warm-up is shorter.

    Raises:
        ValueError: If they are fewer than two, one is there twice, none decays its learning rate,
            or a loss is not positive or does not fall.
    """
    if len(curves) < 2:
        raise ValueError(
            f"runs must be at least two, got {len(curves)}; train one with a short cooldown, such "
            "as WarmupStableDecay(), and one that decays all along, such as WarmupLinear(end=0.0)"
        )
    for curve in curves:
        if min(curve.losses) <= 0:
            raise ValueError(
                f"runs must have positive losses, got {min(curve.losses)} in {curve.name}; the law "
                "describes a loss such as the cross-entropy"
            )
        updates, losses = curve.counted(start=start)
        if not losses.max() > losses.min():
            raise ValueError(
                f"runs must have a loss that falls, got {losses[0]} from update {updates[0]:,} on "
                f"in {curve.name}; check what it logs"
            )
    for number, curve in enumerate(curves):
        if any(curve.losses == other.losses for other in curves[:number]):
            raise ValueError(
                f"runs must be different runs, got the losses of {curve.name} twice; pass each once"
            )
    if not any(map(decays, curves)):
        raise ValueError(
            "runs must contain at least one whose learning rate decays, got "
            f"{', '.join(curve.name for curve in curves)} with constant learning rates; train one "
            "with WarmupCosine(end=0.0)"
        )


def decays(curve: LossCurve) -> bool:
    """Returns whether the learning rate decays between the peak and the last loss."""
    return min(curve.learning_rates[curve.warmup - 1 : curve.updates[-1]]) < _DECAYED * curve.peak
