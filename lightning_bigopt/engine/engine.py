"""The engine: a Lightning callback that runs the capabilities of one Trainer in a fixed order."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_bigopt.batching.exact_loader import GlobalBatchLoader
from lightning_bigopt.engine import budget, fit_setup, optimizer_setup, process_settings
from lightning_bigopt.engine.batch_counter import BatchCounter
from lightning_bigopt.engine.clock import Clock
from lightning_bigopt.engine.evaluation import EvaluationHooks
from lightning_bigopt.engine.optimizer_modes import prepare_trial
from lightning_bigopt.engine.snapshot import Snapshot
from lightning_bigopt.engine.stage import Fit, Stages
from lightning_bigopt.engine.step import StepHooks
from lightning_bigopt.engine.unfinished_update import check_update_is_complete
from lightning_bigopt.engine.update_check import UpdateCheck
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import loggers, loop, strategies, trial_runs
from lightning_bigopt.trainer_access.checkpoint_loading import accept_subclasses, restore_loading

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Engine"]


class Engine(EvaluationHooks, StepHooks):
    """Runs the capabilities of lightning_bigopt; the first capability adds it to the Trainer.

    It starts and ends fits, ends epochs, and saves state. Its bases run steps and evaluations.

    State:
        ``clock``: the counts and the horizon; ``groups``: the base values of scheduled fields other
        than the learning rate, whose base values are in the checkpoint's ``lr_schedulers``;
        ``written``: the last values of all scheduled fields;
        ``loader``: epoch and position of a GlobalBatchLoader;
        ``repeat``: how each optimizer evaluates its closure in a step;
        ``training_weights``: those that differ from the model's, for optimizers with two modes.
    """

    version = 2
    needs_horizon = False
    # The key in checkpoints; Lightning shows it in a warning if the engine is missing.
    state_key = "lightning_bigopt.Engine (any callback of lightning_bigopt adds it)"

    def __init__(self) -> None:
        super().__init__()
        self._run = object()  # identifies a run: capabilities of another run are reset
        self._loaded: dict[str, Any] | None = None
        # The state that is saved after a fit, and the loader's also before the first batch.
        state: dict[str, Any] = {"groups": {}, "written": {}, "loader": None, "repeat": []}
        self._idle_state = state
        self._last_trainer: weakref.ref[Trainer] | None = None

    def __repr__(self) -> str:
        names = [type(capability).__name__ for capability in self._capabilities()]
        status = f"runs {', '.join(names)}" if names else "idle"
        return f"Engine(lightning_bigopt: {status})"

    def _capabilities(self) -> list[Stages]:
        return [] if self._fit is None else self._fit.capabilities

    # -------------------------------------------------------------------------- start and end

    def add_unlisted(self, capability: Stages) -> None:
        """Adds a capability whose hooks another callback calls, instead of the Trainer."""
        self._end()  # first, because it clears this list
        self._unlisted.append(capability)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends a previous fit that was not ended because of an error."""
        self._end()
        accept_subclasses(trainer)
        if stage == "fit":
            prepare_trial(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collects the capabilities, checks for conflicts, and installs hooks.

        Raises:
            ValueError: If two capabilities own the same thing, a required capability is missing, or
                a capability finds a conflict.
        """
        if trainer_callbacks.find_callback(trainer, Engine) is not self:
            return  # a second engine stays idle
        self._clear_fit()
        last = None if self._last_trainer is None else self._last_trainer()
        # The user has passed trainer.callbacks, with this engine or a copy of it, to another
        # Trainer. A copy of the whole Trainer continues: its own counts are not 0.
        if last is not trainer and (self._last_trainer is not None or not trainer.global_step):
            self.clock, self._run = Clock(), object()
        self._last_trainer = weakref.ref(trainer)
        self._idle_state["loader"] = self._idle_state["training_weights"] = None
        self._fit = Fit(
            trainer=trainer,
            module=pl_module,
            clock=self.clock,
            groups=optimizer_setup.group_schedule(trainer),
            known_optimizers=list(trainer.optimizers),
            start_clock=self._start_clock,
            rewrite_groups=self._rewrite_groups,
            finish_batch=self.finish_batch,
            take_snapshot=self._take_snapshot,
        )
        # Collected here and not in setup: in a second fit the engine's setup may run before that of
        # new capabilities, because mixins make new callbacks for a new module.
        self._set_capabilities(self._fit, self._collect(trainer))
        self._fit.modes.prepare()
        fit_setup.check(self._fit, self._run)
        process_settings.publish_settings(self._fit)
        self._fit.controls_steps = bool(self._updating)
        fit_setup.install(
            self._fit,
            receive_loader=self._receive_loader if self._stages["loader_ready"] else None,
            collect_weights=self._collect_weights,
            collect_optimizer=self._collect_optimizer,
        )
        # Lightning restores the states of schedulers after on_fit_start, before on_train_start.
        optimizer_setup.install(self._fit)

    def _receive_loader(self, loader: Any) -> None:
        if self._fit is None:
            return
        # With max_epochs Lightning does not restore the state of a loader from a checkpoint of the
        # end of an epoch.
        state = None if self._loaded is None else self._loaded.get("loader")
        if isinstance(loader, GlobalBatchLoader):
            if state is not None:
                loader.load_state_dict(state)
            self._idle_state["loader"] = loader.state_dict()
        for capability in self._stages["loader_ready"]:
            capability.loader_ready(self._fit, loader)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock and the capabilities; Lightning has restored all state by now."""
        if self._fit is not None:
            loop.begin_next_epoch(trainer)
            self._start(self._fit)
            for capability in self._stages["announce"]:
                capability.announce(self._fit)
            if self.clock.horizon is not None and self._needs_horizon():
                budget.announce_limits(trainer, self.clock.horizon)
            if self.clock.budget_exhausted:
                trainer.should_stop = True  # a run that has ended is started again

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the epoch, and drops a batch that has not ended."""
        if self._fit is None:
            return
        assert self._counter is not None  # set in on_train_start
        self._batch = None
        if (buffers := self._window_buffers()) is not None:
            # The epoch was left inside a window, whose gradients are lost.
            buffers.restore_()
        self.clock.end_epoch(trainer)
        self._counter.end_epoch()
        if self.clock.budget_exhausted:
            trainer.should_stop = True  # the epoch may have ended before its announced length
        if self._update_check is not None:
            self._update_check.end_epoch(self._updating)
        if self._fit.shard_group is None:
            self._fit.optimizers.check_module()
        for capability in self._stages["end_epoch"]:
            capability.end_epoch(self._fit)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if the run has ended before its schedules."""
        fit, clock = self._fit, self.clock
        if fit is None:
            return
        if fit.requeue is not None:
            fit.requeue.settle()
        if clock.horizon is not None and clock.cooldown is None and self._needs_horizon():
            budget.report_early_end(trainer, clock.horizon, fraction=clock.fraction)

    def _needs_horizon(self) -> bool:
        return self.needs_horizon or any(c.needs_horizon for c in self._capabilities())

    def _counts_updates(self) -> bool:
        """Returns whether a capability uses a budget in updates."""
        horizon = self.clock.horizon
        return horizon is not None and horizon.clock == "steps" and self._needs_horizon()

    def _start(self, fit: Fit) -> None:
        self._start_clock()
        optimizer_setup.adopt_values(fit.trainer, fit.groups)  # of a learning-rate finder
        fit.shard_group = strategies.shard_group(fit.trainer)
        process_settings.check_processes(fit)
        fit.modes.read_shards()
        strategies.check_first_window(fit.trainer)
        needs = fit_setup.needs_samples(fit)
        self._counter = BatchCounter(fit.trainer, self.clock, needs_samples=needs)
        fit.optimizers.start([optimizer for _, optimizer in fit.groups])
        # Under automatic optimization Lightning counts an update in any case.
        if self._updating or not fit.module.automatic_optimization:
            self._update_check = UpdateCheck(fit.trainer, counts_updates=self._counts_updates)
        for capability in self._stages["start"]:
            capability.start(fit)
        fit.groups.write(self.clock.progress())
        fit.has_started = True

    def _start_clock(self) -> Clock:
        """Restores loaded state and determines the horizon, once per fit.

        Lightning may fetch a batch of a GlobalBatchLoader before ``on_train_start``; its size
        depends on the clock, which is then started earlier.
        """
        fit = self._fit
        assert fit is not None  # set in on_fit_start
        if not self._clock_runs:
            loaded, self._loaded = self._loaded, None
            needed = fit_setup.restore(fit, loaded) or self._needs_horizon()
            fit_setup.start_clock(fit, self._stages["simulator"], needs_horizon=needed)
            self._clock_runs = True
        return self.clock

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Ends the evaluation and the fit; Lightning does not call ``teardown`` after an error."""
        self._end_failed_evaluation(trainer, pl_module)
        try:
            self.finish_batch()
            # As at the end of an epoch. ModelCheckpoint(save_on_exception=True) saves later.
            if (buffers := self._window_buffers()) is not None:
                buffers.restore_()
            if self._fit is not None and self._fit.requeue is not None:
                self._fit.requeue.settle_alone()
        finally:
            trial_runs.call_before_batch(trainer, None)
            self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the fit, and drops loaded state that was not applied."""
        loaded, self._loaded, self._unlisted = self._loaded, None, []
        if self._fit is not None and not self._clock_runs:
            # A resume of a finished run. A checkpoint that is saved later contains the state.
            fit_setup.restore(self._fit, loaded)
            self.clock.restore_without_training()
        for callback in trainer_callbacks.callbacks_of(trainer):
            if isinstance(callback, Stages):
                callback.take_loaded_state()  # loaded by validate or test, or by a finder
        trial_runs.call_before_batch(trainer, None)
        restore_loading(trainer)
        self._end()

    def _end(self) -> None:
        if self._fit is None:
            return
        self._idle_state, self._unlisted = self._fit_state(self._fit), []
        fit, check, self._fit = self._fit, self._update_check, None
        self._clear_fit()
        try:
            fit_setup.end(fit, check)
        finally:
            self._idle_state["training_weights"] = fit.modes.end()

    def _take_snapshot(self, **options: Any) -> Snapshot:
        fit = self._fit
        assert fit is not None  # called through the Fit
        # After a rewind the loaders start again with the rest of the epoch.
        rewound = partial(self.on_train_epoch_start, fit.trainer, fit.module)
        parts = (fit.trainer, fit.module, self.clock, fit.groups, fit.capabilities)
        return Snapshot(*parts, rewound=rewound, **options)

    # ---------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Returns the state after the last update that ``global_step`` counts."""
        if self._loaded is not None:
            return self._loaded  # not applied yet, see Capability.state_dict
        self.finish_batch()
        check_update_is_complete(self._fit, evaluations=self._evaluations)
        if self._fit is not None:
            # A run that is killed after the checkpoint must not lose values before it.
            loggers.flush(self._fit.trainer)
        return {
            "version": self.version,
            "clock": self.clock.state_dict(),
            "samples_are_known": self.clock.samples_are_known,
            **(self._idle_state if self._fit is None else self._fit_state(self._fit)),
        }

    def _fit_state(self, fit: Fit) -> dict[str, Any]:
        counter = self._counter
        loader = self._idle_state["loader"] if counter is None else counter.loader_state()
        return {
            "groups": fit_setup.saved_bases(fit),
            "written": fit.groups.written(),
            "loader": loader,
            "repeat": optimizer_setup.repeated_evaluations(fit.groups),
            "training_weights": fit.modes.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stores the state of a checkpoint until training starts; applies it at once after that.

        Raises:
            ValueError: If the state has an unknown version.
        """
        fit_setup.check_version(type(self).__name__, state_dict, (self.version,))
        if self._fit is not None and self._fit.has_started:
            # A learning-rate finder that runs within the fit restores its own checkpoint.
            self.clock.rewind(state_dict["clock"])
            self._fit.groups.load_state_dict(state_dict["groups"])
            self._fit.groups.restore_written(state_dict["written"])
            self._fit.modes.restore(state_dict.get("training_weights"))
        else:
            self._loaded = state_dict

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles must not contain the Trainer and the module.
        names = ("clock", "_run", "_loaded", "_idle_state")
        return {**vars(type(self)()), **{name: getattr(self, name) for name in names}}
