"""Takes snapshots of a run, decides when to go back to one, and lowers the learning rate after."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_bigopt.callbacks.step_guard.rollback_report import RolledBack, log_discarded
from lightning_bigopt.callbacks.step_guard.snapshot_store import KeptSnapshot, SnapshotStore
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.engine.update import Rejection
from lightning_bigopt.gradients.roll_back import RollBack
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import loaders, loop

__all__ = ["Rollbacks"]

_MAX_REPORTS = 100
_MAX_LOSSES = 4096
_ROUNDING = 1e-9


class Rollbacks:
    """The snapshots and rollbacks of a run.

    Args:
        spec: When to go back, and how training continues.

    Attributes:
        reports: The last rollbacks, oldest first; at most 100.
        count: Number of rollbacks of the run.
    """

    def __init__(self, spec: RollBack) -> None:
        self.spec = spec
        self._store = SnapshotStore(spec.folder, spec.keep, with_loaders=not spec.skip_data)
        self._module: weakref.ref[Any] | None = None
        self._every = self._recover = 1.0
        self.reset()

    def reset(self) -> None:
        """Clears snapshots, losses and counts."""
        self._store.clear()
        self._trigger = self.spec.initial_state()
        self._last = 0.0  # fraction of the budget at the last snapshot or rollback
        self._budget: list[Any] | None = None  # its unit and amount
        self._checkpoint: str | None = None  # the newest one before the loss was high
        self._discarded: list[Any] | None = None  # a checkpoint, and the one before the stretch
        self.reports: list[RolledBack] = []
        self.count = self._left_out = 0
        # The factor on the learning rate at the last rollback, and the fraction of the budget.
        self._level, self._level_at = 1.0, 0.0
        self._losses: list[tuple[int, float]] = []  # by the step of the loggers
        self._after: list[float] = []  # the first losses after a rollback
        self._waits_for_losses = False
        self._begun: RolledBack | None = None
        self._is_new_window = True

    # ------------------------------------------------------------------------ start and end

    def start(self, fit: Fit) -> None:
        """Converts durations, and drops snapshots that cannot be restored; a collective."""
        horizon = fit.clock.horizon
        assert horizon is not None  # StepGuard needs it
        self._every = horizon.fraction(self.spec.snapshot_every, name="snapshot_every")
        self._recover = horizon.fraction(self.spec.recover, name="recover")
        self._match_budget(fit)
        self._match_module(fit)
        self._store.start(fit)
        self._begun, self._is_new_window = None, True
        if not self.spec.skip_data and not loaders.stateful(fit.trainer):
            rank_zero_info(
                "RollBack(skip_data=False): the training loader has no state_dict; after a "
                "rollback training continues with the next data. Pass a loader with a state_dict "
                "to train the same data again."
            )

    def _match_budget(self, fit: Fit) -> None:
        """Converts the fractions of an earlier budget."""
        horizon, before = fit.clock.horizon, self._budget
        assert horizon is not None  # StepGuard needs it
        self._budget = [horizon.clock, horizon.budget]
        if before in (None, self._budget):
            return
        if before[0] == horizon.clock:
            scale = before[1] / horizon.budget
            self._last, self._level_at = self._last * scale, self._level_at * scale
        else:
            self._last = self._level_at = fit.clock.fraction

    def _match_module(self, fit: Fit) -> None:
        """Forgets the losses of another module that the Trainer has trained before."""
        before, self._module = self._module, weakref.ref(fit.module)
        if before is not None and before() is not fit.module:
            self._trigger, self._losses, self._after = self.spec.initial_state(), [], []
            self._level, self._waits_for_losses = 1.0, False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None}  # copies must not contain the module

    def end(self) -> None:
        """Releases what belongs to the fit."""
        self._store.end()

    # ----------------------------------------------------------------------------- deciding

    def observe(self, fit: Fit, loss: float | None) -> str | None:
        """Adds the loss of an update that no detector rejects; returns why to roll back, or None.

        Args:
            fit: The fit.
            loss: Mean loss of the window over all processes; None if it was not observed.
        """
        # An optimizer that evaluates its closure again has one loss for each evaluation.
        if loss is None or not self._is_new_window:
            return None
        self._is_new_window = False
        was_high = self._trigger["is_high"]
        reason = self.spec.observe(loss, self._trigger)
        if self._trigger["is_high"] and not was_high:
            self._checkpoint = self.checkpoint_before(fit)
        self._losses.append((loop.batches_that_stepped(fit.trainer), loss))
        del self._losses[:-_MAX_LOSSES]
        if self._waits_for_losses:
            self._after.append(loss)
        return reason

    @property
    def newest_checkpoint(self) -> str | None:
        """The newest checkpoint before the loss was above its limit; None without one."""
        return self._checkpoint

    def checkpoint_before(self, fit: Fit) -> str | None:
        """Returns the newest checkpoint that was not saved in a discarded stretch."""
        newest = trainer_callbacks.newest_checkpoint(fit.trainer)
        if self._discarded is not None and newest == self._discarded[0]:
            before: str | None = self._discarded[1]
            return before
        return newest

    def problem(self, fit: Fit) -> str | None:
        """Returns why there can be no rollback; None if there can be one. A collective."""
        if self.count >= self.spec.at_most:
            return f"StepGuard must not roll back more often than at_most={self.spec.at_most}"
        self._store.drop_lost(fit)  # someone may have deleted files
        if not self._store.kept:
            return "StepGuard must have a snapshot to roll back to"
        return None

    def begin(
        self, fit: Fit, reason: str, *, checkpoint: str | None
    ) -> tuple[Rejection, RolledBack]:
        """Begins a rollback at the end of the window; :meth:`problem` must be None.

        Args:
            fit: The fit.
            reason: Reason for the rollback.
            checkpoint: The newest checkpoint before the stretch that is discarded.
        """
        self._discarded = [trainer_callbacks.newest_checkpoint(fit.trainer), checkpoint]
        clock, trainer, kept = fit.clock, fit.trainer, self._store.kept
        is_repeated = self.count and clock.fraction < self._level_at + self._recover
        if is_repeated and len(kept) > 1:
            self._store.drop_newest()
        target = kept[-1]
        counts, unit = clock.counts(), "samples" if clock.samples_are_known else "batches"
        replay = not self.spec.skip_data and loaders.stateful(trainer)
        self._begun = RolledBack(
            update=trainer.global_step,
            to=target.steps,
            epoch=trainer.current_epoch,
            reason=reason,
            left_out=getattr(counts, unit) - getattr(target, unit),
            unit=unit,
            replayed=replay,
            loss_before=self._trigger["smoothed"],
        )
        self._log_discarded(fit, target)
        snapshot = self._store.restorable(fit, target)
        rejection = Rejection(reason=reason, roll_back=snapshot, rewind=True, replay=replay)
        return rejection, self._begun

    def _log_discarded(self, fit: Fit, target: KeptSnapshot) -> None:
        step = loop.batches_that_stepped(fit.trainer)
        discarded = fit.trainer.global_step - target.steps + 1
        losses = [pair for pair in self._losses if pair[0] > step - discarded]
        log_discarded(fit.trainer, losses, loggers_step=step)
        self._losses.clear()

    # ---------------------------------------------------------------------------- a window

    def end_window(self, fit: Fit, *, is_accepted: bool) -> None:
        """Ends a rollback, or takes a snapshot if one is due and the run is well.

        Args:
            fit: The fit.
            is_accepted: Whether the window's update was accepted.
        """
        self._is_new_window = True
        fraction = fit.clock.fraction
        if self._begun is not None:
            begun, self._begun = self._begun, None
            self.count += 1
            self._left_out += 0 if begun.replayed else begun.left_out
            # The level that is left of earlier rollbacks is lowered again.
            self._level = self._level_now(fraction) * self.spec.lr_factor
            self._level_at = self._last = fraction
            self.reports = [*self.reports, begun][-_MAX_REPORTS:]
            self._after, self._waits_for_losses = [], True
            return
        if self._waits_for_losses and len(self._after) >= self.spec.updates:
            mean = sum(self._after) / len(self._after)
            self.reports[-1] = replace(self.reports[-1], loss_after=mean)
            self._after, self._waits_for_losses = [], False
        is_due = not self._store.kept or fraction - self._last >= self._every - _ROUNDING
        if is_due and is_accepted and not self._trigger["is_high"]:
            self._last = fraction
            self._store.take(fit)

    def _level_now(self, fraction: float) -> float:
        """Returns the factor on the learning rate, which rises linearly back to 1."""
        since = max(0.0, fraction - self._level_at)
        if self._level == 1.0 or since >= self._recover:
            return 1.0
        return self._level + (1.0 - self._level) * since / self._recover

    def apply(self, value: float, progress: Progress) -> float:
        """Multiplies a learning rate by the factor at a progress."""
        return value * self._level_now(progress.fraction)

    def metrics(self) -> Mapping[str, float]:
        """Returns count and amount left out, and the losses around the last rollback."""
        values = {
            "rollback/count": float(self.count),
            "rollback/left_out": float(self._left_out),
        }
        if self.reports:
            last = self.reports[-1]
            for name in ("loss_before", "loss_after"):
                if (loss := getattr(last, name)) is not None:
                    values[f"rollback/{name}"] = loss
        return values

    # -------------------------------------------------------------------------------- state

    def snapshot(self) -> dict[str, Any]:
        """Returns the state that a rollback restores: that of the trigger."""
        return copy.deepcopy(self._trigger)

    def restore(self, trigger: dict[str, Any]) -> None:
        """Restores the trigger; the record of rollbacks and the snapshots stay."""
        self._trigger = copy.deepcopy(trigger)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that must survive a resume."""
        return {
            "trigger": copy.deepcopy(self._trigger),
            "last": self._last,
            "budget": self._budget,
            "checkpoint": self._checkpoint,
            "discarded": self._discarded,
            "count": self.count,
            "left_out": self._left_out,
            "level": [self._level, self._level_at],
            "losses": [list(pair) for pair in self._losses],
            "after": [self._waits_for_losses, list(self._after)],
            "reports": [report.as_state() for report in self.reports],
            "store": self._store.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state from a checkpoint, for whichever module is trained next."""
        self.reset()
        self._module = None
        self._trigger = copy.deepcopy(state["trigger"])
        self._last, self._budget = state["last"], state["budget"]
        self._checkpoint, self._discarded = state["checkpoint"], state["discarded"]
        self.count, self._left_out = state["count"], state["left_out"]
        self._level, self._level_at = state["level"]
        self._losses = [(int(step), loss) for step, loss in state["losses"]]
        self._waits_for_losses, self._after = state["after"][0], list(state["after"][1])
        self.reports = [RolledBack(**report) for report in state["reports"]]
        self._store.load_state_dict(state["store"])
