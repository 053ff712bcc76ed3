"""Running statistics of batch normalization, as they were before a window that is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """Takes back what refused batches did to the statistics of normalization layers.

    A forward pass moves them before there is a gradient that could be looked at, and a NaN in them
    stays. Everything happens on the device, with one copy a window and none without such layers.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> statistics = RunningStatistics()
        >>> statistics.watch(layer)
        >>> statistics.remember()
        >>> _ = layer(torch.tensor([[float("nan")], [1.0]]))
        >>> statistics.restore_()
        >>> layer.running_mean, layer.num_batches_tracked
        (tensor([0.]), tensor(0))
    """

    def __init__(self) -> None:
        self._layers: list[nn.Module] = []
        self._buffers: list[Tensor] = []
        self._kept: list[Tensor] = []

    def watch(self, module: nn.Module) -> None:
        """Finds the layers, once a fit."""
        self.forget()
        self._layers = [layer for layer in module.modules() if isinstance(layer, _NormBase)]

    @torch.no_grad()
    def remember(self) -> None:
        """Copies the statistics of those layers that train; lazy ones have none as yet."""
        training = [
            layer
            for layer in self._layers
            if layer.training and not isinstance(layer, LazyModuleMixin)
        ]
        buffers = [buffer for layer in training for buffer in layer.buffers(recurse=False)]
        if [id(b) for b in buffers] != [id(b) for b in self._buffers]:
            self._buffers = buffers
            self._kept = [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self._kept, buffers)

    @torch.no_grad()
    def restore_(self) -> None:
        """Puts them back, to the bit."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)

    @torch.no_grad()
    def mend_(self) -> None:
        """Puts back those that are not finite any more, and leaves the others as they are."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, kept))

    def forget(self) -> None:
        """Lets go of module and copies."""
        self._layers, self._buffers, self._kept = [], [], []

    def __getstate__(self) -> dict[str, list[Any]]:
        # A copy of the guard must not take the user's layers along.
        return {"_layers": [], "_buffers": [], "_kept": []}
