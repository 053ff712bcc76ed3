"""Saves the running statistics of normalization layers, and restores them after a rejection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = ["BufferSnapshot"]


class BufferSnapshot:
    """Saves and restores the running statistics of normalization layers.

    A forward pass updates them before there is a gradient to inspect, and a NaN in a running mean
    never disappears. All copies stay on the device: one per accumulation window, none without such
    layers.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> snapshot = BufferSnapshot()
        >>> snapshot.watch(layer)
        >>> snapshot.save()
        >>> _ = layer(torch.tensor([[float("nan")], [1.0]]))
        >>> snapshot.restore_()
        >>> layer.running_mean, layer.num_batches_tracked
        (tensor([0.]), tensor(0))
    """

    def __init__(self) -> None:
        self._layers: list[nn.Module] = []
        self._buffers: list[Tensor] = []
        self._saved: list[Tensor] = []

    def watch(self, module: nn.Module) -> None:
        """Finds the normalization layers of a module; call it once per fit."""
        self.release()
        self._layers = [layer for layer in module.modules() if isinstance(layer, _NormBase)]

    @torch.no_grad()
    def save(self) -> None:
        """Copies the statistics of all layers in training mode."""
        # Lazy layers have no buffers before their first forward pass.
        training = [
            layer
            for layer in self._layers
            if layer.training and not isinstance(layer, LazyModuleMixin)
        ]
        buffers = [buffer for layer in training for buffer in layer.buffers(recurse=False)]
        # The layers in training mode may change during a run, for instance if a backbone is frozen.
        if [id(b) for b in buffers] != [id(b) for b in self._buffers]:
            self._buffers = buffers
            self._saved = [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self._saved, buffers)

    @torch.no_grad()
    def restore_(self) -> None:
        """Restores the statistics bit for bit."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._saved)

    @torch.no_grad()
    def restore_nonfinite_(self) -> None:
        """Restores the entries that have become non-finite."""
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, saved))

    def release(self) -> None:
        """Releases the layers and the copies."""
        self._layers, self._buffers, self._saved = [], [], []

    def __getstate__(self) -> dict[str, list[Any]]:
        # A deep copy of the guard, as plan() makes it, must not copy the user's layers.
        return {"_layers": [], "_buffers": [], "_saved": []}
