"""Logs the differences between a resumed run and its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_bigopt.checks import without_addresses
from lightning_bigopt.engine.budget import describe_budget
from lightning_bigopt.engine.clock import Clock
from lightning_bigopt.engine.stage import Fit

__all__ = [
    "changed_settings",
    "differences",
    "is_resumed",
    "report_changed_settings",
    "report_changes",
    "warn_of_flat_cooldown",
    "with_adopted",
]

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
        elif without_addresses(old) != without_addresses(new):
            yield f"{under}{name}: {_format(old)} → {_format(new)}"


def changed_settings(saved: Mapping[str, str] | None, used: Mapping[str, str]) -> list[str]:
    """Returns one line for each setting that differs from the checkpoint.

    Args:
        saved: The settings of the checkpoint as code; None for a checkpoint without settings. A
            setting that is not in it counts as unchanged, because an earlier version may have saved
            the checkpoint.
        used: The settings of this fit as code.

    Example:
        >>> changed_settings({"rule": "NormClip(1.0)"}, {"rule": "NormClip(2.0)", "scope": "all"})
        ['rule: NormClip(1.0) → NormClip(2.0)']
    """
    known = {name: text for name, text in (saved or {}).items() if name in used}
    return list(differences(known, {name: used[name] for name in known}))


def report_changed_settings(saved: Mapping[str, str] | None, used: Mapping[str, str]) -> None:
    """Logs the settings that differ from the checkpoint; see :func:`changed_settings`."""
    _log(changed_settings(saved, used))


def _log(changes: Sequence[str]) -> None:
    if changes:
        rank_zero_info("Changes since the checkpoint:\n" + "\n".join(f"  {x}" for x in changes))


def is_resumed(fit: Fit) -> bool:
    """Returns whether the fit continues a run from a checkpoint."""
    # Not the path alone: LearningRateFinder sets it too, at update 0.
    share = fit.clock.fraction
    has_consumed = bool(fit.clock.batches) if math.isnan(share) else share > 0
    if fit.clock.is_timed:  # a time begins at 0, also after a checkpoint without a time
        has_consumed = has_consumed or fit.trainer.global_step > 0
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
    _log(lines + of_budget * with_budget)
    jumps = [(a, b) for a, b in values if not math.isclose(a, b, rel_tol=_JUMP)]
    if (lines or of_budget) and jumps:
        listed = ", ".join(
            f"{a:g} → {b:g}" + (f" (× {b / a:.3g})" if a else "") for a, b in dict.fromkeys(jumps)
        )
        rank_zero_warn(f"The {quantity} jumps when the run is resumed: {listed}.")


def warn_of_flat_cooldown(factors: Sequence[float], *, end: float) -> None:
    """Warns if a cooldown starts at its end value, as that of a run that has ended at 0.

    Args:
        factors: The factor of each schedule at the start of the cooldown.
        end: Factor at the end of the cooldown.
    """
    start = max(factors)
    # A cooldown never rises.
    if start <= end or math.isclose(start, end, abs_tol=1e-9):
        rank_zero_warn(
            f"The schedule has decayed to the factor {start:g} where the cooldown starts, so that "
            f"the whole cooldown uses {start:g} times the base learning rate. Resume from a "
            "checkpoint before the decay of its schedule, or pass on_resume='extend'."
        )


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
