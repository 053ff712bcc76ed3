"""Copies weights from an accelerator to the host while training continues."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_bigopt.averaging.weights import Weights
from lightning_bigopt.durations.progress import Progress

__all__ = ["HostCopies"]


class HostCopies:
    """Copies weights to pinned memory of the host, without waiting for the copy.

    The copy is read one update later, when it has long been made, so that the host does not wait
    for the device.

    Example:
        >>> copies = HostCopies()
        >>> copies.begin({"scale": torch.ones(1)}, Progress(fraction=0.5))
        >>> weights, progress = copies.take()
        >>> weights["scale"].tolist(), progress.fraction, copies.take()
        ([1.0], 0.5, None)
    """

    def __init__(self) -> None:
        self._buffers: Weights = {}
        self._events: list[torch.Event] = []
        self._progress: Progress | None = None

    def begin(self, weights: Mapping[str, Tensor], progress: Progress) -> None:
        """Starts copying weights; the copy before must have been taken."""
        devices = {weight.device for weight in weights.values() if weight.device.type != "cpu"}
        for name, weight in weights.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != weight.shape or buffer.dtype != weight.dtype:
                buffer = torch.empty_like(weight, device="cpu", pin_memory=bool(devices))
                self._buffers[name] = buffer
            buffer.copy_(weight, non_blocking=True)
        for name in self._buffers.keys() - weights.keys():
            del self._buffers[name]
        # The next step of the optimizer, in the same stream, waits for the copy.
        self._events = [torch.Event(device) for device in devices]
        for event in self._events:
            event.record()
        self._progress = progress

    def take(self) -> tuple[Weights, Progress] | None:
        """Returns the copy with its progress after it is complete; None if there is none."""
        progress, self._progress = self._progress, None
        if progress is None:
            return None
        for event in self._events:
            event.synchronize()
        return self._buffers, progress
