"""What each micro-batch is worth, so that a mean of means is a mean over samples or tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_bigopt import trainer_access
from lightning_bigopt.batching import MicroBatch
from lightning_bigopt.counting import BatchWeight, named_function, weigh
from lightning_bigopt.gradients import scale_

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_bigopt.pipeline import OptimizerStep, Pipeline

__all__ = ["LossWeights"]


class LossWeights:
    """Multiplies losses before their backward, and the gradient once before its update.

    Lightning divides every loss by the length of the window, and the processes are averaged. A
    micro-batch that holds ``w`` of what is counted gets the factor ``w / reference``, and the
    window's gradient ``length × processes × reference / Σw``, with Σ over micro-batches and
    processes. Both are left out where they are 1.

    Args:
        weight: What a batch weighs (a function, its dotted name, or a field's name); None for its
            samples.
    """

    def __init__(self, weight: BatchWeight = None) -> None:
        self.weight = named_function(weight, name="weight")
        self.factor: float | Tensor = 1.0
        self._sum: float | Tensor = 0.0
        self._full = 1
        self._varies = False
        self._reference: float | None = None

    # -------------------------------------------------------------------------------- window

    def start(self, *, full: int, varies: bool) -> None:
        """A fit starts.

        Args:
            full: Samples in a full micro-batch of one process.
            varies: Whether any micro-batch may hold fewer or more, not only an epoch's last.
        """
        self._full, self._varies = full, varies

    def open_window(self) -> None:
        """No micro-batch has been weighed yet."""
        self._sum = 0.0

    def weigh(self, pipeline: Pipeline, batch: Any, served: MicroBatch | None) -> None:
        """Weighs the batch under way.

        Args:
            pipeline: The pipeline.
            batch: What the loader gave.
            served: What an exact loader says of it.
        """
        if self.weight is None:
            mine = pipeline.window.batch_samples
            self.factor = mine / self._full if served is None else served.weight
            self._sum = self._sum + mine
            return
        is_filler = served is not None and not served.samples
        value = 0.0 if is_filler else weigh(batch, self.weight, name="weight")
        if isinstance(value, Tensor):
            value = value.detach()
        if (self._reference is None or not isinstance(value, Tensor)) and not (
            0 <= float(value) < math.inf
        ):
            raise ValueError(
                f"weight must be non-negative and finite, got {float(value)}; return what the "
                "batch counts, such as its tokens"
            )
        if self._reference is None:
            self._reference = _power_of_two(pipeline.trainer, float(value))
        self.factor = value / self._reference
        self._sum = self._sum + value

    def rescale(self, step: OptimizerStep, *, length: int, is_exact: bool) -> None:
        """From the mean over micro-batches to the mean over what was counted."""
        trainer = step.pipeline.trainer
        world = trainer_access.data_parallel_size(trainer)
        device = trainer.strategy.root_device
        if self.weight is None:
            if is_exact:  # its weights are relative to the window already
                return
            expected, samples = float(length * self._full * world), float(self._sum) * world
            if self._varies or trainer_access.is_last_batch(trainer):
                samples = trainer_access.sum_over_data(trainer, float(self._sum))
            if samples == expected:
                return
            coefficient = torch.tensor(expected / samples, device=device)
        else:
            assert self._reference is not None  # a batch has been weighed
            total = torch.as_tensor(self._sum, dtype=torch.float32, device=device).clone()
            trainer_access.sum_over_data_(trainer, total)
            expected = length * world * self._reference
            coefficient = torch.where(total > 0, expected / total, torch.zeros_like(total))
        scale_([parameter.grad for _, parameter in step.parameters], coefficient)

    # --------------------------------------------------------------------------------- patch

    def patch(self, module: LightningModule) -> None:
        """Weighs losses on their way into the module's backward."""

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            factor = self.factor
            even = not isinstance(factor, Tensor) and factor == 1
            type(module).backward(module, loss if even else loss * factor, *args, **kwargs)

        module.__dict__["backward"] = backward

    def state_dict(self) -> dict[str, Any]:
        """The reference."""
        return {"reference": self._reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self._reference = state["reference"]

    def reset(self) -> None:
        """Forgets a former run."""
        self._reference = None


def _power_of_two(trainer: Trainer, value: float) -> float:
    """One near the mean over the processes: a factor that changes no bit, nor fp16's range."""
    mean = trainer_access.sum_over_data(trainer, value)
    mean /= trainer_access.data_parallel_size(trainer)
    return 2.0 ** round(math.log2(mean)) if mean > 0 and math.isfinite(mean) else 1.0
