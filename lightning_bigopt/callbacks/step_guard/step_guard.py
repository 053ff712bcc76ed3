"""StepGuard: rejects harmful updates before they are applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.callbacks.step_guard.conflicts import check_conflicts
from lightning_bigopt.callbacks.step_guard.guard_state import GuardState
from lightning_bigopt.callbacks.step_guard.inspection import Inspection
from lightning_bigopt.callbacks.step_guard.readings import read
from lightning_bigopt.callbacks.step_guard.rejected_update import RejectedUpdate
from lightning_bigopt.callbacks.step_guard.rejection_files import RejectionFiles
from lightning_bigopt.callbacks.step_guard.rejection_report import WindowRecorder
from lightning_bigopt.callbacks.step_guard.rollback_report import RolledBack
from lightning_bigopt.callbacks.step_guard.rollbacks import Rollbacks
from lightning_bigopt.checks import check_count
from lightning_bigopt.durations.duration import amount_of
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine.buffer_snapshot import BufferSnapshot
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Batch, Fit
from lightning_bigopt.engine.update import Rejection, Update
from lightning_bigopt.gradients.actions import Action, Skip
from lightning_bigopt.gradients.detectors import NonFinite, NormSpike
from lightning_bigopt.gradients.guard import Detector, Quantity
from lightning_bigopt.gradients.roll_back import RollBack
from lightning_bigopt.monitoring.tags import tag_name
from lightning_bigopt.type_checks import check_instance, checked_tuple

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["StepGuard"]


@explain_arguments
class StepGuard(Capability):
    """Rejects harmful updates before they are applied, with one decision for all processes.

    A skipped update leaves parameters, optimizer state and step counters unchanged bit for bit, and
    the buffers of the module, such as running statistics and codebooks. Its data
    counts as consumed: ``global_step``, the learning-rate schedule and the clock advance.
    Under 16-mixed the GradScaler handles overflows: it skips the update and lowers its scale, and
    the guard does not count it, unless 40 in a row overflow. Several optimizers (manual
    optimization) are inspected separately, each with its own history: the others step if the update
    of one is skipped.

    Costs one transfer to the host per update, which is shared with the adaptive clipping rules,
    and with several processes one all-reduce of at most four numbers.

    Args:
        detectors: Detectors of harmful updates; None for ``[NonFinite(), NormSpike()]``.
        actions: Actions after a rejection; None for ``[Skip()]``. Without a
            :class:`~lightning_bigopt.gradients.ClipToMedian` the update is always skipped.
        max_consecutive: Number of rejections in a row that ends the run, or rolls it back. The
            error names the last checkpoint before the first of them.
        forensics: Folder to which every process writes the batches and random states of at most 20
            rejected updates, for :func:`~lightning_bigopt.replay` (a failed write only warns);
            None for none. The micro-batches of a window then stay in memory until its update.
        roll_back: Goes back to a snapshot after ``max_consecutive`` rejections in a row, or if the
            loss stays high (:class:`~lightning_bigopt.RollBack`); None to take no snapshots.

    Logs:
        With an OptimizationMonitor ``guard/skipped``, ``guard/rejected/<detector>``, and the reason
        of each rejection as text in TensorBoard. With a RollBack also ``rollback/count``,
        ``rollback/left_out``, ``rollback/loss_before``, ``rollback/loss_after``, the losses of
        discarded updates as ``rollback/discarded_loss``, and each rollback as text.

    Raises:
        ValueError: At fit start with DeepSpeed or an optimizer of Opacus; for a ``Backoff``, or a
            ``RollBack(lr_factor=...)`` below 1, without a LearningRateScheduler; if a process
            cannot write to ``forensics`` or ``to``; for a RollBack with manual optimization, a
            ZeroRedundancyOptimizer, or a callback of Lightning that averages the weights.
        TooManyRejectionsError: After ``max_consecutive`` rejections in a row without a RollBack,
            or when a RollBack has no rollback left; a RuntimeError.

    State:
        ``guarded``: for each optimizer the histories of the detectors, and the numbers of
        rejections: in total, by detector and in a row; ``backoffs``: the levels of the backoffs;
        ``settings``: detectors and actions as code. A resumed run logs their changes. With a
        RollBack ``rollbacks``: the trigger, the record of rollbacks, and the snapshots.

    Example:
        >>> from lightning_bigopt import LossSpike, NonFinite, NormSpike, StepGuard
        >>> StepGuard()
        StepGuard([NonFinite(), NormSpike(...)])
        >>> guard = StepGuard([NonFinite(), LossSpike(threshold=10.0)], max_consecutive=5)
        >>> list(guard.rejections)
        []
    """

    owns = "step guard"
    rank = 40

    def __init__(
        self,
        detectors: Sequence[Detector] | None = None,
        *,
        actions: Sequence[Action] | None = None,
        max_consecutive: int = 10,
        forensics: str | None = None,
        roll_back: RollBack | None = None,
    ) -> None:
        self.detectors: tuple[Detector, ...] = checked_tuple(
            "detectors",
            (NonFinite(), NormSpike()) if detectors is None else detectors,
            Detector,
            hint="try [NonFinite(), NormSpike()]",
        )
        self.actions: tuple[Action, ...] = checked_tuple(
            "actions", (Skip(),) if actions is None else actions, Action, hint="try [Skip()]"
        )
        check_count("max_consecutive", max_consecutive, of="updates")
        if roll_back is not None:
            check_instance("roll_back", roll_back, RollBack, hint="write RollBack()")
        self.roll_back, self.needs_horizon = roll_back, roll_back is not None
        # The loss of a window is the mean over its samples.
        reads_loss = any(detector.quantity == "loss" for detector in self.detectors)
        self._reads_loss = reads_loss or roll_back is not None
        self.needs_samples = "optional" if self._reads_loss or forensics is not None else None
        self._window = WindowRecorder(RejectionFiles(forensics))
        self._buffers = BufferSnapshot()
        self._state = GuardState(self.detectors, self.actions, roll_back)
        self._rollbacks = None if roll_back is None else Rollbacks(roll_back)
        self._inspection = Inspection(
            self.detectors,
            self.actions,
            max_consecutive=max_consecutive,
            state=self._state,
            window=self._window,
            rollbacks=self._rollbacks,
        )

    # ---------------------------------------------------------------------------- lifetime

    def check_fit(self, fit: Fit) -> None:
        """Raises for optimizers whose step cannot be skipped, and a Backoff without scheduler."""
        check_conflicts(fit, has_backoffs=self._state.has_backoffs, roll_back=self.roll_back)

    def start(self, fit: Fit) -> None:
        """Starts with an empty window: checkpoints contain no gradients. Checks the folder."""
        self._window.files.check(fit.trainer)
        self._window.clear()
        # In manual optimization a window ends with an update, and may contain several batches.
        self._buffers = fit.buffers if fit.module.automatic_optimization else BufferSnapshot()
        self.begin_epoch(fit)  # which is not called in an epoch that is resumed in its middle
        if self._rollbacks is not None:
            self._rollbacks.start(fit)
        if self._lowers_rates:
            fit.groups.adjust("lr", self._lower, owner=self, is_planned=False)

    @property
    def _lowers_rates(self) -> bool:
        lowers = self.roll_back is not None and self.roll_back.lr_factor < 1
        return self._state.has_backoffs or lowers

    def _lower(self, value: float, progress: Progress) -> float:
        """Multiplies a learning rate by the factors of backoffs and rollbacks."""
        value = self._state.apply_backoffs(value, progress)
        return value if self._rollbacks is None else self._rollbacks.apply(value, progress)

    def announce(self, fit: Fit) -> None:
        """Logs changes of detectors and actions since the checkpoint."""
        self._state.report_changes()

    def begin_epoch(self, fit: Fit) -> None:
        """Finds the modules whose buffers are saved; they may be others than before."""
        if self._buffers is not fit.buffers:
            self._buffers.watch(fit.module)

    def begin_batch(self, batch: Batch) -> None:
        """Saves the buffers before a window, and the batch if batches are recorded."""
        if self._window.is_over and self._buffers is not batch.fit.buffers:
            self._buffers.save()
        self._window.begin(batch)

    def observe_loss(self, batch: Batch, loss: Tensor) -> None:
        """Records the loss, on the device."""
        self._window.add(batch, loss)

    def end_batch(self, batch: Batch) -> None:
        """Clears a window that ends without an update."""
        if batch.fit.module.automatic_optimization and batch.closes_window:
            self._window.clear()

    def end_window(self, batch: Batch) -> None:
        """Ends a rollback, or takes a snapshot."""
        if self._rollbacks is not None:
            self._rollbacks.end_window(batch.fit, is_accepted=self._inspection.accepts)
            self._inspection.accepts = False  # the next window may end without an update

    def end_epoch(self, fit: Fit) -> None:
        """Clears the window: windows end with the epoch."""
        self._window.clear()

    def end(self, fit: Fit) -> None:
        """Logs the number of rejected updates, and releases the batches."""
        self._window.clear()
        self._buffers = BufferSnapshot()
        if self._rollbacks is not None:
            self._rollbacks.end()
        if self.rejected:
            rank_zero_info(f"StepGuard rejected {amount_of(self.rejected, 'updates')} of this run.")

    # ------------------------------------------------------------------------------ decision

    def needs_norms(self, update: Update) -> bool:
        """Returns True: every update is inspected."""
        return True

    def decide(self, update: Update) -> Rejection | None:
        """Reads the norm, and the loss if a detector uses it, and decides. Synchronizes."""
        assert self.fit is not None  # set by the engine
        readings = self._read(self.fit.trainer, update)
        if readings is None:
            # The GradScaler skips this update. Finite numbers in buffers are kept, as they would be
            # without the guard; a NaN among them would stay forever.
            self._buffers.restore_nonfinite_()
            rejection = self._inspection.overflow(self.fit, update)
        else:
            rejection = self._inspection.inspect(
                self.fit, update, readings, restore_buffers=self._buffers.restore_
            )
        self._window.close()
        return rejection

    def _read(self, trainer: Trainer, update: Update) -> dict[Quantity, float] | None:
        """Returns norm and loss; the only transfer from the device."""
        return read(trainer, update, self._window, reads_loss=self._reads_loss)

    def after_step(self, update: Update) -> None:
        """Ends a series of rejections. Not earlier: a repeated evaluation may be rejected."""
        if self._inspection.accepts:
            self._state.of_optimizer(update.label)["consecutive"] = 0
            self._state.recover_learning_rate()

    def metrics(self, fit: Fit) -> Mapping[str, float | Tensor]:
        """Returns the number of skipped updates, and of rejections by detector."""
        names = dict.fromkeys(type(detector).__name__ for detector in self.detectors)
        values = {"guard/skipped": float(self._state.total("skipped"))} | {
            tag_name("guard/rejected", name): float(self._state.detected(name)) for name in names
        }
        return values if self._rollbacks is None else {**values, **self._rollbacks.metrics()}

    # --------------------------------------------------------------------------------- state

    @property
    def rejections(self) -> tuple[RejectedUpdate, ...]:
        """The last rejected updates of this process, at most 100, oldest first."""
        return tuple(self._inspection.rejections)

    @property
    def rejected(self) -> int:
        """The number of rejected updates since the beginning of the run."""
        return self._state.total("rejected")

    @property
    def rollbacks(self) -> tuple[RolledBack, ...]:
        """The last rollbacks, at most 100, oldest first."""
        return () if self._rollbacks is None else tuple(self._rollbacks.reports)

    def specification(self) -> str:
        """Returns detectors, actions and rollback as code."""
        parts = (*self.detectors, *self.actions, self.roll_back)
        return ", ".join(repr(part) for part in parts if part is not None)

    def reset(self) -> None:
        """Clears histories, counts and rejections."""
        self._state.reset()
        self._inspection.rejections.clear()
        if self._rollbacks is not None:
            self._rollbacks.reset()

    def saved_state(self) -> dict[str, Any]:
        """Returns histories and counts by optimizer, levels of backoffs, and the snapshots."""
        state = self._state.state_dict()
        if self._rollbacks is not None:
            state["rollbacks"] = self._rollbacks.state_dict()
        return state

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the state from a checkpoint, for detectors that have not changed."""
        self._state.load_state_dict(state)
        if self._rollbacks is not None and "rollbacks" in state:
            self._rollbacks.load_state_dict(state["rollbacks"])

    def snapshot(self) -> dict[str, Any]:
        """Returns the state that a rollback restores, without the snapshots."""
        state = self._state.state_dict()
        if self._rollbacks is not None:
            state["trigger"] = self._rollbacks.snapshot()
        return state

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Restores histories; with a RollBack, keeps the counts of rejections and rollbacks."""
        if self._rollbacks is None:
            self._state.load_state_dict(snapshot)
            return
        self._state.rewind(snapshot)
        self._rollbacks.restore(snapshot["trigger"])

    def __repr__(self) -> str:
        names = [
            type(d).__name__ + ("(...)" if getattr(d, "__dataclass_fields__", {}) else "()")
            for d in self.detectors
        ]
        return f"StepGuard([{', '.join(names)}])"
