"""The global batch of every update, carried out by accumulation on the user's own loader."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_bigopt import trainer_access
from lightning_bigopt.batching import (
    BatchContext,
    BatchPlan,
    BatchSizePolicy,
    ConstantBatchSize,
    WindowLength,
    check_written_sizes,
    plan_at,
    simulate,
)
from lightning_bigopt.clock import ClockSettings
from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.durations import Clock, Horizon

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_bigopt.clock import Simulate
    from lightning_bigopt.pipeline import OptimizerStep, Pipeline

__all__ = ["BatchSizeController", "constant_plan"]


class BatchSizeController(Controller):
    """Opens a window of the planned length at any batch, and makes its gradient a true mean."""

    role = "batch size"
    rank = 10

    def __init__(self, policy: BatchSizePolicy, *, settings: ClockSettings | None = None) -> None:
        if not isinstance(policy, BatchSizePolicy):
            raise ValueError(
                f"policy must be a BatchSizePolicy, got {policy!r}; try ConstantBatchSize(256)"
            )
        self.policy = policy
        self.settings = settings or ClockSettings()
        self.plan: BatchPlan | None = None
        self._window: WindowLength | None = None
        self._restored: tuple[int, int] | None = None
        self._micro = 0
        self._samples = 0

    # ------------------------------------------------------------------------------- hooks

    def on_fit_start(self, pipeline: Pipeline) -> None:
        """Refuses what cannot be exact together with a planned window."""
        trainer, module = pipeline.trainer, pipeline.module
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "accumulate_grad_batches must be 1 with BatchSizeScheduler, got "
                f"{trainer.accumulate_grad_batches}; name the global batch in the policy instead"
            )
        for kind in (GradientAccumulationScheduler, StochasticWeightAveraging):
            if any(isinstance(callback, kind) for callback in trainer_access.callbacks_of(trainer)):
                raise ValueError(
                    f"callbacks must not hold {kind.__name__} with BatchSizeScheduler, got both; "
                    f"remove {kind.__name__}"
                )
        if not module.automatic_optimization:
            raise ValueError(
                "automatic_optimization must be True with BatchSizeScheduler, got False; let "
                "Lightning optimise, or accumulate in your own training_step"
            )
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                "training_step must take a batch with BatchSizeScheduler, got one that takes "
                "dataloader_iter; take batch and batch_idx"
            )
        if trainer_access.is_deepspeed(trainer):
            raise ValueError(
                "strategy must not be DeepSpeed with BatchSizeScheduler, got "
                f"{type(trainer.strategy).__name__}: DeepSpeed accumulates by itself; set "
                "gradient_accumulation_steps in its config"
            )

    def simulator(self, trainer: Trainer) -> Simulate | None:
        """Lays the run out in advance; None for a policy that measures as it goes."""
        return None if self.policy.adaptive else _simulator(trainer, self.policy)

    def on_train_start(self, pipeline: Pipeline) -> None:
        """Works the first plan out, says it, and refuses a batch that no window can hold."""
        trainer = pipeline.trainer
        micro = trainer_access.micro_batch_size(trainer)
        if micro is None:
            raise ValueError(
                "the training loader must have a batch_size with BatchSizeScheduler, got "
                f"{[type(loader).__name__ for loader in trainer_access.train_loaders(trainer)]}; "
                "use one DataLoader with batch_size="
            )
        self._micro = micro
        check_written_sizes(
            self.policy,
            micro_batch_size=micro,
            world_size=trainer_access.data_parallel_size(trainer),
        )
        self.plan = self._plan(pipeline)
        rank_zero_info(f"Global batch {self.plan}.")
        ready, open_window = trainer_access.ready_batches(trainer), self._restored
        self._window = self._restored = None
        trainer.accumulate_grad_batches = WindowLength(1, 0)
        if open_window is not None and open_window[1] < ready < sum(open_window):
            # The loop decides from this length whether the checkpoint was inside a window.
            trainer.accumulate_grad_batches = WindowLength(*open_window)
            rank_zero_info(
                f"The checkpoint was written inside a window ({ready - open_window[1]} of "
                f"{open_window[0]} micro-batches); their gradients were not saved, and a new "
                "window opens at the next batch."
            )
        self._patch_backward(pipeline)

    def _plan(self, pipeline: Pipeline) -> BatchPlan:
        before = None if self.plan is None else self.plan.global_batch_size
        return plan_at(
            self.policy,
            progress=pipeline.progress,
            micro_batch_size=self._micro,
            world_size=trainer_access.data_parallel_size(pipeline.trainer),
            context=BatchContext(
                samples_per_epoch=trainer_access.epoch_samples(pipeline.trainer),
                global_batch_size=before,
            ),
        )

    def on_epoch_start(self, pipeline: Pipeline) -> None:
        """No window crosses an epoch."""
        self._window = None

    def on_batch_start(self, pipeline: Pipeline, batch: Any, index: int) -> None:
        """Opens a window, its tail known in advance, or shortens one that the data ended."""
        trainer, window = pipeline.trainer, self._window
        last = trainer_access.is_last_batch(trainer)
        if window is None or index >= window.start + window:
            self.plan = self._plan(pipeline)
            batches = trainer_access.epoch_batches(trainer)
            length = self.plan.accumulate
            if last:
                length = 1
            elif batches is not None:
                length = min(length, batches - index)
            window = WindowLength(length, index)
            self._samples = 0
        elif last and index + 1 < window.start + window:  # a loader without length ended early
            length = index + 1 - window.start
            gradients = [p.grad for p in pipeline.module.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, window / length)
            window = WindowLength(length, window.start)
        self._samples += pipeline.batch_samples
        self._window = trainer.accumulate_grad_batches = window

    def rescale(self, step: OptimizerStep) -> None:
        """From the mean over micro-batches to the mean over samples."""
        assert self._window is not None  # a batch has begun
        trainer = step.pipeline.trainer
        world = trainer_access.data_parallel_size(trainer)
        samples = self._samples * world
        if world > 1 and trainer_access.is_last_batch(trainer):
            # Only a loader's last batch can be short, and not on every process alike.
            total = torch.tensor(float(self._samples), device=trainer.strategy.root_device)
            samples = int(trainer.strategy.reduce(total, reduce_op="sum"))
        expected = int(self._window) * self._micro * world
        if samples != expected:
            gradients = [p.grad for _, p in step.parameters if p.grad is not None]
            torch._foreach_mul_(gradients, expected / samples)

    def on_fit_end(self, pipeline: Pipeline) -> None:
        """Gives the Trainer its own accumulation back, and the module its backward."""
        if isinstance(pipeline.trainer.accumulate_grad_batches, WindowLength):
            pipeline.trainer.accumulate_grad_batches = 1
            pipeline.module.__dict__.pop("backward", None)

    def reset(self) -> None:
        """Forgets the window of a former Trainer."""
        self._window = self._restored = None

    def state_dict(self) -> dict[str, Any]:
        """The window under way."""
        window = self._window
        return {"window": None if window is None else [int(window), window.start]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the checkpoint's window until training starts."""
        window = state["window"]
        self._restored = None if window is None else (int(window[0]), int(window[1]))

    # ----------------------------------------------------------------------------- weighting

    def _patch_backward(self, pipeline: Pipeline) -> None:
        """Weighs a short micro-batch by its samples; the others are left alone to the bit."""
        module, full = pipeline.module, self._micro

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            weight = pipeline.batch_samples / full
            type(module).backward(module, loss if weight == 1 else loss * weight, *args, **kwargs)

        module.__dict__["backward"] = backward


def constant_plan(trainer: Trainer) -> Simulate:
    """The run under the Trainer's own accumulation."""
    micro = trainer_access.micro_batch_size(trainer) or 1
    world = trainer_access.data_parallel_size(trainer)
    size = micro * world * int(trainer.accumulate_grad_batches)
    return _simulator(trainer, ConstantBatchSize(size))


def _simulator(trainer: Trainer, policy: BatchSizePolicy) -> Simulate:
    micro = trainer_access.micro_batch_size(trainer)

    def run(clock: Clock, budget: float) -> Horizon:
        if clock == "tokens" or (clock == "samples" and micro is None):
            return Horizon(clock=clock, budget=budget)  # only counting will tell
        horizon = simulate(
            policy,
            clock=clock,
            budget=budget,
            micro_batch_size=micro or 1,
            world_size=trainer_access.data_parallel_size(trainer),
            batches_per_epoch=trainer_access.epoch_batches(trainer),
            last_batch_samples=trainer_access.last_batch_samples(trainer),
        )
        if micro is not None:
            return horizon
        return replace(horizon, spans=tuple(replace(s, samples=None) for s in horizon.spans))

    return run
