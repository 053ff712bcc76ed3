"""The stages of a fit that a capability may implement, and the objects that they receive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from lightning_bigopt.batching.global_window import MicroBatch
from lightning_bigopt.engine.amounts import NeedsSamples
from lightning_bigopt.engine.budget import Simulate
from lightning_bigopt.engine.buffer_snapshot import BufferSnapshot
from lightning_bigopt.engine.clock import Clock
from lightning_bigopt.engine.clock_settings import ClockSettings
from lightning_bigopt.engine.optimizer_info import OptimizerInfo, OptimizerInfos
from lightning_bigopt.engine.optimizer_modes import OptimizerModes
from lightning_bigopt.engine.saved_state import SavedState
from lightning_bigopt.engine.update import Rejection, Restorable, Update
from lightning_bigopt.optimizers.group_schedule import GroupSchedule
from lightning_bigopt.parameters import parameter_names

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_bigopt.trainer_access.requeue_signal import RequeueSignal

__all__ = ["BATCH_SIZE", "LEARNING_RATE", "Batch", "Fit", "Stages"]

# The values of ``owns`` of BatchSizeScheduler and LearningRateScheduler.
BATCH_SIZE, LEARNING_RATE = "batch size", "learning rate"


StagesT = TypeVar("StagesT", bound="Stages")


@dataclass(kw_only=True, eq=False)
class Fit:
    """The current fit, with the objects that stages use.

    Args:
        trainer: The Trainer.
        module: The module that is trained.
        clock: The counts of consumed data, and the horizon.
        groups: Writes the fields of the parameter groups.
        known_optimizers: The optimizers of the Trainer, as last seen.
        shard_group: Process group over which plain parameters are flat shards (FSDP1); set from
            ``start`` on.
        restored_bases: Base values of the checkpoint by field, for each optimizer and group; empty
            without a checkpoint. Those of the learning rate are in Lightning's schedulers.
        scheduler_names: Names that the module gave to the schedulers that are replaced, by id of
            the optimizer; LearningRateMonitor shows them.
        capabilities: The capabilities of the fit, ordered by rank.
        controls_steps: Whether a capability has a stage of an update.
        has_started: Whether the capabilities have started: all state is restored.
        start_clock: Starts the clock if it has not started, and returns it.
        rewrite_groups: Writes the parameter groups again, after an adjustment has changed.
        finish_batch: Ends a batch that Lightning has counted, before state is saved.
        take_snapshot: Takes a snapshot of everything that training changes; with ``portable=True``
            on the CPU, with a ``state_dict``. With ``state=`` makes one from such a state.

    Attributes:
        optimizers: The parameters of each optimizer.
        modes: Switches optimizers that have a training and an evaluation mode.
        buffers: The buffers of the module at the start of the current accumulation window.
        requeue: The signal with which SLURM announces the end of a job; None outside SLURM.
        rescaling: Returns the factor of ``rescale`` on the gradient of the current window, from its
            last micro-batch on; the first call may be a collective.
    """

    trainer: Trainer
    module: LightningModule
    clock: Clock
    groups: GroupSchedule
    known_optimizers: list[Optimizer]
    controls_steps: bool = False
    has_started: bool = False
    capabilities: list[Stages] = field(default_factory=list)
    shard_group: ProcessGroup | None = None
    restored_bases: dict[str, list[list[float]]] = field(default_factory=dict)
    scheduler_names: dict[int, str] = field(default_factory=dict)
    start_clock: Callable[[], Clock]
    rewrite_groups: Callable[[], None]
    finish_batch: Callable[[], None]
    take_snapshot: Callable[..., Restorable]
    optimizers: OptimizerInfos = field(init=False)
    modes: OptimizerModes = field(init=False)
    buffers: BufferSnapshot = field(init=False, default_factory=BufferSnapshot)
    requeue: RequeueSignal | None = None
    rescaling: Callable[[], float | Tensor] = lambda: 1.0
    _names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self.optimizers = OptimizerInfos(self.trainer, self.module)
        self.modes = OptimizerModes(self.trainer, self.module)

    def optimizer_info(self, optimizer: Optimizer) -> OptimizerInfo:
        """Returns the label of an optimizer, and its parameters with their names."""
        return self.optimizers.find(optimizer)

    def parameter_names(self) -> tuple[str, ...]:
        """Returns the names of all parameters of the module; they are collected once per fit."""
        if self._names is None:
            self._names = parameter_names(self.module)
        return self._names

    def owners(self) -> frozenset[str]:
        """Returns the ``owns`` of all capabilities."""
        return frozenset(capability.owns for capability in self.capabilities)

    def required(self, kind: type[StagesT]) -> StagesT:
        """Returns the capability of a class that another capability lists in ``requires``."""
        return next(c for c in self.capabilities if isinstance(c, kind))

    def metrics(self, of: Sequence[Stages] | None = None) -> dict[str, float | Tensor]:
        """Returns the metrics of some capabilities, or all, after an update, by tag."""
        of = self.capabilities if of is None else of
        return {tag: value for c in of for tag, value in c.metrics(self).items()}

    def without_monitor(self) -> list[Stages]:
        """Returns the capabilities whose metrics are logged, though none logs those of all."""
        has_monitor = any(capability.logs_all_metrics for capability in self.capabilities)
        return [] if has_monitor else [c for c in self.capabilities if c.logs_without_monitor]

    def specifications(self) -> dict[str, str]:
        """Returns the specification of each capability, by its ``owns``."""
        return {c.owns: text for c in self.capabilities if (text := c.specification())}


@dataclass(kw_only=True, eq=False)
class Batch:
    """One loader batch of this process: a micro-batch of an update.

    Args:
        fit: The fit.
        data: The batch, on the device.
        index: Index of the batch in the epoch.
        opens_window: Whether the batch is the first of its accumulation window.
        samples: Samples of this process in the batch; None if they are not counted.
        micro_batch: The micro-batch of a GlobalBatchLoader; None for other loaders.

    Attributes:
        loss_factor: Factor on the loss of the batch.
        closes_window: Whether the batch is the last of its window; set before ``end_batch``.
    """

    fit: Fit
    data: Any
    index: int
    opens_window: bool
    samples: int | None
    micro_batch: MicroBatch | None
    loss_factor: float | Tensor = 1.0
    closes_window: bool = False

    @property
    def counted_samples(self) -> int:
        """:attr:`samples`, for capabilities with ``needs_samples="required"``."""
        assert self.samples is not None  # else the engine has raised
        return self.samples


class Stages(SavedState):
    """The stages of a fit. A capability overrides those that it needs; the engine skips the others.

    The engine calls a stage of all capabilities in ascending order of :attr:`rank`, independent of
    the order of the Trainer's callbacks. An optimizer that evaluates its closure again in the same
    step repeats ``observe_loss`` to ``clip``. A step runs::

        begin_batch → weigh_loss → observe_loss → rescale → needs_norms → decide → clip → observe
        → [the optimizer's step] → after_step → end_batch → end_window

    Attributes:
        owns: Name of the thing that the capability controls; only one capability of a fit may
            control it.
        rank: Position among the capabilities; lower ranks run first.
        requires: Classes of other capabilities that the Trainer must have.
        settings: Settings of the clock that the capability gives.
        needs_horizon: Whether the length of the run must be known.
        needs_samples: ``"required"`` if the fit must not train without counting the samples of
            every batch, ``"optional"`` to count them where it is possible, or None.
        needs_step_hook: Whether a capability with stages of an update does not allow updates for
            which Lightning does not call its hook before an optimizer's step.
        norm_order: Order of the norms to measure; None if the capability does not choose it.
        logs_all_metrics: Whether the capability logs the metrics of all capabilities.
        logs_without_monitor: Whether the metrics are logged if no capability logs all metrics.
        may_reject: Whether :meth:`decide` may reject updates.
        fit: The current fit; None between fits.
        run: Identifies the last run; a capability is reset for another run.
    """

    owns: str
    rank: ClassVar[int]
    requires: tuple[type[Stages], ...] = ()
    settings: ClockSettings = ClockSettings()
    needs_horizon: bool = False
    needs_samples: NeedsSamples = "optional"
    needs_step_hook: ClassVar[bool] = True
    norm_order: float | None = None
    logs_all_metrics: ClassVar[bool] = False
    logs_without_monitor: ClassVar[bool] = False
    may_reject: ClassVar[bool] = True
    fit: Fit | None = None
    run: object | None = None

    # ---------------------------------------------------------------------------- start and end

    def check_fit(self, fit: Fit) -> None:
        """Checks for conflicts. Horizon and restored state are not available."""

    def check_optimizers(self, fit: Fit) -> None:
        """Checks for conflicts with the optimizers and claims fields.

        Called after :meth:`check_fit`, and again if the optimizers are replaced during the fit.
        """

    def loader_ready(self, fit: Fit, loader: Any) -> None:
        """Receives each training loader before it is first iterated."""

    def simulator(self, fit: Fit) -> Simulate | None:
        """Returns a simulation of the run; None if the batch sizes depend on measurements."""
        return None

    def start(self, fit: Fit) -> None:
        """Prepares for the first update. All state is restored and the horizon is determined."""

    def announce(self, fit: Fit) -> None:
        """Logs the plan, after all capabilities have started."""

    def begin_epoch(self, fit: Fit) -> None:
        """Prepares for an epoch, or for its rest after a rewind; the loaders may be new."""

    def end_epoch(self, fit: Fit) -> None:
        """Ends an epoch and its last window."""

    def end(self, fit: Fit) -> None:
        """Undoes all changes, also after an error; ``self.fit`` is None if the fit goes on."""

    def reset(self) -> None:
        """Clears the state of another run."""

    # ----------------------------------------------------------------------------------- a step

    def begin_batch(self, batch: Batch) -> None:
        """Prepares for a batch."""

    def weigh_loss(self, batch: Batch) -> float | Tensor:
        """Returns the factor on the loss of the batch."""
        return 1.0

    def observe_loss(self, batch: Batch, loss: Tensor) -> None:
        """Receives the loss that ``training_step`` returned, of shape ``()``, before backward."""

    def rescale(self, update: Update) -> None:
        """Rescales the gradients to the mean over the actual contents of the window."""

    def needs_norms(self, update: Update) -> bool:
        """Returns whether the capability will read ``update.norms``; equal on all processes."""
        return False

    def decide(self, update: Update) -> Rejection | None:
        """Rejects the update, or returns None to accept it; equal on all processes."""
        return None

    def observe_rejection(self, update: Update, reason: str) -> None:
        """Receives the reason if an update is rejected, or accepted with a smaller gradient."""

    def clip(self, update: Update) -> None:
        """Clips the gradients of an accepted update."""

    def observe(self, update: Update) -> None:
        """Reads gradients and settings of the first evaluation; also called if it is rejected."""

    def after_step(self, update: Update) -> None:
        """Reads the changed weights after the optimizer's step; not called after a rejection.

        The kernel of a fused optimizer may still skip the update. ``update.found_inf`` indicates
        this on the device; reading ``update.is_made`` synchronizes.
        """

    def end_batch(self, batch: Batch) -> None:
        """Ends a batch. Must not use collectives: saving on one process may call it."""

    def end_window(self, batch: Batch) -> None:
        """Ends a window, after :meth:`end_batch` of all capabilities and after a rollback.

        A snapshot that is taken here holds the whole update. Must not use collectives.
        """

    def metrics(self, fit: Fit) -> Mapping[str, float | Tensor]:
        """Returns values of a logged update by tag (:data:`monitoring.tags.TAGS`).

        Does not synchronize.
        """
        return {}

    def specification(self) -> str:
        """Returns the user's configuration of the capability as code; empty for none."""
        return ""

    # ------------------------------------------------------------------- evaluation and weights

    def begin_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        """Prepares for validation, test or prediction; also called without a fit."""

    def end_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        """Undoes :meth:`begin_evaluation`, after an error too if that is implemented."""

    def saved_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Returns the weights that a checkpoint stores as the module's, while fitting.

        It must not add keys to a checkpoint in one file, whose tensors belong in
        :meth:`saved_state`. For a sharded checkpoint
        :func:`~lightning_bigopt.trainer_access.saved_weights.with_second_weights` adds them.
        """
        return state_dict
