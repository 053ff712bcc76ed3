"""Lightning's hooks of validation, test and prediction, and the weights that checkpoints store."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from torch.optim import Optimizer

from lightning_bigopt.engine.buffer_snapshot import BufferSnapshot
from lightning_bigopt.engine.clock import Clock
from lightning_bigopt.engine.overridden_stages import overriding
from lightning_bigopt.engine.stage import Fit, Stages
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access.checkpoint_loading import restore_loading
from lightning_bigopt.trainer_access.saved_weights import Collect

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["EvaluationHooks"]


class EvaluationHooks(Callback):
    """Runs the stages ``begin_evaluation`` and ``end_evaluation``, during a fit and without one.

    It also collects the weights of a checkpoint, which are those of an evaluation.
    """

    _fit: Fit | None
    _stages: dict[str, list[Stages]]
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
        if self._fit is not None:
            # Until the next batch, so that ModelCheckpoint saves the weights that were evaluated.
            self._fit.modes.evaluate()
        # Kept, because a callback may be removed before the evaluation ends.
        self._evaluated = self._collect(trainer)
        for capability in overriding(self._evaluated, Stages)["begin_evaluation"]:
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
        for capability in overriding(evaluated, Stages)["end_evaluation"]:
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
        for capability in overriding(evaluated, Stages)["begin_evaluation"]:
            capability.end_evaluation(trainer, pl_module)

    # ---------------------------------------------------------------- the weights of a checkpoint

    def _listed_fit(self) -> Fit | None:
        """Returns the fit; None in a trial of Lightning's finders, which replace all callbacks."""
        fit = self._fit
        return fit if fit and self in trainer_callbacks.callbacks_of(fit.trainer) else None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Corrects the counts that Lightning reads before the weights: a rollback changes them."""
        checkpoint["global_step"], checkpoint["epoch"] = trainer.global_step, trainer.current_epoch

    def _collect_weights(self, collect: Collect) -> dict[str, Any]:
        fit = self._listed_fit()
        if fit is None:
            return collect()
        # Lightning collects the weights before the states of the callbacks: a rollback at the end
        # of the batch must come first, so that weights and states belong to the same update.
        fit.finish_batch()
        # The gradients of an open window are lost, and the batches may be trained again.
        buffers = self._window_buffers()
        with nullcontext() if buffers is None else buffers.in_place():
            weights = fit.modes.collect_weights(collect)
        for capability in self._stages["saved_weights"]:
            weights = capability.saved_weights(weights)
        return weights

    def _collect_optimizer(self, optimizer: Optimizer, collect: Collect) -> dict[str, Any]:
        fit = self._listed_fit()
        return collect() if fit is None else fit.modes.collect_optimizer(optimizer, collect)
