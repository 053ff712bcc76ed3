"""Weights micro-batches, so that the gradient is the mean over samples or tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_bigopt.batching.window_length import WindowLength
from lightning_bigopt.engine.batch_contents import BatchWeight, named_function, weigh
from lightning_bigopt.engine.batch_source import BatchSource
from lightning_bigopt.engine.stage import Batch
from lightning_bigopt.engine.update import Update
from lightning_bigopt.gradients.apply import scale_
from lightning_bigopt.trainer_access import loop, strategies

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["LossWeights", "rescale_", "shorten_window"]


class LossWeights:
    """Computes the factor on each loss, and the one on the gradient before its update.

    Lightning divides every loss by the length of the window, and the strategy averages over the
    processes. The loss of a micro-batch of weight ``w`` is multiplied by ``w / reference``, and the
    gradient of the window by ``length × processes × reference / Σw``, with the sum over all
    micro-batches and processes. The gradient becomes ``Σ w·g / Σ w``. Factors of 1 are skipped.

    Args:
        weight: Weight of a batch: a function, its dotted name, or the name of a field; None for
            the number of samples.
    """

    def __init__(self, weight: BatchWeight = None) -> None:
        self.weight = named_function(weight, name="weight")
        self._sum: float | Tensor = 0.0
        self._coefficient: float | Tensor | None = None  # of the current window
        self._full = 1
        self._varies = self._is_exact = False
        self._reference: float | None = None

    def start(self, source: BatchSource) -> None:
        """Sets the batch sizes of the loaders, at the start of a fit or an epoch.

        Args:
            source: The sizes of the batches that the loaders return.
        """
        self._full, self._varies = source.micro_batch_size, source.varies
        self._is_exact = source.is_exact

    def open_window(self) -> None:
        """Resets the sum of the weights at the start of a window."""
        self._sum, self._coefficient = 0.0, None

    def weigh(self, batch: Batch) -> float | Tensor:
        """Adds the weight of the current batch to the sum, and returns the factor on its loss."""
        if self.weight is None:
            micro = batch.micro_batch
            self._sum = self._sum + batch.counted_samples
            return batch.counted_samples / self._full if micro is None else micro.weight
        # GlobalBatchLoader repeats a sample, with weight 0, on a process that has fewer samples of
        # the window than micro-batches.
        is_filler = batch.micro_batch is not None and not batch.samples
        value = 0.0 if is_filler else weigh(batch.data, self.weight, name="weight")
        if isinstance(value, Tensor):
            value = value.detach()
        # Reading a tensor synchronizes: only the first one is checked.
        if (self._reference is None or not isinstance(value, Tensor)) and not (
            0 <= float(value) < math.inf
        ):
            raise ValueError(
                f"weight must be non-negative and finite, got {float(value)}; return a count, such "
                "as the number of tokens in the batch"
            )
        if self._reference is None:
            self._reference = _power_of_two(batch.fit.trainer, float(value))
        self._sum = self._sum + value
        return value / self._reference

    def coefficient(self, trainer: Trainer, *, length: int) -> float | Tensor:
        """Returns the factor that makes a gradient the mean over samples or weights.

        The first call of a window is a collective if the weights may differ between the processes.

        Args:
            trainer: The Trainer, in the last micro-batch of the window.
            length: Number of micro-batches of one process in the window.
        """
        if self._coefficient is None:
            self._coefficient = self._compute(trainer, length)
        return self._coefficient

    def _compute(self, trainer: Trainer, length: int) -> float | Tensor:
        world = strategies.data_parallel_size(trainer)
        device = trainer.strategy.root_device
        if self.weight is None:
            if self._is_exact:  # MicroBatch.weight is already relative to the window
                return 1.0
            # Without partial batches every process has the same sum: no collective is needed.
            expected, samples = float(length * self._full * world), float(self._sum) * world
            if self._varies or loop.is_last_batch(trainer):
                samples = strategies.sum_over_data(trainer, float(self._sum))
            if samples == expected:
                return 1.0
            # torch.tensor would copy from the host, which then waits for the device.
            return torch.full((), expected / samples, device=device)
        assert self._reference is not None  # set by weigh
        # On the device throughout, so that a window without any weight needs no host
        # synchronization; its gradient becomes zero instead of NaN.
        total = torch.zeros((), device=device).add_(self._sum)
        strategies.sum_over_data_(trainer, total)
        expected = length * world * self._reference
        return torch.where(total > 0, expected / total, torch.zeros_like(total))

    def state_dict(self) -> dict[str, Any]:
        """Returns the reference weight."""
        return {"reference": self._reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the reference weight from a checkpoint."""
        self._reference = state["reference"]

    def reset(self) -> None:
        """Clears the reference weight."""
        self._reference = None


def rescale_(update: Update, coefficient: float | Tensor) -> None:
    """Multiplies the gradients of an update in place; a number is 1 and changes nothing."""
    if isinstance(coefficient, Tensor):
        scale_([parameter.grad for _, parameter in update.parameters], coefficient)


def shorten_window(batch: Batch, window: WindowLength) -> WindowLength:
    """Ends a window that the end of the data cuts, with the last batch.

    The gradients accumulated before it are rescaled, because their losses were divided by the
    planned length of the window.

    Args:
        batch: A batch within the window, before it is trained.
        window: The window as planned.

    Returns:
        The shortened window; the same one if the data goes on, or the window ends anyway.
    """
    length = batch.index + 1 - window.start
    # A loader without a length may end at any batch. GlobalBatchLoader plans its windows.
    if (
        batch.micro_batch is not None
        or length == window
        or not loop.is_last_batch(batch.fit.trainer)
    ):
        return window
    gradients = [parameter.grad for parameter in batch.fit.module.parameters()]
    device = batch.fit.trainer.strategy.root_device
    scale_(gradients, torch.full((), window / length, device=device))
    return WindowLength(length, window.start)


def _power_of_two(trainer: Trainer, value: float) -> float:
    """Returns the power of two nearest to the mean of a number over the processes."""
    # Dividing a loss by a power of two is exact. By a number near the weights, it keeps the loss
    # in the range of fp16.
    mean = strategies.sum_over_data(trainer, value)
    mean /= strategies.data_parallel_size(trainer)
    return 2.0 ** round(math.log2(mean)) if mean > 0 and math.isfinite(mean) else 1.0
