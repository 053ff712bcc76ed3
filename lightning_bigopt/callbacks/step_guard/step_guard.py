"""StepGuard: rejects harmful updates before they are applied."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.callbacks.step_guard.conflicts import check_conflicts
from lightning_bigopt.callbacks.step_guard.guard_state import GuardState
from lightning_bigopt.callbacks.step_guard.rejection_files import RejectionFiles
from lightning_bigopt.callbacks.step_guard.rejection_report import RejectedUpdate, WindowRecorder
from lightning_bigopt.callbacks.step_guard.too_many_rejections import too_many_rejections
from lightning_bigopt.checks import check_count
from lightning_bigopt.durations.duration import amount_of
from lightning_bigopt.engine.buffer_snapshot import BufferSnapshot
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Batch, Fit
from lightning_bigopt.engine.update import Rejection, Update
from lightning_bigopt.gradients.actions import Abort, Action, ClipToMedian, Skip
from lightning_bigopt.gradients.detectors import NonFinite, NormSpike
from lightning_bigopt.gradients.guard import Detector, Quantity, Verdict, inspect, record
from lightning_bigopt.gradients.norm_kernels import accumulation_dtype
from lightning_bigopt.monitoring.tags import tag_name
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import precision
from lightning_bigopt.type_checks import checked_tuple

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["StepGuard"]

_MAX_REJECTIONS = 100


@explain_arguments
class StepGuard(Capability):
    """Rejects harmful updates before they are applied, with one decision for all processes.

    A skipped update leaves parameters, optimizer state and step counters unchanged bit for bit, and
    the buffers of the module, such as running statistics and codebooks. Its data
    counts as consumed: ``global_step``, the learning-rate schedule and the clock advance.
    Under 16-mixed the GradScaler handles overflows: it skips the update and lowers its scale, and
    the guard does not count it. Several optimizers (manual optimization) are inspected separately,
    each with its own history: the others step if the update of one is skipped.

    Costs one transfer to the host per update, which is shared with the adaptive clipping rules,
    and with several processes one all-reduce of at most four numbers.

    Args:
        detectors: Detectors of harmful updates; None for ``[NonFinite(), NormSpike()]``.
        actions: Actions after a rejection; None for ``[Skip()]``. Without a
            :class:`~lightning_bigopt.gradients.ClipToMedian` the update is always skipped.
        max_consecutive: Number of rejections in a row that ends the run. The error names the last
            checkpoint before the first of them.
        forensics: Folder to which every process writes the batches and random states of at most 20
            rejected updates, for :func:`~lightning_bigopt.replay` (a failed write only warns);
            None for none. The micro-batches of a window then stay in memory until its update.

    Logs:
        With an OptimizationMonitor ``guard/skipped``, ``guard/rejected/<detector>``, and the reason
        of each rejection as text in TensorBoard.

    Raises:
        ValueError: At fit start with DeepSpeed, with an optimizer of Opacus, for a ``Backoff``
            without a LearningRateScheduler, and if a process cannot write to ``forensics``.
        TooManyRejectionsError: After ``max_consecutive`` rejections in a row; a RuntimeError.

    State:
        ``guarded``: for each optimizer the histories of the detectors, and the numbers of
        rejections: in total, by detector and in a row; ``backoffs``: the levels of the backoffs;
        ``settings``: detectors and actions as code. A resumed run logs their changes.

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
        limits = [action.after for action in self.actions if isinstance(action, Abort)]
        self._limit = min([max_consecutive, *limits])
        self._clips_to_median = any(isinstance(action, ClipToMedian) for action in self.actions)
        # The loss of a window is the mean over its samples.
        self._reads_loss = any(detector.quantity == "loss" for detector in self.detectors)
        self.needs_samples = "optional" if self._reads_loss or forensics is not None else None
        self._window = WindowRecorder(RejectionFiles(forensics))
        self._buffers = BufferSnapshot()
        self._state = GuardState(self.detectors, self.actions)
        self._rejections: deque[RejectedUpdate] = deque(maxlen=_MAX_REJECTIONS)
        self._accepts = False  # the last decision

    # ---------------------------------------------------------------------------- lifetime

    def check_fit(self, fit: Fit) -> None:
        """Raises for optimizers whose step cannot be skipped, and a Backoff without scheduler."""
        check_conflicts(fit, has_backoffs=self._state.has_backoffs)

    def start(self, fit: Fit) -> None:
        """Starts with an empty window: checkpoints contain no gradients. Checks the folder."""
        self._window.files.check(fit.trainer)
        self._window.clear()
        # In manual optimization a window ends with an update, and may contain several batches.
        self._buffers = fit.buffers if fit.module.automatic_optimization else BufferSnapshot()
        self.begin_epoch(fit)  # which is not called in an epoch that is resumed in its middle
        if self._state.has_backoffs:
            fit.groups.adjust("lr", self._state.apply_backoffs, owner=self, is_planned=False)

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

    def end_epoch(self, fit: Fit) -> None:
        """Clears the window: windows end with the epoch."""
        self._window.clear()

    def end(self, fit: Fit) -> None:
        """Logs the number of rejected updates, and releases the batches."""
        self._window.clear()
        self._buffers = BufferSnapshot()
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
        rejection, self._accepts = None, False
        if readings is None:
            # The GradScaler skips this update. Finite numbers in buffers are kept, as they would be
            # without the guard; a NaN among them would stay forever.
            self._buffers.restore_nonfinite_()
        else:
            rejection = self._inspect(self.fit.trainer, update, readings)
        self._window.close()
        return rejection

    def after_step(self, update: Update) -> None:
        """Ends a series of rejections. Not earlier: a repeated evaluation may be rejected."""
        if self._accepts:
            self._state.of_optimizer(update.label)["consecutive"] = 0
            self._state.recover_learning_rate()

    def _read(self, trainer: Trainer, update: Update) -> dict[Quantity, float] | None:
        """Returns norm and loss, equal on all processes; None after an overflow of the scaler."""
        total = update.norms.total
        like = total.new_zeros((), dtype=accumulation_dtype(total.device))
        overflow = like
        if update.scaler_skips_overflow:
            flag = precision.scaler_found_inf(trainer, update.optimizer)
            overflow = like if flag is None else flag.to(like)
        numbers = [total.to(like), overflow]
        if self._reads_loss:
            numbers += self._window.weighted_loss(like)
        # One all-reduce and one transfer for all numbers. The decision is made on the mean of the
        # norms of all processes, so that it is the same everywhere. Clipping reads the norm of this
        # process, which is another one if the processes keep their own gradients (local SGD).
        summed = trainer.strategy.reduce(torch.stack(numbers), reduce_op="sum")
        own, *sums = torch.cat([numbers[0].view(1), summed]).tolist()
        norm, overflows, *loss = (number / trainer.world_size for number in sums)
        if overflows > 0:
            return None
        update.norms.take_value(own)
        readings: dict[Quantity, float] = {"norm": norm}
        if loss and loss[1] != 0:
            readings["loss"] = loss[0] / loss[1]
        return readings

    def _inspect(
        self, trainer: Trainer, update: Update, readings: dict[Quantity, float]
    ) -> Rejection | None:
        guarded = self._state.of_optimizer(update.label)
        states = self._state.histories(guarded)
        verdict = inspect(self.detectors, states, readings)
        # Before the reading enters the histories, which it would change.
        norm = readings["norm"]
        factor = None if verdict is None else self._median_factor(guarded, norm, update, verdict)
        record(self.detectors, states, readings, verdict)
        self._accepts = verdict is None
        if verdict is None:
            return None
        if factor is None:
            self._buffers.restore_()  # first, because too many rejections raise
        self._reject(trainer, update, guarded, verdict, norm)
        if factor is not None:
            update.shrink_(factor)
            return None
        guarded["skipped"] += 1
        return Rejection(reason=verdict.reason)

    def _reject(
        self,
        trainer: Trainer,
        update: Update,
        guarded: dict[str, Any],
        verdict: Verdict,
        norm: float,
    ) -> None:
        if guarded["consecutive"] == 0:
            guarded["checkpoint"] = trainer_callbacks.newest_checkpoint(trainer)
        self._state.count_rejection(guarded, verdict.detector)
        rejected = self._window.report(trainer, update, verdict, norm)
        self._rejections.append(rejected)
        rank_zero_info(str(rejected))
        update.announce_rejection(update, str(rejected))
        if guarded["consecutive"] >= self._limit:
            raise too_many_rejections(trainer, rejected, self._limit, guarded["checkpoint"])
        self._state.lower_learning_rate()

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

    def metrics(self, fit: Fit) -> Mapping[str, float | Tensor]:
        """Returns the number of skipped updates, and of rejections by detector."""
        names = dict.fromkeys(type(detector).__name__ for detector in self.detectors)
        return {"guard/skipped": float(self._state.total("skipped"))} | {
            tag_name("guard/rejected", name): float(self._state.detected(name)) for name in names
        }

    # --------------------------------------------------------------------------------- state

    @property
    def rejections(self) -> tuple[RejectedUpdate, ...]:
        """The last rejected updates of this process, at most 100, oldest first."""
        return tuple(self._rejections)

    @property
    def rejected(self) -> int:
        """The number of rejected updates since the beginning of the run."""
        return self._state.total("rejected")

    def specification(self) -> str:
        """Returns detectors and actions as code."""
        return ", ".join(map(repr, (*self.detectors, *self.actions)))

    def reset(self) -> None:
        """Clears histories, counts and rejections."""
        self._state.reset()
        self._rejections.clear()

    def saved_state(self) -> dict[str, Any]:
        """Returns histories and counts by optimizer, and the levels of the backoffs."""
        return self._state.state_dict()

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the state from a checkpoint, for detectors that have not changed."""
        self._state.load_state_dict(state)

    def __repr__(self) -> str:
        names = [
            type(d).__name__ + ("(...)" if getattr(d, "__dataclass_fields__", {}) else "()")
            for d in self.detectors
        ]
        return f"StepGuard([{', '.join(names)}])"
