"""Lightning's hooks of validation, test and prediction, and the stages that they run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from lightning_bigopt.engine.buffer_snapshot import BufferSnapshot
from lightning_bigopt.engine.clock import Clock
from lightning_bigopt.engine.stage import Fit, Stages, overriding
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access.checkpoint_loading import restore_loading

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["EvaluationHooks"]


class EvaluationHooks(Callback):
    """Runs the stages ``begin_evaluation`` and ``end_evaluation``, during a fit and without one."""

    _fit: Fit | None
    clock: Clock

    def __init__(self) -> None:
        super().__init__()
        self._unlisted: list[Stages] = []  # capabilities whose hooks another callback calls
        self._evaluated: list[Stages] = []  # the capabilities that an evaluation has begun with

    def _collect(self, trainer: Trainer) -> list[Stages]:
        """Returns the capabilities of the Trainer, ordered by rank."""
        listed = [c for c in trainer_callbacks.callbacks_of(trainer) if isinstance(c, Stages)]
        return sorted([*listed, *self._unlisted], key=lambda c: c.rank)

    def _window_buffers(self) -> BufferSnapshot | None:
        """Returns the buffers at the start of the open window; None if no window is open."""
        if self._fit is None or not self.clock.window_is_open:
            return None
        return self._fit.buffers

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the stage ``begin_evaluation`` of all capabilities in the Trainer's list."""
        if trainer_callbacks.find_callback(trainer, EvaluationHooks) is not self:
            return  # a second engine does nothing
        if (buffers := self._window_buffers()) is not None:
            buffers.begin_evaluation()
        # Kept, because a callback may be removed before the evaluation ends.
        self._evaluated = self._collect(trainer)
        for capability in overriding(self._evaluated)["begin_evaluation"]:
            capability.begin_evaluation(trainer, pl_module)

    def on_validation_batch_end(self, *arguments: Any) -> None:
        """Handles a signal of SLURM, because a validation may last longer than the time left."""
        # Several processes wait for the end of the validation: they receive the signal at different
        # batches, and the collectives of the handler would meet those of the metrics.
        if self._fit is not None and self._fit.requeue is not None:
            self._fit.requeue.settle_alone()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the stage ``end_evaluation`` of the capabilities of the evaluation."""
        evaluated, self._evaluated = self._evaluated, []
        for capability in overriding(evaluated)["end_evaluation"]:
            capability.end_evaluation(trainer, pl_module)
        if (buffers := self._window_buffers()) is not None:
            buffers.end_evaluation()
        if self._fit is not None and self._fit.requeue is not None:
            self._fit.requeue.settle()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def _end_failed_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs ``end_evaluation`` after an error, where ``begin_evaluation`` is implemented."""
        restore_loading(trainer)
        evaluated, self._evaluated = self._evaluated, []
        for capability in overriding(evaluated)["begin_evaluation"]:
            capability.end_evaluation(trainer, pl_module)
