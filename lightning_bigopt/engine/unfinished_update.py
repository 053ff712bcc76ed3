"""Warns about checkpoints that are saved during an update."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn

from lightning_bigopt.engine.overridden_stages import overriding
from lightning_bigopt.engine.stage import Fit, Stages
from lightning_bigopt.trainer_access import loop

__all__ = ["check_update_is_complete"]


def check_update_is_complete(fit: Fit | None, *, evaluations: int) -> None:
    """Warns about a checkpoint that is saved during an update, if it may contain a part of it.

    Args:
        fit: The fit; None after an error.
        evaluations: How often the gradients of the current update were evaluated; 0 between
            updates.
    """
    if evaluations and not (evaluations == 1 and fit is not None and _is_unchanged(fit)):
        rank_zero_warn(
            "A checkpoint is saved during an update, after its clipping was decided and before "
            "Lightning counted it. It may contain a part of this update, which a resume performs "
            "again. Save in on_train_batch_end; in a handler of a signal, set a flag and save "
            "there."
        )


def _is_unchanged(fit: Fit) -> bool:
    """Returns whether the first evaluation has changed no state, and the step has not begun."""
    stages = overriding(fit.capabilities, Stages)
    deciding = [*stages["decide"], *stages["clip"], *stages["observe"]]
    has_decided = any(c.changes_before_step and c in stages["saved_state"] for c in deciding)
    return not has_decided and loop.current_hook(fit.trainer) == "on_before_optimizer_step"
