"""The global batch of every update: windows of any length, each gradient a true mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_bigopt import trainer_access
from lightning_bigopt.batching import (
    BatchPlan,
    BatchSizePolicy,
    ConstantBatchSize,
    FullBatch,
    MicroBatch,
    SingleSample,
    WindowLength,
)
from lightning_bigopt.batching.policies import check_size
from lightning_bigopt.clock import ClockSettings
from lightning_bigopt.controllers.alone import log_alone
from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.controllers.batch_conflicts import refuse_conflicts
from lightning_bigopt.controllers.batch_coupling import BatchCoupling
from lightning_bigopt.controllers.batch_report import plan_in_words, stages
from lightning_bigopt.controllers.batch_supply import (
    Supply,
    constant_plan,
    hand_over,
    look_at,
    simulator,
)
from lightning_bigopt.controllers.batch_weights import LossWeights
from lightning_bigopt.controllers.noise_scale import NoiseScaleController
from lightning_bigopt.counting import BatchWeight
from lightning_bigopt.durations import Progress
from lightning_bigopt.gradients import scale_

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_bigopt.clock import Simulate
    from lightning_bigopt.pipeline import OptimizerStep, Pipeline

__all__ = ["BatchSizeController", "constant_plan"]

_NEVER_CHANGING = (ConstantBatchSize, FullBatch, SingleSample)


class BatchSizeController(Controller):
    """Opens a window of the planned length at any batch, and makes its gradient a true mean."""

    role = "batch size"
    rank = 10

    def __init__(
        self,
        policy: BatchSizePolicy,
        *,
        coupling: BatchCoupling | None = None,
        weight: BatchWeight = None,
        micro_batch_size: int | None = None,
        max_micro_batch_size: int | None = None,
        settings: ClockSettings | None = None,
    ) -> None:
        if not isinstance(policy, BatchSizePolicy):
            raise ValueError(
                f"policy must be a BatchSizePolicy, got {policy!r}; try ConstantBatchSize(256)"
            )
        self.policy = policy
        self.coupling = coupling or BatchCoupling()
        if self.coupling.is_active and isinstance(policy, _NEVER_CHANGING):
            raise ValueError(
                "policy must change the batch where something is to follow it, got "
                f"{policy!r}, which never does; leave lr_scaling and the like out"
            )
        self.weights = LossWeights(weight)
        for name, value in (
            ("micro_batch_size", micro_batch_size),
            ("max_micro_batch_size", max_micro_batch_size),
        ):
            if value is not None:
                check_size(name, value)
        self.micro_batch_size = micro_batch_size
        self.max_micro_batch_size = max_micro_batch_size
        self.settings = settings or ClockSettings()
        self.size: int | None = None
        self.plan: BatchPlan | None = None
        self._supply: Supply | None = None
        self._noise: NoiseScaleController | None = None
        self._window: WindowLength | None = None
        self._served: MicroBatch | None = None
        self._first_index: int | None = None
        self._decided: tuple[Progress, tuple[int, BatchPlan]] | None = None
        self._restored: tuple[int, int] | None = None

    @property
    def needs_horizon(self) -> bool:  # type: ignore[override]
        """Shares of the budget need to know where it ends; other thresholds do not."""
        units = self.policy.units
        if self.policy.adaptive or isinstance(self.policy, _NEVER_CHANGING):
            return False
        return not units or "fraction" in units

    # ---------------------------------------------------------------------------- start, end

    def on_fit_start(self, pipeline: Pipeline) -> None:
        """Refuses conflicts, and waits for the loaders."""
        refuse_conflicts(pipeline, self.policy)
        self._noise = pipeline.find(NoiseScaleController)
        if self.policy.adaptive and self._noise is None:
            raise ValueError(
                f"callbacks must hold GradientNoiseScale with {type(self.policy).__name__}, got "
                "none to measure; add GradientNoiseScale()"
            )
        self.coupling.on_fit_start(pipeline)
        policy, most = self.policy, self.max_micro_batch_size
        trainer_access.greet_loaders(
            pipeline.trainer, lambda loaders: hand_over(pipeline, policy, loaders, most=most)
        )

    def simulator(self, trainer: Trainer) -> Simulate | None:
        """Lays the run out in advance; None for a policy that measures as it goes."""
        if self.policy.adaptive:
            return None
        most = self.max_micro_batch_size
        return simulator(trainer, self.policy, self.micro_batch_size, most=most)

    def on_train_start(self, pipeline: Pipeline) -> None:
        """Works the first plan out, says it, and refuses a batch that no window can hold."""
        trainer = pipeline.trainer
        supply = self._supply = self._look(trainer)
        self._decided = self._first_index = None
        size, plan = self._plan_at(pipeline.progress)
        self.coupling.on_train_start(size)
        self.weights.start(full=supply.micro_batch_size, varies=supply.varies)
        self.weights.patch(pipeline.module)
        self._announce(pipeline, supply.describe(size, plan))
        ready, open_window = trainer_access.ready_batches(trainer), self._restored
        self._window = self._restored = None
        trainer.accumulate_grad_batches = WindowLength(1, 0)
        if open_window is not None and open_window[1] < ready < sum(open_window):
            # The loop decides from this length whether the checkpoint was inside a window.
            trainer.accumulate_grad_batches = WindowLength(*open_window)
            rank_zero_info(
                f"The checkpoint was written inside a window ({ready - open_window[1]} of "
                f"{open_window[0]} micro-batches); their gradients were not saved, and "
                + (
                    "the loader serves the window again."
                    if supply.is_exact
                    else "a new window opens at the next batch."
                )
            )

    def _look(self, trainer: Trainer) -> Supply:
        most = self.max_micro_batch_size
        return look_at(trainer, self.policy, self.micro_batch_size, most=most)

    def _announce(self, pipeline: Pipeline, first: str) -> None:
        horizon = pipeline.clock.horizon
        changes = []
        if horizon is not None and not self.policy.adaptive:
            changes = list(stages(horizon, lambda progress: self._fresh_plan(progress)[0]))
        text = plan_in_words(
            first, changes, updates=None if horizon is None else horizon.total("steps")
        )
        if len(changes) > 1 or self.policy.adaptive:
            text += self.coupling.advice(pipeline.trainer.optimizers)
        rank_zero_info(text)

    def on_fit_end(self, pipeline: Pipeline) -> None:
        """Gives the Trainer its own accumulation back, and the module its backward."""
        trainer_access.greet_loaders(pipeline.trainer, None)
        self._noise = None
        if isinstance(pipeline.trainer.accumulate_grad_batches, WindowLength):
            pipeline.trainer.accumulate_grad_batches = 1
        if self._supply is not None:
            pipeline.module.__dict__.pop("backward", None)
            self._supply = None

    # -------------------------------------------------------------------------------- windows

    def served(self, trainer: Trainer, index: int) -> tuple[int, int] | None:
        """Samples of the coming batch here and on all processes, where the loader knows."""
        exact = trainer_access.exact_loader(trainer)
        if exact is None:
            self._served = None
            return None
        if self._first_index is None:  # after a resume the loop goes on counting, the loader not
            self._first_index = index
        self._served = exact.micro_batch(index - self._first_index)
        return self._served.samples, self._served.global_samples

    def on_epoch_start(self, pipeline: Pipeline) -> None:
        """No window crosses an epoch, and its loaders may have been made anew."""
        self._window = self._first_index = None
        if self._supply is not None:
            supply = self._supply = self._supply.renewed(self._look(pipeline.trainer))
            self.weights.start(full=supply.micro_batch_size, varies=supply.varies)

    def on_batch_start(self, pipeline: Pipeline, batch: Any, index: int) -> None:
        """Opens a window, its tail known in advance, or shortens one that the data ended."""
        trainer, window = pipeline.trainer, self._window
        if window is None or index >= window.start + window:
            window = self._open(pipeline, index)
        elif (
            self._served is None
            and trainer_access.is_last_batch(trainer)
            and index + 1 < window.start + window
        ):  # a loader without length ended early
            length = index + 1 - window.start
            gradients = [p.grad for p in pipeline.module.parameters()]
            scale_(gradients, torch.tensor(window / length, device=trainer.strategy.root_device))
            window = WindowLength(length, window.start)
        self.weights.weigh(pipeline, batch, self._served)
        self._window = trainer.accumulate_grad_batches = window

    def _open(self, pipeline: Pipeline, index: int) -> WindowLength:
        trainer = pipeline.trainer
        self.size, self.plan = self._plan_at(pipeline.progress)
        self.coupling.open_window(pipeline, self.size)
        self.weights.open_window()
        if self._served is not None:
            return WindowLength(self._served.window.accumulate, index - self._served.index)
        length, batches = self.plan.accumulate, trainer_access.epoch_batches(trainer)
        if trainer_access.is_last_batch(trainer):
            length = 1
        elif batches is not None:
            length = min(length, batches - index)
        return WindowLength(length, index)

    def learning_rate_factor(self, progress: Progress) -> float:
        """The rule's factor for the batch of the update that starts at ``progress``."""
        if self.coupling.lr_scaling is None or self._supply is None:
            return 1.0
        return self.coupling.learning_rate_factor(self._plan_at(progress)[0], progress)

    def rescale(self, step: OptimizerStep) -> None:
        """From the mean over micro-batches to the mean over samples, or what is weighed."""
        assert self._window is not None  # a batch has begun
        self.weights.rescale(step, length=int(self._window), is_exact=self._served is not None)

    def on_batch_end(self, pipeline: Pipeline, outputs: Any, batch: Any) -> None:
        """An exact loader hears of every update that was trained."""
        served, exact = self._served, trainer_access.exact_loader(pipeline.trainer)
        if served is not None and exact is not None and not pipeline.window.is_open:
            exact.advance(served.window.samples)
        if not pipeline.window.is_open:
            log_alone(self, pipeline)

    def on_epoch_end(self, pipeline: Pipeline) -> None:
        """An exact loader goes to its next epoch, but only from the end of one."""
        exact = trainer_access.exact_loader(pipeline.trainer)
        if exact is not None and exact.position >= exact.samples:
            exact.end_epoch()

    def metrics(self, pipeline: Pipeline) -> Mapping[str, float | Tensor]:
        """The planned batch, and what follows it."""
        if self.size is None or self._window is None:
            return {}
        values = {"batch/planned_size": float(self.size)}
        if self.coupling.lr_scaling is not None:
            factor = self.coupling.learning_rate_factor(self.size, pipeline.progress)
            values["batch/lr_factor"] = factor
        return values

    # ---------------------------------------------------------------------------------- state

    def reset(self) -> None:
        """Forgets a former Trainer's run."""
        self._window = self._restored = self.size = self.plan = None
        self.coupling.reset()
        self.weights.reset()

    def state_dict(self) -> dict[str, Any]:
        """The window under way, the batch in force, and what follows it."""
        window = self._window
        return {
            "window": None if window is None else [int(window), window.start],
            "size": self.size,
            "coupling": self.coupling.state_dict(),
            "weights": self.weights.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the checkpoint's window until training starts."""
        window = state["window"]
        self._restored = None if window is None else (int(window[0]), int(window[1]))
        self.size = state["size"]
        self.coupling.load_state_dict(state["coupling"])
        self.weights.load_state_dict(state["weights"])

    # ----------------------------------------------------------------------------------- plan

    def _plan_at(self, progress: Progress) -> tuple[int, BatchPlan]:
        """The plan of the update that starts at ``progress``, decided once."""
        if self._decided is None or self._decided[0] != progress:
            self._decided = progress, self._fresh_plan(progress)
        return self._decided[1]

    def _fresh_plan(self, progress: Progress) -> tuple[int, BatchPlan]:
        assert self._supply is not None  # training has started
        scale = None if self._noise is None else self._noise.noise_scale
        return self._supply.plan(self.policy, progress, before=self.size, noise_scale=scale)
