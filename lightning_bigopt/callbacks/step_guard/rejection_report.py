"""Describes rejected updates, and records their batches for ``replay``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_bigopt.batching.randomness import random_state
from lightning_bigopt.callbacks.step_guard.rejected_update import RejectedUpdate
from lightning_bigopt.callbacks.step_guard.rejection_files import RejectionFiles
from lightning_bigopt.engine.stage import Batch
from lightning_bigopt.engine.update import Update
from lightning_bigopt.gradients.gradient_norms import GradientNorms
from lightning_bigopt.gradients.guard import Verdict

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["WindowRecorder"]

_MAX_NAMES = 5


@dataclass(kw_only=True)
class _MicroBatch:
    """One micro-batch of the current window; ``data`` and ``random`` are recorded optionally."""

    index: int
    samples: int
    loss: Tensor
    data: Any = None
    random: dict[str, Any] = field(default_factory=dict)


class WindowRecorder:
    """Records the losses of the current window on the device, and optionally its batches.

    Args:
        files: Writes the batches of rejected updates; without a folder none are recorded.
    """

    def __init__(self, files: RejectionFiles) -> None:
        self.files = files
        self._window: list[_MicroBatch] = []
        self._is_decided = False
        self._data: Any = None
        self._random: dict[str, Any] = {}

    @property
    def is_over(self) -> bool:
        """Whether the next batch opens a window."""
        return self._is_decided or not self._window

    def begin(self, batch: Batch) -> None:
        """Copies the batch and the random state before the batch is trained."""
        if self.files.folder is not None:
            # The training step may write to the tensors of the batch, or remove fields from it.
            self._data = _map_tensors(batch.data, _clone)
            self._random = random_state(batch.fit.trainer.strategy.root_device)

    def add(self, batch: Batch, loss: Tensor) -> None:
        """Adds a micro-batch with its loss; the first one after :meth:`close` opens a window."""
        if self._is_decided:
            self._window, self._is_decided = [], False
        micro = batch.micro_batch
        self._window.append(
            _MicroBatch(
                index=batch.index if micro is None else micro.epoch_index,
                # Batches that are not counted have equal weights.
                samples=1 if batch.samples is None else batch.samples,
                loss=loss,
                data=self._data,
                random=self._random,
            )
        )

    def clear(self) -> None:
        """Clears the window."""
        self._window, self._is_decided = [], False
        self._data, self._random = None, {}

    def close(self) -> None:
        """Marks the window as ended. Its losses stay, for the steps of other optimizers."""
        self._is_decided = True

    def weighted_loss(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum of the losses times their samples, and the number of samples.

        Does not synchronize.

        Args:
            like: Tensor with the device and dtype of the results, which have shape ``()``.
        """
        if not self._window:
            return like.new_zeros(()), like.new_zeros(())
        losses = torch.stack([micro.loss.to(like) for micro in self._window])
        samples = [micro.samples for micro in self._window]
        if len(set(samples)) > 1:  # equal samples need no tensor of weights on the device
            weights = torch.tensor(samples, dtype=like.dtype, device=like.device)
            return (losses * weights).sum(), like.new_full((), sum(samples))
        return losses.sum() * samples[0], like.new_full((), sum(samples))

    def report(
        self, trainer: Trainer, update: Update, verdict: Verdict, norm: float
    ) -> RejectedUpdate:
        """Describes a rejected update, and writes its file. A collective; synchronizes."""
        losses = [micro.loss.item() for micro in self._window]
        indices = [micro.index for micro in self._window]
        samples = sum(micro.samples for micro in self._window)
        worst = _gather(trainer, *_worst_loss(losses, indices))
        gradients, count = _largest_or_nonfinite(update.norms)
        rejected = RejectedUpdate(
            update=trainer.global_step,
            epoch=trainer.current_epoch,
            batches=tuple(indices),
            optimizer=update.label,
            detector=verdict.detector,
            reason=verdict.reason,
            norm=norm,
            loss=(
                sum(loss * micro.samples for loss, micro in zip(losses, self._window, strict=True))
                / samples
                if samples
                else None
            ),
            worst=worst,
            rank=next((r for r, (loss, _) in enumerate(worst) if not math.isfinite(loss)), None),
            parameters=gradients,
            nonfinite=count,
        )
        path = self.files.next_file(trainer)
        if path is None:
            return rejected
        named = replace(rejected, file=str(path))
        is_written = self.files.write(path, lambda: self._contents(named, trainer))
        return named if is_written else rejected

    def _contents(self, rejected: RejectedUpdate, trainer: Trainer) -> dict[str, Any]:
        return {
            "version": 1,
            "rejected": asdict(rejected),
            "precision": str(trainer.precision),
            "window": [
                {
                    "index": micro.index,
                    "samples": micro.samples,
                    "batch": _map_tensors(micro.data, Tensor.cpu),
                    "random": micro.random,
                }
                for micro in self._window
            ],
        }


def _map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function to all tensors in nested mappings, lists and tuples, which are copied."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _map_tensors(value, function) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_map_tensors(value, function) for value in batch)
    return batch


def _clone(tensor: Tensor) -> Tensor:
    """Copies a tensor into new storage; a view would be saved with the storage of its base."""
    return tensor.detach().clone()


def _worst_loss(losses: Sequence[float], indices: Sequence[int]) -> tuple[float, int]:
    """Returns the first non-finite loss, or else the largest, with the index of its batch."""
    if not losses:
        return 0.0, -1
    for loss, index in zip(losses, indices, strict=True):
        if not math.isfinite(loss):
            return loss, index
    return max(zip(losses, indices, strict=True))


def _gather(trainer: Trainer, loss: float, index: int) -> tuple[tuple[float, int], ...]:
    """Gathers a loss and an index from every process, by rank. A collective."""
    # All processes get here, because they have computed the same verdict from the same numbers.
    local = torch.tensor([loss, float(index)], device=trainer.strategy.root_device)
    rows = trainer.strategy.all_gather(local).view(-1, 2).tolist()
    return tuple((row[0], int(row[1])) for row in rows)


def _largest_or_nonfinite(norms: GradientNorms) -> tuple[tuple[tuple[str, float], ...], int]:
    """Returns names and norms of non-finite gradients, or else of the largest ones.

    The second result is the number of non-finite gradients.
    """
    pairs = list(zip(norms.names, norms.per_tensor.tolist(), strict=True))
    nonfinite = [(name, norm) for name, norm in pairs if not math.isfinite(norm)]
    if nonfinite:
        return tuple(nonfinite[:_MAX_NAMES]), len(nonfinite)
    largest = sorted(pairs, key=lambda pair: pair[1], reverse=True)
    return tuple(largest[:_MAX_NAMES]), 0
