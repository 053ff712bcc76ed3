"""BatchSizeScheduler: sets the global batch size of every update by a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.batching.exact_loader import GlobalBatchLoader
from lightning_bigopt.batching.policies.batch_size_policy import BatchSizePolicy
from lightning_bigopt.batching.scaling_rules import ScalingRule
from lightning_bigopt.batching.window_length import WindowLength
from lightning_bigopt.callbacks.batch_size.batch_planner import BatchPlanner
from lightning_bigopt.callbacks.batch_size.conflicts import (
    check_conflicts,
    check_micro_batch_sizes,
    check_policy,
    check_scaling,
    has_fractions,
)
from lightning_bigopt.callbacks.batch_size.coupling import BatchCoupling
from lightning_bigopt.callbacks.batch_size.exact_loader import prepare_exact_loader
from lightning_bigopt.callbacks.batch_size.loss_weights import LossWeights, rescale_, shorten_window
from lightning_bigopt.callbacks.noise_scale import GradientNoiseScale
from lightning_bigopt.callbacks.resume_report import report_changed_settings
from lightning_bigopt.checks import as_code
from lightning_bigopt.durations.duration import DurationLike
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine.batch_contents import BatchCount, BatchWeight
from lightning_bigopt.engine.batch_source import simulator
from lightning_bigopt.engine.budget import Simulate
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.clock_settings import ClockSettings
from lightning_bigopt.engine.stage import BATCH_SIZE, Batch, Fit
from lightning_bigopt.engine.update import Update
from lightning_bigopt.trainer_access import loop

__all__ = ["BatchSizeScheduler"]


@explain_arguments
class BatchSizeScheduler(Capability):
    """Sets the global batch size of every update by a policy, through gradient accumulation.

    The global batch size is micro-batch size × accumulation × processes; the accumulation follows
    from the number of processes and may change at any update. The gradient of an update is the mean
    over the samples of its accumulation window, also for a partial window at the end of an epoch.
    ``trainer.accumulate_grad_batches`` is the length of the current window. The plan of the run is
    logged once.

    With a DataLoader the global batch size must be a multiple of micro-batch size × processes. With
    a :class:`GlobalBatchLoader` it can be any number of samples, the order of the samples does not
    depend on the number of processes, and a checkpoint at any batch resumes exactly.

    Args:
        policy: The policy of the global batch size.
        lr_scaling: Scales the learning rate with κ, the global batch size over the first one of the
            run: ``"sqrt"`` for Adam and its variants, ``"linear"`` for SGD, None for no scaling. It
            works with and without a LearningRateScheduler.
        beta2_scaling: ``"half-life"`` keeps the half-life of Adam's second moment constant in
            samples: β₂ is raised to the power κ.
        weight_decay_scaling: ``"sqrt"`` multiplies the weight decay by √κ.
        rewarmup: Length of the linear transition of the learning rate to a new factor; None to
            jump.
        max_kappa: Upper bound of κ, because a batch beyond the noise scale allows no larger
            learning rate; None for no bound.
        weight: Weight of a micro-batch in its update: a function of the batch or its dotted name,
            or the name of an ids or mask field, which makes the gradient the mean over tokens; None
            for the number of samples. The training step must return the mean over the same units,
            and a finite loss for a batch of weight 0. A window of weight 0 has a gradient of zero.
        micro_batch_size: Samples in a batch of one process, for a loader without ``batch_size``;
            None for the size of the loader.
        max_micro_batch_size: Upper bound of the samples in one forward pass of a process. It limits
            the micro-batch of a :class:`GlobalBatchLoader`; a larger batch of any other loader
            raises. None for no bound.
        budget: An explicit budget such as ``"2e6 samples"`` that ends the training; None for the
            limits of the Trainer.
        samples: Counts the samples of a batch (a function, or the name of a field); None for the
            batch size of the loader.
        tokens: Counts the tokens of a batch: a function, or the name of an ids or mask field.

    Raises:
        ValueError: At fit start with ``accumulate_grad_batches`` other than 1,
            GradientAccumulationScheduler, StochasticWeightAveraging, DeepSpeed, manual
            optimization or ``dataloader_iter``; at train start for a global batch size that is no
            multiple of micro-batch size × processes.

    Logs:
        ``batch/planned_size`` and, with ``lr_scaling``, ``batch/lr_factor``.

    State:
        ``window``: length and first batch of the current window (the gradients of an open window
        are not saved; a resume logs that); ``size``: the current global batch size; ``coupling``:
        the first one of the run; ``weights``: the reference weight; ``settings``: policy,
        scaling and weight as code. A resumed run logs their changes.

    Example:
        >>> from lightning_bigopt import BatchSizeScheduler, BatchSizeSteps
        >>> BatchSizeScheduler(BatchSizeSteps({"0%": 32, "50%": 64}), lr_scaling="sqrt")
        BatchSizeScheduler(BatchSizeSteps(...))
    """

    owns = BATCH_SIZE
    rank = 10
    needs_samples = "required"
    logs_without_monitor = True

    def __init__(
        self,
        policy: BatchSizePolicy,
        *,
        lr_scaling: ScalingRule | None = None,
        beta2_scaling: Literal["half-life"] | None = None,
        weight_decay_scaling: Literal["sqrt"] | None = None,
        rewarmup: DurationLike | None = None,
        max_kappa: float | None = None,
        weight: BatchWeight = None,
        micro_batch_size: int | None = None,
        max_micro_batch_size: int | None = None,
        budget: str | None = None,
        samples: BatchCount = None,
        tokens: BatchCount = None,
    ) -> None:
        check_policy(policy)
        self.policy = policy
        self.coupling = BatchCoupling(
            lr_scaling=lr_scaling,
            beta2_scaling=beta2_scaling,
            weight_decay_scaling=weight_decay_scaling,
            rewarmup=rewarmup,
            max_kappa=max_kappa,
        )
        check_scaling(policy, self.coupling)
        check_micro_batch_sizes(micro_batch_size, max_micro_batch_size)
        self.micro_batch_size, self.max_micro_batch_size = micro_batch_size, max_micro_batch_size
        self.settings = ClockSettings(budget=budget, samples=samples, tokens=tokens)
        reads_noise = policy.adaptive and policy.needs_noise_scale
        self.requires = (GradientNoiseScale,) if reads_noise else ()
        self.needs_horizon = has_fractions(policy)
        self.weight, self._weights = weight, LossWeights(weight)
        self._planner: BatchPlanner | None = None
        self._restored: tuple[int, int] | None = None
        self._saved_settings: dict[str, str] | None = None
        self.size: int | None = None
        self._window: WindowLength | None = None

    # ---------------------------------------------------------------------------- start, end

    def check_fit(self, fit: Fit) -> None:
        """Raises for conflicting settings, and claims the fields that are scaled."""
        check_conflicts(fit, self.policy)

    def check_optimizers(self, fit: Fit) -> None:
        """Claims the fields that are scaled with the batch size."""
        self.coupling.check_optimizers(fit)

    def loader_ready(self, fit: Fit, loader: Any) -> None:
        """Sets rank and batch sizes of a GlobalBatchLoader before its first iteration."""
        if isinstance(loader, GlobalBatchLoader):
            limit = self.max_micro_batch_size
            prepare_exact_loader(fit, self.policy, loader, max_micro_batch_size=limit)

    def simulator(self, fit: Fit) -> Simulate | None:
        """Returns a simulation of the run's batch sizes; None for an adaptive policy."""
        if self.policy.adaptive:
            return None
        return simulator(
            fit.trainer,
            self.policy,
            micro_batch_size=self.micro_batch_size,
            max_micro_batch_size=self.max_micro_batch_size,
        )

    def start(self, fit: Fit) -> None:
        """Plans the first update, and raises for a batch size that cannot be trained."""
        trainer = fit.trainer
        planner = self._planner = BatchPlanner(
            fit,
            self.policy,
            micro_batch_size=self.micro_batch_size,
            max_micro_batch_size=self.max_micro_batch_size,
            size=self.size,
            noise_scale=lambda: fit.required(GradientNoiseScale).noise_scale,
        )
        planner.plan_at(fit.clock.progress())
        self._weights.start(planner.source)
        fit.rescaling = self._coefficient
        changes = planner.changes()
        self.coupling.start(fit, size_at=self.size_at, changes=changes, owner=self)
        ready, self._window = loop.ready_batches(trainer), None
        trainer.accumulate_grad_batches = WindowLength(1, 0)
        if self._restored is not None and self._restored[1] < ready < sum(self._restored):
            # The loop uses this length to decide whether the checkpoint was inside a window.
            trainer.accumulate_grad_batches = WindowLength(*self._restored)
        else:
            self._restored = None

    def announce(self, fit: Fit) -> None:
        """Logs the plan, changes since the checkpoint, and a resume within a window."""
        saved, self._saved_settings = self._saved_settings, None
        report_changed_settings(saved, self.settings_as_code())
        assert self._planner is not None  # set in start
        changes = self._planner.changes()
        text = self._planner.describe(changes)
        if len(changes) > 1 or self.policy.adaptive:
            text += self.coupling.advice(fit.groups.optimizers)
        rank_zero_info(text)
        window, self._restored = self._restored, None
        if window is not None:
            ready = loop.ready_batches(fit.trainer)
            rank_zero_info(self._planner.describe_interrupted_window(window, ready))

    def end(self, fit: Fit) -> None:
        """Restores the Trainer's accumulation."""
        fit.rescaling = lambda: 1.0
        if isinstance(fit.trainer.accumulate_grad_batches, WindowLength):
            fit.trainer.accumulate_grad_batches = 1
        if self._planner is not None:
            self._planner.end()
        self._planner = None

    def size_at(self, progress: Progress) -> int:
        """Returns the global batch size of the update that starts at ``progress``."""
        assert self._planner is not None  # set in start
        return self._planner.plan_at(progress)[0]

    # -------------------------------------------------------------------------------- windows

    def begin_epoch(self, fit: Fit) -> None:
        """Reads the loaders again; windows end with the epoch."""
        self._window = None
        if self._planner is not None:
            self._planner.begin_epoch()
            self._weights.start(self._planner.source)

    def begin_batch(self, batch: Batch) -> None:
        """Opens a window, or shortens one that the end of the data cuts."""
        assert self._planner is not None  # set in start
        self._planner.begin_batch(batch)
        window = self._window
        if window is None or batch.index >= window.start + window:
            window = self._open(batch, self._planner)
        else:
            window = shorten_window(batch, window)
        self._window = batch.fit.trainer.accumulate_grad_batches = window

    def _open(self, batch: Batch, planner: BatchPlanner) -> WindowLength:
        progress = batch.fit.clock.update_progress
        window = planner.open_window(batch, progress)
        self.size = planner.size
        self.coupling.open_window(window.global_batch_size, progress)
        self._weights.open_window()
        return window.length

    def weigh_loss(self, batch: Batch) -> float | Tensor:
        """Returns the factor on the loss of the batch."""
        return self._weights.weigh(batch)

    def rescale(self, update: Update) -> None:
        """Rescales the gradients in place to the mean over samples or weights."""
        rescale_(update, self._coefficient())

    def _coefficient(self) -> float | Tensor:
        assert self._window is not None  # set in begin_batch
        assert self.fit is not None
        return self._weights.coefficient(self.fit.trainer, length=int(self._window))

    def metrics(self, fit: Fit) -> Mapping[str, float | Tensor]:
        """Returns the planned batch size, and the factor on the learning rate."""
        if self.size is None or self._window is None:
            return {}
        values = {"batch/planned_size": float(self.size)}
        if self.coupling.lr_scaling is not None:
            values["batch/lr_factor"] = self.coupling.factor(self.size, fit.clock.window_progress)
        return values

    def specification(self) -> str:
        """Returns the policy as code."""
        return repr(self.policy)

    def settings_as_code(self) -> dict[str, str]:
        """Returns policy, weight and scaling."""
        code = {self.owns: as_code(self.policy), "weight": as_code(self.weight)}
        return code | self.coupling.settings()

    def reset(self) -> None:
        """Clears batch size, window, scaling and weights."""
        self.size = self._window = self._restored = self._saved_settings = None
        self.coupling.reset()
        self._weights.reset()

    def saved_state(self) -> dict[str, Any]:
        """Returns window, batch size, first batch size of the run, and reference weight."""
        window = self._window
        return {
            "window": None if window is None else [int(window), window.start],
            "size": self.size,
            "coupling": self.coupling.state_dict(),
            "weights": self._weights.state_dict(),
            "settings": self.settings_as_code(),
        }

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the state from a checkpoint; :meth:`start` compares the window with the loop."""
        window = state["window"]
        self._restored = None if window is None else (int(window[0]), int(window[1]))
        self.size = state["size"]
        if self._planner is not None:  # a snapshot of this fit
            self._planner.size = self.size
        self.coupling.load_state_dict(state["coupling"], self.fit)
        self._weights.load_state_dict(state["weights"])
        self._saved_settings = state.get("settings")

    def __repr__(self) -> str:
        return f"BatchSizeScheduler({type(self.policy).__name__}(...))"
