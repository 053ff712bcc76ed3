"""Spike scores of the losses and gradient norms of the updates that were made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bigopt.gradients.gradient_norms import GradientNorms, unread_total
from lightning_bigopt.gradients.norm_kernels import accumulation_dtype
from lightning_bigopt.monitoring.metric_buffer import MetricBuffer
from lightning_bigopt.monitoring.spike_score import SpikeScore
from lightning_bigopt.monitoring.tags import tag_name

__all__ = ["Stability"]

_Quantity: TypeAlias = Literal["norm", "loss"]
_Number: TypeAlias = float | Tensor
_MOST_PENDING = 128


@dataclass(kw_only=True, eq=False)
class _Entry:
    """One update of an optimizer.

    Args:
        norm: Gradient norm before clipping; None if it was not measured.
        loss: Sum of the losses of the window on this process, each times its samples.
        samples: Samples of the window on this process; 0 without a loss.
        is_made: Whether the optimizer has stepped.
    """

    norm: _Number | None
    loss: _Number
    samples: float
    is_made: bool = False


class Stability:
    """Records norm and loss of every update, and computes their spike scores.

    The loss is the mean over the samples of the window and all processes. The losses of several
    updates are summed over the processes in one all-reduce: at logged updates, after 128 updates,
    and before a checkpoint is saved. The score of the norm needs the norm of every update: it
    starts again after an update whose norm was not measured.

    Example:
        >>> stability = Stability()
        >>> stability.add_loss(torch.tensor(2.0), samples=4)
        >>> stability.observe("", None)
        >>> stability.accept("", found_inf=None, is_logged=False)
        >>> stability.state_dict()["loss"][""]["history"]
        [2.0]
    """

    def __init__(self) -> None:
        self._series: dict[_Quantity, dict[str, SpikeScore]] = {"norm": {}, "loss": {}}
        self.start(device=torch.device("cpu"), processes=1)

    def start(self, *, device: torch.device, processes: int) -> None:
        """Starts with an empty window.

        Args:
            device: Device for the sums over processes.
            processes: Number of processes.
        """
        self._device = device
        self._is_shared = processes > 1 and dist.is_available() and dist.is_initialized()
        self._pending: dict[str, list[_Entry]] = {}
        self.clear_window()

    def clear_window(self) -> None:
        """Clears the losses of a window."""
        self._loss: _Number = 0.0  # the sum, each loss times its samples
        self._samples = 0
        self._window_is_over = False

    def add_loss(self, loss: Tensor, *, samples: int | None) -> None:
        """Adds the loss of a micro-batch, of shape ``()``. Does not synchronize.

        Args:
            loss: The mean over the samples.
            samples: Number of samples; None gives all micro-batches the same weight.
        """
        if self._window_is_over:
            self.clear_window()
        weight = 1 if samples is None else samples
        if loss.is_cpu:
            self._loss = self._loss + float(loss) * weight
        else:
            self._loss = self._loss + loss.to(accumulation_dtype(loss.device)) * weight
        self._samples += weight

    def observe(self, label: str, norms: GradientNorms | None) -> None:
        """Records an update, which counts after :meth:`accept`; other optimizers use its window.

        Args:
            label: Name of the optimizer; empty if there is only one.
            norms: Norms of the gradients before clipping; None if they were not measured.
        """
        self._window_is_over = True
        norm = None if norms is None else unread_total(norms)
        entries = self._pending.setdefault(label, [])
        if entries and not entries[-1].is_made:  # rejected, or skipped by a GradScaler
            entries.pop()
        entries.append(_Entry(norm=norm, loss=self._loss, samples=float(self._samples)))

    def accept(self, label: str, *, found_inf: Tensor | None, is_logged: bool) -> None:
        """Records that the optimizer has stepped. A collective if the update is logged.

        Args:
            label: Name of the optimizer.
            found_inf: Positive if a fused kernel has skipped the update; a tensor of shape ``()``.
            is_logged: Whether the scores will be read in this update.
        """
        entries = self._pending.get(label)
        if not entries:
            return
        entries[-1].is_made = True
        if found_inf is not None:  # the norm is not finite then
            none = torch.full((), math.nan, device=found_inf.device)
            loss = torch.as_tensor(entries[-1].loss, device=found_inf.device)
            entries[-1].loss = none.where(found_inf.reshape(()) > 0, loss)
        if is_logged or not self._is_shared or len(entries) >= _MOST_PENDING:
            self._reduce(label)

    def reduce(self) -> None:
        """Adds all updates to the histories. A collective with several processes."""
        for label in self._pending:
            self._reduce(label)

    def _reduce(self, label: str) -> None:
        pending = self._pending[label]
        made = [entry for entry in pending if entry.is_made]
        self._pending[label] = [entry for entry in pending[-1:] if not entry.is_made]
        if not made:
            return
        norms = self._series["norm"].setdefault(label, SpikeScore())
        for entry in made:
            if entry.norm is None:
                norms.reset()
            else:
                norms.add(entry.norm)
        losses = self._series["loss"].setdefault(label, SpikeScore())
        for loss in self._mean_losses(made):
            losses.add(loss)

    def _mean_losses(self, entries: Sequence[_Entry]) -> Sequence[_Number]:
        """Returns the mean losses; NaN for a window without a loss."""
        if not self._is_shared:
            return [entry.loss / entry.samples if entry.samples else math.nan for entry in entries]
        dtype = accumulation_dtype(self._device)
        samples = torch.tensor([e.samples for e in entries], device=self._device, dtype=dtype)
        losses = [
            torch.as_tensor(e.loss, dtype=dtype).to(self._device).reshape(()) for e in entries
        ]
        sums = torch.stack([torch.stack(losses), samples], dim=1)
        dist.all_reduce(sums)
        # Rounded to float32: the order of the sums, and with it the last bit, depends on the number
        # of updates in the all-reduce.
        means = (sums.select(1, 0) / sums.select(1, 1)).float()
        return means.tolist() if means.is_cpu else means.unbind()

    def add_scores(self, *, into: MetricBuffer) -> None:
        """Adds all scores to a buffer; NaN for one without a comparison. Does not synchronize."""
        for quantity, series in self._series.items():
            for label, score in series.items():
                into.add(tag_name(f"stability/spike_score/{quantity}", label), score.value())

    def state_dict(self) -> dict[str, Any]:
        """Returns histories and counts by quantity and optimizer. Synchronizes."""
        if not self._is_shared:
            self.reduce()
        return {
            quantity: {label: score.state_dict() for label, score in series.items()}
            for quantity, series in self._series.items()
        }

    def snapshot(self) -> dict[str, Any]:
        """Returns what :meth:`restore` needs. No collective, and no synchronization."""
        return {
            "series": {
                quantity: {label: score.snapshot() for label, score in series.items()}
                for quantity, series in self._series.items()
            },
            "pending": {
                label: [dict(vars(entry)) for entry in entries]
                for label, entries in self._pending.items()
            },
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Restores the state at the time of :meth:`snapshot`, in the same fit."""
        self.clear_window()
        self._pending = {
            label: [_Entry(**entry) for entry in entries]
            for label, entries in snapshot["pending"].items()
        }
        for quantity, series in self._series.items():
            series.clear()
            for label, kept in snapshot["series"][quantity].items():
                series[label] = SpikeScore()
                series[label].restore(kept)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores histories and counts."""
        self._pending = {}
        for quantity, series in self._series.items():
            series.clear()
            for label, saved in state[quantity].items():
                series[label] = SpikeScore()
                series[label].load_state_dict(saved)
