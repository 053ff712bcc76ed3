"""The order of a step: Lightning's hooks for a batch, and the stages that they run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_bigopt.engine import optimizer_setup
from lightning_bigopt.engine.batch_counter import BatchCounter
from lightning_bigopt.engine.clock import Clock
from lightning_bigopt.engine.overridden_stages import overriding
from lightning_bigopt.engine.stage import Batch, Fit, Stages
from lightning_bigopt.engine.update import Rejection, Update
from lightning_bigopt.engine.update_check import UpdateCheck
from lightning_bigopt.gradients.apply import clear_
from lightning_bigopt.gradients.optimizer_step import step_control
from lightning_bigopt.trainer_access import loggers, loop, precision

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["StepHooks"]

_UPDATE_STAGES = ("rescale", "needs_norms", "decide", "clip", "observe", "after_step")


class StepHooks(Callback):
    """Lightning's hooks for a batch. Only the engine has them, so that the order is fixed.

    A step runs :meth:`on_train_batch_start`, :meth:`on_before_backward`,
    :meth:`on_before_optimizer_step` and :meth:`_end_batch`. Each of them runs stages of
    :class:`~lightning_bigopt.engine.stage.Stages`.
    """

    _unlisted: list[Stages]

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self._fit: Fit | None = None
        self._evaluations = 0  # of an update, from its decisions until its batch has ended
        self._clear_fit()

    def _clear_fit(self) -> None:
        self._stages: dict[str, list[Stages]] = {}
        self._updating: list[Stages] = []  # the capabilities that act on updates
        self._logged: list[Stages] = []  # the capabilities whose metrics are logged here
        self._may_reject = self._epoch_is_new = self._clock_runs = False
        self._counter: BatchCounter | None = None
        self._batch: Batch | None = None
        self._batch_has_ended = self._batch_has_loss = False
        self._processed = 0
        self._update_check: UpdateCheck | None = None
        self._listed: list[object] = []  # the callbacks at the start of the last window
        self._rollback: Rejection | None = None  # of the current window

    def _set_capabilities(self, fit: Fit, capabilities: list[Stages]) -> None:
        fit.capabilities[:] = capabilities
        self._evaluations = 0  # not in _clear_fit: a checkpoint may be saved after an error
        self._stages, self._logged = overriding(capabilities, Stages), fit.without_monitor()
        self._updating = list(dict.fromkeys(c for n in _UPDATE_STAGES for c in self._stages[n]))
        self._may_reject = any(capability.may_reject for capability in self._stages["decide"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins an epoch, which may have new loaders."""
        if self._fit is None:
            return
        assert self._counter is not None  # set in on_train_start
        self._counter.begin_epoch(trainer)
        self.clock.epoch.begin(trainer)
        self._epoch_is_new = True
        for capability in self._stages["begin_epoch"]:
            capability.begin_epoch(self._fit)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch, and opens an accumulation window if none is open."""
        fit, clock = self._fit, self.clock
        if fit is None:
            return
        assert self._counter is not None  # set in on_train_start
        if not clock.epoch.has_begun:  # Lightning omits on_train_epoch_start after a resume
            clock.epoch.continue_epoch(trainer)
            self._counter.begin_epoch(trainer)
            self._epoch_is_new = True
        opens_window = not clock.window_is_open
        if opens_window:
            # Only here: removing a capability in the middle of a window would change the
            # accumulation or the weights of a gradient that is partly computed.
            self._read_list(fit)
            if self._epoch_is_new:
                fit.buffers.watch(fit.module)
            if fit.buffers.modules:  # a module without buffers costs nothing
                fit.buffers.save()
        amounts = self._counter.count(trainer, batch, batch_idx)
        clock.begin_batch(amounts, index=loop.ready_batches(trainer) - 1)
        self._batch = Batch(
            fit=fit,
            data=batch,
            index=batch_idx,
            opens_window=opens_window,
            samples=self._counter.samples,
            micro_batch=self._counter.micro_batch,
        )
        self._batch_has_ended = self._batch_has_loss = False
        self._processed = loop.processed_batches(trainer)
        for capability in self._stages["begin_batch"]:
            capability.begin_batch(self._batch)
        if self._update_check is not None:  # after begin_batch, which may set the window's length
            self._update_check.begin_batch(fit.groups.optimizers)
        for capability in self._stages["weigh_loss"]:
            self._batch.loss_factor *= capability.weigh_loss(self._batch)
        # Callbacks that run after the engine may change groups in on_train_epoch_start.
        self._follow_changes(fit)
        self._epoch_is_new = False

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Passes the loss to the capabilities, and multiplies its gradient by the loss factor."""
        batch = self._batch
        if batch is None:
            return
        self._batch_has_loss = True
        for capability in self._stages["observe_loss"]:
            capability.observe_loss(batch, precision.unscaled_loss(trainer, loss))
        factor = batch.loss_factor
        # A hook on the loss needs no patch. Without a gradient, backward raises its usual error.
        if (isinstance(factor, Tensor) or factor != 1) and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Rescales, measures, decides, clips and observes, before the optimizer steps."""
        fit, stages = self._fit, self._stages
        if fit is None:
            return
        self._follow_changes(fit)
        update = self._new_update(fit, optimizer)
        if update is None:
            self._evaluations += 1
            return
        for capability in stages["rescale"]:
            capability.rescale(update)
        # After rescaling and before any other change: all capabilities read the same norms.
        if any(capability.needs_norms(update) for capability in stages["needs_norms"]):
            update.measure()
        for capability in stages["decide"]:
            update.rejection = update.rejection or capability.decide(update)
        self._evaluations += 1  # not before: StepGuard may end the run by an error
        if update.rejection is None:
            for capability in stages["clip"]:
                capability.clip(update)
        for capability in [] if update.is_repeated else stages["observe"]:
            capability.observe(update)
        self._control_step(update)

    def _new_update(self, fit: Fit, optimizer: Optimizer) -> Update | None:
        """Creates the update; None if Lightning will skip it, or there are no gradients."""
        check = self._update_check
        if check is not None:
            check.called(optimizer)
        if not self._updating:
            return None
        # A GradScaler may have skipped the previous step, whose after_step calls still wait, and
        # LBFGS evaluates its closure several times in one step.
        clear_(optimizer)
        accumulates = self._batch is not None and not self._batch.opens_window
        is_repeated = optimizer_setup.begin_evaluation(
            fit, optimizer, may_reject=self._may_reject, accumulates=accumulates
        )
        has_scaler = precision.gradient_scaler(fit.trainer) is not None
        needs_loss = has_scaler and fit.module.automatic_optimization
        if needs_loss and not self._batch_has_loss:
            # training_step may return None for the last micro-batch of a window. With a GradScaler
            # Lightning then skips the update, even if earlier micro-batches have left gradients.
            # Those are not unscaled, and must not reach norms or histories.
            return None
        info = fit.optimizer_info(optimizer)
        # Under FSDP1 a process with empty shards has no gradients, but takes part in collectives.
        has_gradient = any(p.grad is not None for _, p in info.parameters)
        if has_gradient or fit.shard_group is not None:
            if check is not None:
                check.reached(optimizer)
        elif not needs_loss:
            return None
        if has_scaler:
            precision.unscale_gradients_(fit.trainer, optimizer)
        return Update(
            optimizer=optimizer,
            parameters=info.parameters,
            label=info.label,
            progress=self.clock.update_progress,
            norm_order=next((c.norm_order for c in fit.capabilities if c.norm_order), 2.0),
            shard_group=fit.shard_group,
            scaler_skips_overflow=has_scaler,
            is_repeated=is_repeated,
            announce_rejection=self._announce_rejection,
        )

    def _announce_rejection(self, update: Update, reason: str) -> None:
        for capability in self._stages["observe_rejection"]:
            capability.observe_rejection(update, reason)

    def _control_step(self, update: Update) -> None:
        """Makes the optimizer skip a rejected update, or run ``after_step`` after its step."""
        if update.rejection is not None:
            update.drop_gradients_()
            step_control(update.optimizer).skip_next()
            if update.rejection.roll_back is not None:
                self._rollback = update.rejection
            return
        for capability in self._stages["after_step"]:
            step_control(update.optimizer).after_step(partial(capability.after_step, update))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the batch, unless :meth:`finish_batch` has ended it."""
        if self._fit is None:
            return
        if self._batch is None:
            # The loader has yielded None, or a callback has removed itself in that hook.
            self.on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.clock.read_time()
        if not self._batch_has_ended:
            self._end_batch()
        if self._fit.requeue is not None and not self.clock.window_is_open:
            self._fit.requeue.settle()  # after whole windows, so that no loader loses one
        # Not in _end_batch, which saving may call: reading the time is a collective operation.
        if not self.clock.window_is_open and self.clock.budget_exhausted:
            trainer.should_stop = True
        self._batch = None

    def finish_batch(self) -> None:
        """Ends a batch that Lightning has counted but the engine has not.

        A callback may save before: the state must belong to the update that ``global_step`` counts.
        """
        fit, batch = self._fit, self._batch
        if fit is None or batch is None or self._batch_has_ended:
            return
        # A batch for which on_train_batch_start returned -1 is processed, but was never trained.
        trained = loop.processed_batches(fit.trainer) > self._processed
        if trained and loop.batch_is_processed(fit.trainer):
            self._end_batch()

    def _end_batch(self) -> None:
        fit, batch, clock = self._fit, self._batch, self.clock
        assert fit is not None  # checked by the callers
        assert batch is not None
        assert self._counter is not None
        self._batch_has_ended = True
        closes = batch.closes_window = loop.closes_window(fit.trainer)
        clock.end_batch(closes_window=closes)
        self._counter.end_batch(closes_window=closes)
        if self._update_check is not None:
            trained = self._batch_has_loss or not fit.module.automatic_optimization
            self._update_check.end_batch(self._updating, closes_window=closes and trained)
        for capability in self._stages["end_batch"]:
            capability.end_batch(batch)
        if not closes:
            self._evaluations = 0
            return
        if self._logged:
            loggers.log_if_due(fit.trainer, partial(fit.metrics, self._logged))
        self._follow_changes(fit)  # before a rollback, which writes values, too
        if self._rollback is not None:
            self._rollback.restore_snapshot(fit.trainer)
            self._rollback = None
        for capability in self._stages["end_window"]:
            capability.end_window(batch)
        if fit.groups:  # last, because all of the above may change adjustments and groups
            fit.groups.write(clock.progress())
        self._evaluations = 0

    def _read_list(self, fit: Fit) -> None:
        """Ends capabilities that were removed from the Trainer's list; warns about new ones."""
        listed: list[object] = [*fit.trainer.callbacks, *self._unlisted]  # type: ignore[attr-defined]
        if listed == self._listed:
            return
        before, self._listed = self._listed, listed
        kept = [capability for capability in fit.capabilities if capability in listed]
        for capability in [c for c in fit.capabilities if c not in kept]:
            capability.fit = None  # before end: the fit goes on without it
            capability.end(fit)
            fit.groups.release(capability)
        for added in listed:
            if isinstance(added, Stages) and added not in kept and added not in before:
                rank_zero_warn(
                    f"{added!r} was added to the Trainer's callbacks during the fit. It has no "
                    "effect in this fit; add callbacks of lightning_bigopt before it."
                )
        self._set_capabilities(fit, kept)

    def _follow_changes(self, fit: Fit) -> None:
        """Follows replaced optimizers, new groups, and values that other code has written."""
        trainer, groups = fit.trainer, fit.groups
        is_replaced = fit.known_optimizers != trainer.optimizers
        if not (is_replaced or self._epoch_is_new or self.clock.epoch.grew or groups.was_changed()):
            return
        if is_replaced:
            optimizer_setup.follow_optimizers(fit)
            for capability in fit.capabilities:
                capability.check_optimizers(fit)
            optimizer_setup.install(fit)
        fit.modes.follow_changes()
        optimizer_setup.adopt_values(trainer, groups, epoch_is_new=self._epoch_is_new)
        self._rewrite_groups()

    def _rewrite_groups(self) -> None:
        if self._fit is not None and self._clock_runs:
            self._fit.groups.write(self.clock.update_progress)
