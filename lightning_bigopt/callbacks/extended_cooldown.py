"""The cooldown of a run that a resume extends: as long as keeps its learning rate the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_bigopt.callbacks.resume_report import is_resumed
from lightning_bigopt.checks import shown
from lightning_bigopt.durations.duration import Duration
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.convex_bound import best_decay
from lightning_bigopt.schedules.plateaus import WarmupStableDecay

__all__ = ["BEST", "ExtendedCooldown"]

BEST = "best"
_ENOUGH = 0.99  # ratio of best learning rates that counts as 1


class ExtendedCooldown:
    """Replaces the cooldown of schedules when a resume extends their run.

    The length is that of :func:`~lightning_bigopt.cooldown_for_extension`, at most what
    is left of the run. A run that is resumed again keeps it.

    Args:
        schedules: The schedules by the argument of the callback that holds them.
        on_resume: Argument of the callback.
        is_best: Whether to choose lengths; without it, only those of a checkpoint are kept.

    Attributes:
        lengths: Chosen lengths as fractions of the budget, by argument and configured length.

    Raises:
        ValueError: If ``is_best`` without ``on_resume="extend"``, or a schedule that changes is no
            WarmupStableDecay.
    """

    def __init__(
        self, schedules: Mapping[str, Schedule], *, on_resume: str | None, is_best: bool
    ) -> None:
        self.is_best, self.extends = is_best, on_resume == "extend"
        self.lengths: dict[str, float] = {}
        if not is_best:
            return
        if not self.extends:
            raise ValueError(
                "cooldown='best' must be given with on_resume='extend', got "
                f"on_resume={shown(on_resume)}; pass on_resume='extend', or a length such as "
                "cooldown='20%' with on_resume='cooldown'"
            )
        for name, schedule in schedules.items():
            if not (isinstance(schedule, WarmupStableDecay) or schedule.is_constant):
                raise ValueError(
                    f"{name} must be a WarmupStableDecay with cooldown='best', got "
                    f"{type(schedule).__name__}; write WarmupStableDecay(decay='20%')"
                )

    def apply(self, schedules: Mapping[str, Schedule], fit: Fit) -> None:
        """Chooses the length of the cooldown of each schedule, if a resume extends the run."""
        horizon, before = fit.clock.horizon, fit.clock.checkpoint_horizon
        if fit.trainer.global_step == 0:  # a new run with a callback that has trained another
            self.lengths = {}
        if not is_resumed(fit) or horizon is None or before is None or not self.extends:
            return
        if not (self.is_best or self.lengths) or (factor := _ratio(horizon, before)) <= 1.0:
            return
        self.lengths = {
            _key(name, schedule): self._chosen(_key(name, schedule), schedule, fit, factor)
            for name, schedule in schedules.items()
            if self.is_best and isinstance(schedule, WarmupStableDecay)
        }

    def of(self, name: str, schedule: Schedule) -> Schedule:
        """Returns the schedule of an argument with the chosen cooldown; others unchanged."""
        if not isinstance(schedule, WarmupStableDecay):
            return schedule
        length = self.lengths.get(_key(name, schedule))
        if length is None:
            return schedule
        found: Schedule = replace(schedule, decay=Duration(length, "fraction"))
        return found

    def _chosen(self, key: str, schedule: WarmupStableDecay, fit: Fit, factor: float) -> float:
        horizon, before = fit.clock.horizon, fit.clock.checkpoint_horizon
        assert horizon is not None  # checked by apply
        assert before is not None
        known = self.lengths.get(key)
        decay = before.fraction(schedule.decay, stop=1.0) if known is None else known
        if not decay:
            return 0.0
        left = 1.0 - max(fit.clock.fraction, schedule.resolve(horizon).warmup_end())

        def factors(length: float, updates: int) -> list[float]:
            curve: Any = replace(schedule, warmup=0, decay=float(length))
            found: list[float] = curve.values(updates)
            return found

        length, ratio = best_decay(factors, factor, decay=decay, longest=left)
        reason = ", so that the learning rate stays the best" if ratio >= _ENOUGH else ""
        rank_zero_info(
            f"The run is {factor:.3g} times as long as that of the checkpoint: its cooldown takes "
            f"{length:.1%} of it instead of {decay:.1%}{reason}."
        )
        if ratio < _ENOUGH:
            rank_zero_warn(
                f"The cooldown of {length:.1%} is all that is left of the run, and less than an "
                f"extension by {factor:.3g} needs: by the convex bound the best learning rate is "
                f"now {ratio:.2f} times that of the checkpoint. Extend the run from an earlier "
                "checkpoint, or lower the learning rate with base_lr='config'."
            )
        return length


def _key(argument: str, schedule: WarmupStableDecay) -> str:
    """Returns the key of a length: another configured decay replaces the chosen one."""
    return f"{argument} with decay={str(schedule.decay)!r}"


def _ratio(horizon: Horizon, before: Horizon) -> float:
    """Returns the length of a horizon divided by that of another."""
    for clock in (horizon.clock, "steps"):
        now, then = horizon.total(clock), before.total(clock)
        if now is not None and then is not None:
            return now / then
    raise ValueError(
        f"the budget must have the unit of the checkpoint with cooldown='best', got "
        f"{horizon.clock} and {before.clock}; pass the same kind of limit as before"
    )
