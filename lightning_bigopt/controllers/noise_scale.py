"""The gradient noise scale, from gradients that training computes anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_bigopt import trainer_access
from lightning_bigopt.batching import NoiseScaleEstimator, NoiseScaleReport, noise_scale_terms
from lightning_bigopt.batching.local_squares import LocalSquares
from lightning_bigopt.controllers.alone import log_alone
from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.gradients import measure

if TYPE_CHECKING:
    from lightning_bigopt.pipeline import OptimizerStep, Pipeline

__all__ = ["NoiseScaleController"]

_ONE_SIZE = (
    "an update of one micro-batch on one process (or on sharded ones) shows the gradient at one "
    "batch size only; accumulate two micro-batches or more, or train with DDP"
)


class NoiseScaleController(Controller):
    """Compares the gradient of a part of each update with that of the whole update.

    The part is the first micro-batch where the update accumulates, and each process's share where
    DDP reduces a single one.
    """

    role = "noise scale"
    rank = 60

    def __init__(self, *, decay: float = 0.99, minimum_updates: int = 16) -> None:
        self.estimator = NoiseScaleEstimator(decay=decay, minimum_updates=minimum_updates)
        self.report = self.estimator.report()
        self._squares: LocalSquares | None = None
        self._is_first = True
        self._small: tuple[Tensor, float, float] | None = None
        self._big: Tensor | None = None
        self._weight: float | Tensor = 1.0
        self._said: str | None = None

    @property
    def noise_scale(self) -> float | None:
        """The noise scale in samples; None where it cannot be trusted."""
        return self.report.noise_scale

    # ------------------------------------------------------------------------------- hooks

    def on_fit_start(self, pipeline: Pipeline) -> None:
        """Refuses manual optimization, and asks DDP for what each process contributes."""
        trainer = pipeline.trainer
        if not pipeline.module.automatic_optimization:
            raise ValueError(
                "automatic_optimization must be True with GradientNoiseScale, got False; feed a "
                "NoiseScaleEstimator from your own training_step"
            )
        if trainer_access.is_deepspeed(trainer):
            raise ValueError(
                "strategy must not be DeepSpeed with GradientNoiseScale, got "
                f"{type(trainer.strategy).__name__}, which keeps its gradients to itself"
            )
        self._squares = trainer_access.watch_local_gradients(trainer)

    def on_train_start(self, pipeline: Pipeline) -> None:
        """No window is open."""
        self._is_first, self._small, self._said = True, None, None

    def on_epoch_start(self, pipeline: Pipeline) -> None:
        """No window crosses an epoch."""
        self._is_first, self._small = True, None

    def on_batch_start(self, pipeline: Pipeline, batch: Any, index: int) -> None:
        """Notes what the batch's loss will be multiplied by."""
        self._weight = pipeline.loss_factor

    def wants_norms(self, step: OptimizerStep) -> bool:
        """The norm of the whole update, where there is a part to compare it with."""
        return self._small is not None or (self._is_first and self._squares is not None)

    def rescale(self, step: OptimizerStep) -> None:
        """Notes the norm of the whole update, rescaled and not clipped yet."""
        if not self.wants_norms(step):
            self._say(f"The gradient noise scale cannot be measured here: {_ONE_SIZE}.")
            return
        self._big = step.norms.total
        if step.norms.norm_type != 2:
            self._big = measure(step.parameters, process_group=step.pipeline.shard_group).total

    def observe(self, step: OptimizerStep) -> None:
        """Compares the update with its part, on every process alike."""
        pipeline, big = step.pipeline, self._big
        trainer = pipeline.trainer
        if big is None or step.skipped is not None:
            return
        if self._small is None:
            assert self._squares is not None  # wants_norms
            square, count = self._squares.take(), float(pipeline.window.batch_samples)
            scale = trainer_access.loss_scale(trainer)
            small = (square / scale**2, count, float(self._weight))
        else:
            small = self._small
        self._small = self._big = None
        self._update(pipeline, small, big)

    def _update(self, pipeline: Pipeline, small: tuple[Tensor, float, float], big: Tensor) -> None:
        trainer = pipeline.trainer
        world = trainer_access.data_parallel_size(trainer)
        square, samples, weight = small
        pooled = trainer_access.shards_gradients(trainer)
        if not pooled:  # each process has a part of its own
            square = square / weight**2 if weight else square * 0
        inverse = 1 / samples if samples and weight else 0.0
        rest = torch.tensor([inverse, samples, weight, float(inverse > 0)], dtype=torch.float64)
        device = trainer.strategy.root_device
        wide = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.cat(
            [
                square.reshape(1).to(device, wide),
                big.reshape(1).to(device, wide) ** 2,
                rest.to(device, wide),
            ]
        )
        totals = trainer_access.sum_over_data_(trainer, sums).tolist()
        square_sum, big_sum, inverse_sum, sample_sum, weight_sum, parts = totals
        if not parts or not weight_sum:
            return
        if pooled:
            small_square = square_sum / world / (weight_sum / world) ** 2
            small_size = sample_sum
        else:
            small_square, small_size = square_sum / parts, parts / inverse_sum
        whole = float(pipeline.window.samples)
        if not small_size < whole:
            return
        noise, signal = noise_scale_terms(
            small_square, big_square=big_sum / world, small=small_size, big=whole
        )
        self.estimator.update(noise, signal=signal)
        self.report = self.estimator.report()
        if self.report.reason and self.estimator.updates >= self.estimator.minimum_updates:
            self._say(f"The gradient noise scale is not logged: {self.report.reason}.")

    def on_batch_end(self, pipeline: Pipeline, outputs: Any, batch: Any) -> None:
        """The gradient of the first micro-batch is there, and no other."""
        if self._is_first and pipeline.window.is_open:
            trainer = pipeline.trainer
            parameters = [
                pair
                for optimizer in trainer.optimizers
                for pair in pipeline.parameters_of(optimizer)
            ]
            norm = measure(parameters, process_group=pipeline.shard_group).total.double()
            length = int(trainer.accumulate_grad_batches)
            square = (norm * length / trainer_access.loss_scale(trainer)) ** 2
            self._small = square, float(pipeline.window.batch_samples), float(self._weight)
        if self._squares is not None:
            self._squares.clear()
        if not pipeline.window.is_open:
            self._small = self._big = None
        self._is_first = not pipeline.window.is_open
        if self._is_first:
            log_alone(self, pipeline)

    def on_fit_end(self, pipeline: Pipeline) -> None:
        """Stops watching."""
        if self._squares is not None:
            self._squares.stop()
            self._squares = None

    def metrics(self, pipeline: Pipeline) -> Mapping[str, float]:
        """The noise scale with its standard error, or nothing where they cannot be trusted."""
        found: NoiseScaleReport = self.report
        if found.noise_scale is None:
            return {}
        values = {
            "simple": found.noise_scale,
            "standard_error": found.standard_error,
            "noise": found.noise,
            "signal": found.signal,
        }
        return {f"noise_scale/{name}": v for name, v in values.items() if v is not None}

    def _say(self, text: str) -> None:
        """Says it once a fit."""
        if self._said is None:
            self._said = text
            rank_zero_info(text)

    # ------------------------------------------------------------------------------- state

    def reset(self) -> None:
        """Forgets a former Trainer's run."""
        self.estimator.reset()
        self.report = self.estimator.report()

    def state_dict(self) -> dict[str, Any]:
        """The estimator's sums."""
        return {"estimator": self.estimator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.estimator.load_state_dict(state["estimator"])
        self.report = self.estimator.report()
