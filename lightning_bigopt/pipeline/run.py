"""One pipeline per Trainer: the first of our hooks to fire does the work of all, in fixed order."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
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
from lightning_bigopt.pipeline.owned import Owned, Ownership
from lightning_bigopt.pipeline.roster import ControllerT, Roster
from lightning_bigopt.pipeline.step import OptimizerStep

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_bigopt.clock import Counts, Simulate

__all__ = ["Pipeline"]

_numbers = itertools.count()


class Pipeline:
    """Runs the controllers of one Trainer.

    Every callback of ours hands every hook over. The first to do so for an event runs all
    controllers, the others find it done. A new round of an event begins when a callback that has
    already called comes again, which needs no counter of Lightning's and holds for manual
    optimisation, several optimisers and closures that run more than once.
    """

    _of: ClassVar[weakref.WeakKeyDictionary[Trainer, Pipeline]] = weakref.WeakKeyDictionary()

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = weakref.ref(trainer)
        self.number = next(_numbers)
        self._callers: dict[str, set[int]] = {}
        self._ownership = Ownership()
        self.shard_group: ProcessGroup | None = None
        self._has_scaler = False
        self.controllers = Roster()
        self.clock = TrainingClock()
        self.clock.bind(trainer)
        self._opened: Counts = (0, 0, 0, 0)
        self._progress: Progress | None = Progress(fraction=0.0)
        self._samples_before_window = 0
        self.fitting = False
        self._clock_runs = False
        self._window_is_open = False
        self._batch_is_begun = self._batch_has_loss = False
        # Whether every ``on_train_batch_start`` is needed, or none after an epoch's first.
        self.hears_of_batches = True
        self._first_update_pending = True
        self._steps_at_start = 0
        self.batch_samples = 0

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
    def samples(self) -> int:
        """Samples consumed over all processes, the batch under way included."""
        return self.clock.counts()[2]

    @property
    def window_is_open(self) -> bool:
        """Whether micro-batches of an update were begun, and others of it are to come."""
        return self._window_is_open

    @property
    def window_samples(self) -> int:
        """Samples over all processes in the window under way, the batch under way included."""
        return self.samples - self._samples_before_window

    @property
    def progress(self) -> Progress:
        """What the update under way started from."""
        if self._progress is None:
            self._progress = self.clock.progress_at(self._opened)
        return self._progress

    @property
    def fraction(self) -> float:
        """``progress.fraction``, for who needs no more and asks once an update."""
        return self.clock.fraction_at(self._opened)

    @property
    def loss_factor(self) -> float | Tensor:
        """What the loss of the batch under way is multiplied by before its backward."""
        planner = self.find(BatchSizeController)
        return 1.0 if planner is None else planner.weights.factor

    @property
    def coming_progress(self) -> Progress:
        """What the update under way started from; between updates, what the next starts from."""
        return self.progress if self._window_is_open else self.clock.progress()

    def find(self, kind: type[ControllerT]) -> ControllerT | None:
        """The controller of a class, where this fit has one."""
        return self.controllers.find(kind)

    def parameters_of(self, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of an optimiser, looked up again when its groups change."""
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
            self._callers = {}
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

    def once(self, event: str, caller: object, run: Callable[..., None], *arguments: Any) -> bool:
        """Runs ``run`` for the first caller of a round of ``event``; whether this one was it."""
        callers = self._callers.get(event)
        if callers is None:
            callers = self._callers[event] = set()
        caller_id = id(caller)
        if caller_id in callers:
            callers.clear()
        first = not callers
        callers.add(caller_id)
        if first:
            run(*arguments)
        return first

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
        self._note_where_it_stands()
        self._window_is_open = self._batch_is_begun = self._batch_has_loss = False
        self._steps_at_start = self.trainer.global_step
        self._first_update_pending = True
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
        planner = self.find(BatchSizeController)
        if planner is None:
            if trainer_access.exact_loader(self.trainer) is not None:
                raise ValueError(
                    "callbacks must hold BatchSizeScheduler with GlobalBatchLoader, got none, and "
                    "the loader would serve every process all samples; add "
                    "BatchSizeScheduler(ConstantBatchSize(256))"
                )
            return constant_plan(self.trainer)
        return planner.simulator(self.trainer)

    def epoch_start(self) -> None:
        """``on_train_epoch_start``: loaders may be new, and who hands the batches over."""
        for event in ("batch_start", "before_backward", "before_step", "batch_end"):
            self._callers.pop(event, None)
        self.clock.pin_samples(self.trainer)
        for controller in self.controllers:
            controller.on_epoch_start(self)
        self._batch_is_begun = False  # the batch before may never have ended
        self._note_who_hears_of_batches()

    def batch_start(self, batch: Any, index: int) -> None:
        """``on_train_batch_start``: a window may open."""
        self._batch_is_begun = False
        self.begin_batch(batch, index)
        for controller in self.controllers.doing("on_batch_start"):
            controller.on_batch_start(self, batch, index)

    def _note_who_hears_of_batches(self) -> None:
        self.hears_of_batches = (
            self.clock.looks_at_batches
            or self.find(BatchSizeController) is not None
            or any(c.hears_of_batches for c in self.controllers.doing("on_batch_start"))
        )

    def begin_batch(self, batch: Any = None, index: int = 0) -> None:
        """Counts the batch under way; whoever comes first in a batch calls it.

        Batch and index are needed where :attr:`hears_of_batches`.
        """
        if self._batch_is_begun:
            return
        self._batch_is_begun = True
        if not self._window_is_open:
            self._note_where_it_stands()
            self._window_is_open = True
            self._samples_before_window = self.clock.samples
        planner = self.find(BatchSizeController)
        served = None if planner is None else planner.served(self.trainer, index)
        self.batch_samples = self.clock.begin_batch(self.trainer, batch, served=served)

    def _note_where_it_stands(self) -> None:
        self._opened, self._progress = self.clock.counts(), None

    def before_backward(self, loss: Tensor) -> None:
        """``on_before_backward``: a micro-batch's loss is known."""
        self._batch_has_loss = True
        listeners = self.controllers.doing("on_loss")
        if listeners:
            plain = trainer_access.unscaled_loss(self.trainer, loss)
            for controller in listeners:
                controller.on_loss(self, plain)

    def before_step(self, optimizer: Optimizer) -> None:
        """``on_before_optimizer_step``: rescale, measure, decide, clip, observe."""
        self._first_update_pending = False
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
        self.begin_batch()
        self._batch_is_begun = self._batch_has_loss = False
        self.clock.end_batch()
        self._window_is_open = not trainer_access.closes_window(trainer)
        if not self._window_is_open:
            self.clock.close_window()
        if self._first_update_pending and trainer.global_step > self._steps_at_start:
            raise RuntimeError(
                "on_before_optimizer_step must reach the callbacks, got an update without it: the "
                f"{type(trainer.strategy).__name__} or an overridden hook swallowed it; call "
                "super() in the hook, or remove the callbacks of lightning_bigopt"
            )
        for controller in self.controllers.doing("on_batch_end"):
            controller.on_batch_end(self, outputs, batch)
        if not self._window_is_open and self.clock.exhausted:
            trainer.should_stop = True

    def epoch_end(self) -> None:
        """``on_train_epoch_end``."""
        self._window_is_open = False
        for controller in self.controllers:
            controller.on_epoch_end(self)
