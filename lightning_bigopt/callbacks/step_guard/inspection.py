"""Decides on each update: accept, reject, scale to the median, roll back, or end the run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_bigopt.callbacks.step_guard.guard_state import GuardState
from lightning_bigopt.callbacks.step_guard.rejected_update import RejectedUpdate
from lightning_bigopt.callbacks.step_guard.rejection_report import WindowRecorder
from lightning_bigopt.callbacks.step_guard.rollbacks import Rollbacks
from lightning_bigopt.callbacks.step_guard.too_many_rejections import too_many_rejections
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.engine.update import Rejection, Update
from lightning_bigopt.gradients.actions import Abort, Action, ClipToMedian
from lightning_bigopt.gradients.guard import Detector, Quantity, Verdict, inspect, record
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks

__all__ = ["Inspection"]

_MAX_REJECTIONS = 100
# A GradScaler begins at 2 ** 16 and halves: no gradient needs a scale this many halvings lower.
_MAX_OVERFLOWS = 40


class Inspection:
    """Inspects the updates of a run, with the detectors and actions of StepGuard.

    Args:
        detectors: The detectors.
        actions: The actions.
        max_consecutive: Number of rejections in a row that ends the run, or rolls it back.
        state: Histories and counts.
        window: Records the losses of the current window.
        rollbacks: Snapshots and rollbacks; None without a RollBack.

    Attributes:
        accepts: Whether the last update was accepted.
        rejections: The last rejected updates of this process, oldest first.
    """

    def __init__(
        self,
        detectors: Sequence[Detector],
        actions: Sequence[Action],
        *,
        max_consecutive: int,
        state: GuardState,
        window: WindowRecorder,
        rollbacks: Rollbacks | None,
    ) -> None:
        self._detectors, self._state, self._window = detectors, state, window
        self._rollbacks = rollbacks
        limits = [action.after for action in actions if isinstance(action, Abort)]
        self._aborts_after = min(limits, default=math.inf)
        self._limit = min([max_consecutive, *limits])
        self._clips_to_median = any(isinstance(action, ClipToMedian) for action in actions)
        self.rejections: deque[RejectedUpdate] = deque(maxlen=_MAX_REJECTIONS)
        self.accepts = False

    def inspect(
        self,
        fit: Fit,
        update: Update,
        readings: dict[Quantity, float],
        *,
        restore_buffers: Callable[[], None],
    ) -> Rejection | None:
        """Decides on an update, and adds its readings to the histories.

        Args:
            fit: The fit.
            update: The update.
            readings: Norm and loss, equal on all processes.
            restore_buffers: Restores the buffers of the module before the window of a skipped
                update.

        Raises:
            TooManyRejectionsError: After too many rejections in a row, or rollbacks.
        """
        self.accepts = False
        guarded = self._state.of_optimizer(update.label)
        guarded["overflows"] = 0
        states = self._state.histories(guarded)
        verdict = inspect(self._detectors, states, readings)
        # Before the reading enters the histories, which it would change.
        norm = readings["norm"]
        factor = None if verdict is None else self._median_factor(guarded, norm, update, verdict)
        record(self._detectors, states, readings, verdict)
        if verdict is None:
            verdict = self._rising_loss(fit, readings)
            if verdict is None:
                self.accepts = True
                return None
            rejected = self._window.report(fit.trainer, update, verdict, norm)
            assert self._rollbacks is not None  # _rising_loss returned a verdict
            return self._roll_back(fit, update, rejected, self._rollbacks.newest_checkpoint)
        if factor is None:
            restore_buffers()  # first, because too many rejections raise
        rejected = self._reject(fit, update, guarded, verdict, norm)
        if guarded["consecutive"] >= self._aborts_after:
            raise too_many_rejections(
                fit.trainer, self._too_many(), rejected, guarded["checkpoint"]
            )
        if guarded["consecutive"] >= self._limit:
            return self._roll_back(fit, update, rejected, guarded["checkpoint"])
        self._state.lower_learning_rate()
        if factor is not None:
            update.shrink_(factor)
            return None
        guarded["skipped"] += 1
        return Rejection(reason=verdict.reason)

    def overflow(self, fit: Fit, update: Update) -> Rejection | None:
        """Counts an update that the GradScaler skips; too many in a row are rejected.

        Raises:
            TooManyRejectionsError: After too many in a row without a rollback.
        """
        self.accepts = False
        guarded = self._state.of_optimizer(update.label)
        guarded["overflows"] += 1
        if guarded["overflows"] == 1:
            guarded["checkpoint"] = self._newest_checkpoint(fit)
        if guarded["overflows"] < _MAX_OVERFLOWS:
            return None
        guarded["overflows"] = 0
        verdict = Verdict(
            detector="GradScaler",
            quantity="norm",
            value=math.nan,
            limit=None,
            reason=f"the GradScaler has skipped {_MAX_OVERFLOWS} updates in a row",
        )
        rejected = self._window.report(fit.trainer, update, verdict, math.nan)
        rule = "gradients must be finite at some scale of the GradScaler"
        return self._roll_back(fit, update, rejected, guarded["checkpoint"], rule=rule)

    def _newest_checkpoint(self, fit: Fit) -> str | None:
        if self._rollbacks is None:
            return trainer_callbacks.newest_checkpoint(fit.trainer)
        return self._rollbacks.checkpoint_before(fit)

    def _too_many(self) -> str:
        return f"updates must not be rejected {self._limit} times in a row"

    def _rising_loss(self, fit: Fit, readings: Mapping[Quantity, float]) -> Verdict | None:
        """Returns the verdict of RollBack on the loss of an update that no detector rejects."""
        if self._rollbacks is None:
            return None
        reason = self._rollbacks.observe(fit, readings.get("loss"))
        if reason is None:
            return None
        name, value = type(self._rollbacks.spec).__name__, readings["loss"]
        return Verdict(detector=name, quantity="loss", value=value, limit=None, reason=reason)

    def _roll_back(
        self,
        fit: Fit,
        update: Update,
        rejected: RejectedUpdate,
        checkpoint: str | None,
        *,
        rule: str = "",
    ) -> Rejection:
        """Returns the decision to roll back; raises if there is no RollBack, or none is left."""
        problem = rule or self._too_many()
        if self._rollbacks is not None:
            problem = self._rollbacks.problem(fit) or ""
        if problem or self._rollbacks is None:
            raise too_many_rejections(fit.trainer, problem, rejected, checkpoint)
        rejection, report = self._rollbacks.begin(fit, rejected.reason, checkpoint=checkpoint)
        rank_zero_info(str(report))
        update.announce_rejection(update, str(report))
        return rejection

    def _reject(
        self,
        fit: Fit,
        update: Update,
        guarded: dict[str, Any],
        verdict: Verdict,
        norm: float,
    ) -> RejectedUpdate:
        if guarded["consecutive"] == 0:
            guarded["checkpoint"] = self._newest_checkpoint(fit)
        self._state.count_rejection(guarded, verdict.detector)
        rejected = self._window.report(fit.trainer, update, verdict, norm)
        self.rejections.append(rejected)
        rank_zero_info(str(rejected))
        update.announce_rejection(update, str(rejected))
        return rejected

    def _median_factor(
        self, guarded: dict[str, Any], norm: float, update: Update, verdict: Verdict
    ) -> float | None:
        """Returns ClipToMedian's factor on the gradient of this process; None to skip the update.

        It is None on all processes or on none.
        """
        if verdict.quantity != "norm" or not self._clips_to_median:
            return None
        typical, own = self._state.typical_norm(guarded, norm), update.norms.value
        if typical is None:
            return None
        return min(1.0, typical / own) if own else 1.0
