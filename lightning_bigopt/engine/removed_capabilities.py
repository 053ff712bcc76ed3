"""Ends capabilities that were removed from the Trainer's callbacks in the middle of a fit."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn

from lightning_bigopt.engine.stage import Fit, Stages

__all__ = ["follow_list"]


def follow_list(fit: Fit, listed: Sequence[object], before: Sequence[object]) -> list[Stages]:
    """Ends capabilities that were removed from the list; warns about new ones.

    Args:
        fit: The fit.
        listed: The callbacks of the Trainer.
        before: The callbacks when they were read last.

    Returns:
        The capabilities that are kept.
    """
    kept = [capability for capability in fit.capabilities if capability in listed]
    for capability in [c for c in fit.capabilities if c not in kept]:
        capability.end(fit)
        fit.groups.release(capability)
        capability.fit = None
    for added in listed:
        if isinstance(added, Stages) and added not in kept and added not in before:
            rank_zero_warn(
                f"{added!r} was added to the Trainer's callbacks during the fit. It has no effect "
                "in this fit; add callbacks of lightning_bigopt before it."
            )
    return kept
