"""What a resumed run changed against its checkpoint, said once before the first batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lightning_bigopt.clock import TrainingClock

__all__ = ["differences", "report_changes"]

_JUMP = 0.01


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, under: str = ""
) -> Iterator[str]:
    """One line a changed entry, nested mappings included.

    Example:
        >>> list(differences({"schedule": "Cosine()"}, {"schedule": "Linear()"}))
        ['schedule: Cosine() → Linear()']
    """
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) or isinstance(new, Mapping):
            yield from differences(old or {}, new or {}, under=f"{under}{name}.")
        elif old != new:
            yield f"{under}{name}: {_written(old)} → {_written(new)}"


def report_changes(
    kept: Mapping[str, Any] | None,
    used: Mapping[str, Any],
    *,
    clock: TrainingClock,
    rates: Sequence[tuple[float, float]],
    is_foreign: bool,
) -> None:
    """Says what differs from the checkpoint, and by how much the learning rate jumps for it.

    Args:
        kept: What the checkpoint says of itself; None where it knows no learning-rate scheduler
            of ours.
        used: The same of this fit.
        clock: After its start.
        rates: For each parameter group the learning rate of the coming update, as the checkpoint
            had it and as it is now.
        is_foreign: Whether another scheduler's state has been named already.
    """
    lines = list(_changes(kept, used, clock))
    if kept is None and not is_foreign:
        share = clock.progress().fraction
        rank_zero_warn(
            "The checkpoint was written without LearningRateScheduler: the schedule goes on at "
            f"{share:.1%} of this Trainer's budget, from the base learning rates as configured "
            f"({_written(used['base_lrs'])})."
        )
    if lines:
        rank_zero_info("Changed against the checkpoint:\n" + "\n".join(f"  {x}" for x in lines))
    jumps = [(a, b) for a, b in rates if not math.isclose(a, b, rel_tol=_JUMP)]
    if lines and jumps:
        listed = ", ".join(
            f"{a:g} → {b:g}" + (f" (× {b / a:.3g})" if a else "") for a, b in dict.fromkeys(jumps)
        )
        rank_zero_warn(f"The learning rate jumps where the run is resumed: {listed}.")


def _changes(
    kept: Mapping[str, Any] | None, used: Mapping[str, Any], clock: TrainingClock
) -> Iterator[str]:
    if kept is not None:
        yield from differences(kept, used)
    before, now = clock.checkpoint_horizon, clock.horizon
    if before is not None and now is not None:
        old, new = (f"{horizon.budget:g} {horizon.clock}" for horizon in (before, now))
        if old != new:
            yield f"budget: {old} → {new}"
    if clock.cooldown is not None:
        at, over = clock.cooldown
        yield f"cooldown: from {at:.4g} to {at + over:.4g} of the budget"


def _written(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_written(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
