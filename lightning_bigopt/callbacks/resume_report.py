"""Logs the differences between a resumed run and its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_bigopt.engine.budget import describe_budget
from lightning_bigopt.engine.clock import Clock

__all__ = ["differences", "report_changes"]

# Relative difference from which on a learning rate is reported as a jump.
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


def report_changes(
    saved: Mapping[str, Any] | None,
    used: Mapping[str, Any],
    *,
    clock: Clock,
    rates: Sequence[tuple[float, float]],
    is_foreign: bool,
) -> None:
    """Logs the differences from the checkpoint, and warns if the learning rate jumps.

    Args:
        saved: Schedules and base learning rates of the checkpoint; None if it was saved without
            LearningRateScheduler.
        used: Schedules and base learning rates of this fit.
        clock: The clock, after its start.
        rates: For each parameter group the learning rate of the next update: in the checkpoint, and
            in this fit.
        is_foreign: Whether the checkpoint has the state of another scheduler; a warning has then
            been given.
    """
    lines = list(_changes(saved, used, clock))
    if saved is None and not is_foreign:
        share = clock.fraction
        rank_zero_warn(
            "The checkpoint was written without LearningRateScheduler: the schedule continues at "
            f"{share:.1%} of this Trainer's budget, with the configured base learning rates "
            f"({_format(used['base_lrs'])})."
        )
    if lines:
        rank_zero_info("Changes since the checkpoint:\n" + "\n".join(f"  {x}" for x in lines))
    jumps = [(a, b) for a, b in rates if not math.isclose(a, b, rel_tol=_JUMP)]
    if lines and jumps:
        listed = ", ".join(
            f"{a:g} → {b:g}" + (f" (× {b / a:.3g})" if a else "") for a, b in dict.fromkeys(jumps)
        )
        rank_zero_warn(f"The learning rate jumps when the run is resumed: {listed}.")


def _changes(
    saved: Mapping[str, Any] | None, used: Mapping[str, Any], clock: Clock
) -> Iterator[str]:
    if saved is not None:
        yield from differences(saved, used)
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
