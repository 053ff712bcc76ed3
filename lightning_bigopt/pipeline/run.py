"""One pipeline per Trainer: the first of our hooks to fire does the work of all, in fixed order."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from lightning_bigopt import trainer_access
from lightning_bigopt.clock import ClockSettings, TrainingClock
from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.controllers.batch_size import BatchSizeController, constant_plan
from lightning_bigopt.durations import Progress
from lightning_bigopt.pipeline.hook_check import HookCheck
from lightning_bigopt.pipeline.owned import Owned, Ownership
from lightning_bigopt.pipeline.roster import ControllerT, Roster
from lightning_bigopt.pipeline.rounds import Rounds
from lightning_bigopt.pipeline.step import OptimizerStep
from lightning_bigopt.pipeline.window import Window

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_bigopt.clock import Simulate

__all__ = ["Pipeline"]

_numbers = itertools.count()


class Pipeline:
    """Runs the controllers of one Trainer.

    Every callback of ours hands every hook over. The first to do so for an event runs all
    controllers, the others find it done.

    Attributes:
        rounds: Finds the first callback to hand an event over.
        shard_group: As :func:`~lightning_bigopt.trainer_access.shard_group`, from train start on.
        hears_of_batches: Whether every ``on_train_batch_start`` is needed, or none after an epoch's
            first.
    """

    _of: ClassVar[weakref.WeakKeyDictionary[Trainer, Pipeline]] = weakref.WeakKeyDictionary()

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = weakref.ref(trainer)
        self.number = next(_numbers)
        self.rounds = Rounds()
        self._ownership = Ownership()
        self.shard_group: ProcessGroup | None = None
        self._has_scaler = False
        self.controllers = Roster()
        self.clock = TrainingClock()
        self.clock.bind(trainer)
        self.window = Window(self.clock)
        self.fitting = False
        self._clock_runs = False
        self._batch_has_loss = False
        self.hears_of_batches = True
        self._hook_check = HookCheck(trainer)

    @classmethod
    def of(cls, trainer: Trainer) -> Pipeline:
        """The pipeline of ``trainer``, made at the first call."""
        pipeline = cls._of.get(trainer)
        if pipeline is None:
            pipeline = cls._of[trainer] = cls(trainer)
        return pipeline

    @classmethod
    @contextmanager
    def beside(cls, trainer: Trainer) -> Iterator[None]:
        """A pipeline of its own for a trial; the Trainer's is not touched meanwhile."""
        kept = cls._of.pop(trainer, None)
        try:
            yield
        finally:
            cls._of.pop(trainer, None)
            if kept is not None:
                cls._of[trainer] = kept

    # -------------------------------------------------------------------------------- access

    @property
    def trainer(self) -> Trainer:
        """The Trainer, which the pipeline does not keep alive."""
        trainer = self._trainer()
        assert trainer is not None  # hooks are called by the Trainer itself
        return trainer

    @property
    def module(self) -> LightningModule:
        """The module being trained."""
        return self.trainer.lightning_module

    @property
    def progress(self) -> Progress:
        """What the update under way started from."""
        return self.window.progress

    @property
    def loss_factor(self) -> float | Tensor:
        """What the loss of the batch under way is multiplied by before its backward."""
        planner = self.find(BatchSizeController)
        return 1.0 if planner is None else planner.weights.factor

    @property
    def coming_progress(self) -> Progress:
        """What the update under way started from; between updates, what the next starts from."""
        return self.progress if self.window.is_open else self.clock.progress()

    def find(self, kind: type[ControllerT]) -> ControllerT | None:
        """The controller of a class, where this fit has one."""
        return self.controllers.find(kind)

    def parameters_of(self, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of an optimizer, looked up again when its groups change."""
        return self._owned_by(optimizer).parameters

    def _owned_by(self, optimizer: Optimizer) -> Owned:
        owned = self._ownership.known(optimizer)
        if owned is None:
            owned = self._ownership.look_up(self.trainer, optimizer)
            for controller in self.controllers.doing("on_new_parameters"):
                controller.on_new_parameters(self)
        return owned

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The names of all the module's parameters, looked up once a fit."""
        return self._ownership.all_names(self.trainer)

    # ------------------------------------------------------------------------------ lifetime

    def register(self, controller: Controller) -> None:
        """Adds a controller to the coming fit; called in ``setup``.

        Raises:
            ValueError: If there is one of its role already.
        """
        if not self.fitting:
            self.fitting = True
            self._clock_runs = False
            self.controllers = Roster()
            self._ownership = Ownership()
            self.clock.settings = ClockSettings()
            self.rounds = Rounds()
        self.controllers.refuse_twin(controller)
        self.clock.settings = self.clock.settings.merge(controller.settings)
        self.add(controller)

    def add(self, controller: Controller) -> None:
        """Adds a controller that another one brings, for this fit."""
        self.controllers.add(controller)

    def end(self) -> None:
        """Undoes what the controllers patched; the counters stay for a second fit."""
        if self.fitting:
            self.fitting = False
            for controller in self.controllers:
                controller.on_fit_end(self)
            self._ownership = Ownership()

    # --------------------------------------------------------------------------------- events

    def batch_hooks(self) -> tuple[str, ...]:
        """Lightning's hooks of a batch in which this fit does something."""
        always = "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"
        # With a GradScaler it must be known whether a batch gave a loss: see ``_comes_to_nothing``.
        if self._has_scaler or self.controllers.doing("on_loss"):
            return (*always, "on_before_backward")
        return always

    def fit_start(self) -> None:
        """``on_fit_start``: conflicts are refused."""
        for controller in self.controllers:
            controller.on_fit_start(self)

    def train_start(self) -> None:
        """``on_train_start``: all state is restored, the horizon is fixed."""
        self.start_clock()
        self._clock_runs = False
        self._has_scaler = trainer_access.gradient_scaler(self.trainer) is not None
        self.shard_group = trainer_access.shard_group(self.trainer)
        self.window.start()
        self._hook_check = HookCheck(self.trainer)
        for controller in self.controllers:
            controller.on_train_start(self)
        self._note_who_hears_of_batches()

    def start_clock(self) -> None:
        """Fixes the horizon, once a fit; an exact loader is asked for batches before it begins."""
        if self._clock_runs:
            return
        needed = any(controller.needs_horizon for controller in self.controllers)
        self.clock.start(
            self.trainer, self._simulator(), horizon="required" if needed else "optional"
        )
        self._clock_runs = True

    def _simulator(self) -> Simulate | None:
        planner, trainer = self.find(BatchSizeController), self.trainer
        return constant_plan(trainer) if planner is None else planner.simulator(trainer)

    def epoch_start(self) -> None:
        """``on_train_epoch_start``: loaders may be new, and who hands the batches over."""
        self.rounds.forget("batch_start", "before_backward", "before_step", "batch_end")
        self.clock.pin_samples(self.trainer)
        for controller in self.controllers:
            controller.on_epoch_start(self)
        self._note_who_hears_of_batches()

    def batch_start(self, batch: Any, index: int) -> None:
        """``on_train_batch_start``: a window may open."""
        self._begin_batch(batch, index)
        for controller in self.controllers.doing("on_batch_start"):
            controller.on_batch_start(self, batch, index)

    def _note_who_hears_of_batches(self) -> None:
        self.hears_of_batches = (
            self.clock.looks_at_batches
            or self.find(BatchSizeController) is not None
            or any(c.hears_of_batches for c in self.controllers.doing("on_batch_start"))
        )

    def begin_batch(self) -> None:
        """Counts the batch under way where nobody hears of its beginning.

        Whoever comes first in a batch calls it.
        """
        if not (self.hears_of_batches or self.window.batch_is_begun):
            self._begin_batch(None, 0)

    def _begin_batch(self, batch: Any, index: int) -> None:
        planner = self.find(BatchSizeController)
        served = None if planner is None else planner.served(self.trainer, index)
        self.window.begin_batch(self.trainer, batch, served=served)
        self._batch_has_loss = False

    def before_backward(self, loss: Tensor) -> None:
        """``on_before_backward``: a micro-batch's loss is known."""
        self.begin_batch()
        self._batch_has_loss = True
        listeners = self.controllers.doing("on_loss")
        if listeners:
            plain = trainer_access.unscaled_loss(self.trainer, loss)
            for controller in listeners:
                controller.on_loss(self, plain)

    def before_step(self, optimizer: Optimizer) -> None:
        """``on_before_optimizer_step``: rescale, measure, decide, clip, observe."""
        if not self._hook_check.is_over:
            self._hook_check.hear_update(self.trainer)
        self.begin_batch()
        owned = self._owned_by(optimizer)
        if self._comes_to_nothing(owned):
            return
        step = OptimizerStep(self, owned, has_scaler=self._has_scaler)
        for controller in self.controllers.doing("rescale"):
            controller.rescale(step)
        for controller in self.controllers.doing("wants_norms"):
            if controller.wants_norms(step):
                step.measure()
                break
        for controller in self.controllers.doing("decide"):
            controller.decide(step)
        if step.skipped is None:
            for controller in self.controllers.doing("clip"):
                controller.clip(step)
        for controller in self.controllers.doing("observe"):
            controller.observe(step)

    def _comes_to_nothing(self, owned: Owned) -> bool:
        """Whether Lightning calls for an update without a gradient, or for one that it leaves out.

        ``training_step`` may return None. With a GradScaler, Lightning makes no update then, even
        where earlier micro-batches of the window left gradients, which are still scaled.
        """
        if self._has_scaler and self.module.automatic_optimization:
            return not self._batch_has_loss
        if self.shard_group is not None:
            return False  # this process may have no shard of any gradient
        return all(parameter.grad is None for _, parameter in owned.parameters)

    def batch_end(self, outputs: Any, batch: Any) -> None:
        """``on_train_batch_end``: the batch counts as consumed."""
        trainer = self.trainer
        if batch is None and not self.window.batch_is_begun:  # Lightning begins no such batch
            self.window.begin_batch(trainer, None, served=(0, 0))
        self.begin_batch()
        self.window.end_batch(closes=trainer_access.closes_window(trainer))
        if not self._hook_check.is_over:
            self._hook_check.hear_end(trainer)
        for controller in self.controllers.doing("on_batch_end"):
            controller.on_batch_end(self, outputs, batch)
        if not self.window.is_open and self.clock.exhausted:
            trainer.should_stop = True

    def epoch_end(self) -> None:
        """``on_train_epoch_end``."""
        self.window.forget()
        for controller in self.controllers:
            controller.on_epoch_end(self)
