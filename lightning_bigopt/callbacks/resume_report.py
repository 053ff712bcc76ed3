"""Logs the differences between a resumed run and its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_bigopt.engine.budget import describe_budget
from lightning_bigopt.engine.clock import Clock
from lightning_bigopt.engine.stage import Fit

__all__ = ["differences", "is_resumed", "report_changes", "with_adopted"]

# Relative difference from which on a value is reported as a jump.
_JUMP = 0.01


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, under: str = ""
) -> Iterator[str]:
    """Yields one line for each entry that differs, including entries of nested mappings.

    Args:
        before: Old entries.
        now: New entries.
        under: Prefix of the names in the lines.

    Example:
        >>> list(differences({"schedule": "Cosine()"}, {"schedule": "Linear()"}))
        ['schedule: Cosine() → Linear()']
    """
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) or isinstance(new, Mapping):
            yield from differences(old or {}, new or {}, under=f"{under}{name}.")
        elif old != new:
            yield f"{under}{name}: {_format(old)} → {_format(new)}"


def is_resumed(fit: Fit) -> bool:
    """Returns whether the fit continues a run from a checkpoint."""
    # Not the path alone: LearningRateFinder sets it too, at update 0.
    share = fit.clock.fraction
    has_consumed = bool(fit.clock.batches) if math.isnan(share) else share > 0
    return fit.trainer.ckpt_path is not None and has_consumed


def with_adopted(
    restored: Sequence[Sequence[float]],
    used: Sequence[Sequence[float]],
    adopted: Collection[tuple[int, int]],
) -> list[list[float]]:
    """Returns the base values of a checkpoint, with those that other code had changed by then.

    A value that was written before the checkpoint was saved becomes a base value at the next
    update, in the straight run as in the resumed one. It is no change since the checkpoint.

    Args:
        restored: The base values of the checkpoint, of each group of each optimizer.
        used: The base values of this fit.
        adopted: The positions, optimizer and group, whose base values were written before.

    Example:
        >>> with_adopted([[0.1, 0.2]], [[0.4, 0.5]], {(0, 1)})
        [[0.1, 0.5]]
    """
    return [
        [
            used[index][position] if (index, position) in adopted else base
            for position, base in enumerate(bases)
        ]
        for index, bases in enumerate(restored)
    ]


def report_changes(
    saved: Mapping[str, Any] | None,
    used: Mapping[str, Any],
    *,
    clock: Clock,
    values: Sequence[tuple[float, float]],
    is_foreign: bool = False,
    scheduler: str = "LearningRateScheduler",
    quantity: str = "learning rate",
    bases: str = "base_lrs",
    with_budget: bool = True,
) -> None:
    """Logs the differences from the checkpoint, and warns if the scheduled value jumps.

    Args:
        saved: Schedules and base values of the checkpoint; None if it was saved without the
            scheduler.
        used: Schedules and base values of this fit.
        clock: The clock, after its start.
        values: For each parameter group the value of the next update: in the checkpoint, and in
            this fit.
        is_foreign: Whether the checkpoint has the state of another scheduler; a warning has then
            been given.
        scheduler: Name of the scheduler.
        quantity: Name of the scheduled value.
        bases: Key of the base values in ``saved`` and ``used``.
        with_budget: Whether to log a change of the budget, and a cooldown. Only one scheduler of a
            fit does.
    """
    lines = [] if saved is None else list(differences(saved, used))
    of_budget = list(_budget_changes(clock))
    if saved is None and not is_foreign:
        share = clock.fraction
        at = "" if math.isnan(share) else f" at {share:.1%} of this Trainer's budget"
        rank_zero_warn(
            f"The checkpoint was written without {scheduler}: the schedule continues{at}, with the "
            f"configured base values of the {quantity} ({_format(used[bases])})."
        )
    logged = lines + of_budget * with_budget
    if logged:
        rank_zero_info("Changes since the checkpoint:\n" + "\n".join(f"  {x}" for x in logged))
    jumps = [(a, b) for a, b in values if not math.isclose(a, b, rel_tol=_JUMP)]
    if (lines or of_budget) and jumps:
        listed = ", ".join(
            f"{a:g} → {b:g}" + (f" (× {b / a:.3g})" if a else "") for a, b in dict.fromkeys(jumps)
        )
        rank_zero_warn(f"The {quantity} jumps when the run is resumed: {listed}.")


def _budget_changes(clock: Clock) -> Iterator[str]:
    before, now = clock.checkpoint_horizon, clock.horizon
    if before is not None and now is not None:
        old, new = map(describe_budget, (before, now))
        if old != new:
            yield f"budget: {old} → {new}"
    if clock.cooldown is not None:
        at, over = clock.cooldown
        yield f"cooldown: from {at:.4g} to {at + over:.4g} of the budget"


def _format(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_format(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
