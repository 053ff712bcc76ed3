"""Saves the buffers that a forward pass may change, and restores them after a rejection."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_bigopt.gradients.norm_kernels import accumulation_dtype
from lightning_bigopt.gradients.sharding import to_local

__all__ = ["BufferSnapshot"]

# From this number of elements on (4 MB in float32) a buffer is copied only if it changes. Larger
# ones than the second number (256 MB) are never copied.
_LARGE = 1 << 20
_TOO_LARGE = 1 << 26
_version = attrgetter("_version")
_buffers = attrgetter("_buffers")


@dataclass(eq=False)
class _Entry:
    """A buffer and its copy at the start of the window.

    Args:
        module: The module that owns the buffer.
        name: Its name in the module.
        tensor: The registered tensor.
        copy: The copy of its local part; None as long as a large buffer has not changed.
        version: Torch's count of changes of a large buffer.
        total: Sum of a large buffer at the start of the first window.
    """

    module: nn.Module
    name: str
    tensor: Tensor
    copy: Tensor | None = None
    version: int = 0
    total: Tensor | None = None

    @property
    def local(self) -> Tensor:
        """The buffer on this process."""
        return to_local(self.tensor)

    @property
    def has_shape(self) -> bool:
        """Whether the buffer has the shape of its copy; the forward pass may set its ``data``."""
        return self.copy is None or self.copy.shape == self.local.shape

    def watch(self, *, is_new: bool) -> None:
        """Copies a small buffer, or remembers the content of a large one that is new."""
        local = self.local
        if local.numel() < _LARGE or not is_new:
            self.copy = local.clone()
        else:
            self.version, self.total = _version(self.tensor), _sum(local)

    def save(self) -> None:
        """Copies the buffer, unless it is large and has never changed."""
        if self.copy is not None:
            self.copy.copy_(self.local)
            return
        # Changes through ``.data`` are not counted: the first window is compared by its sum.
        has_changed = _version(self.tensor) != self.version
        if not has_changed and self.total is not None:
            has_changed = not torch.equal(_sum(self.local), self.total)
        self.total = None
        if has_changed:
            self.copy = self.local.clone()


class BufferSnapshot:
    """Saves and restores the buffers of modules in training mode.

    A forward pass changes running statistics, codebooks, queues or the vectors of a spectral norm
    before there is a gradient to inspect, and a NaN in a moving average never disappears. Buffers
    of any dtype are restored, because a flag or a counter belongs to the tensor beside it. Buffers
    that the forward pass replaces by new tensors are included.

    All copies stay on the device. A buffer with 2^20 elements or more is copied only if it changes:
    the first window in which it does is not restored. Buffers above 2^26 elements are never copied.

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
        self._modules: list[nn.Module] = []
        self._entries: list[_Entry] = []
        self._keys: list[tuple[int, torch.Size]] = []
        self._small: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._large: list[_Entry] = []

    def watch(self, module: nn.Module) -> None:
        """Finds the modules inside a module; call it once per epoch, because they may change."""
        self._modules = list(module.modules())

    @torch.no_grad()
    def save(self) -> None:
        """Copies the buffers of all modules in training mode."""
        found = [
            (module, name, buffer)
            for module in self._modules
            if module.training
            for name, buffer in _buffers(module).items()
            if _is_saved(buffer)
        ]
        keys = [(id(buffer), buffer.shape) for *_, buffer in found]
        if keys != self._keys:
            self._keys = keys
            self._begin(found)
            return
        small, copies = self._small
        if small:
            torch._foreach_copy_(copies, small)
        for entry in self._large:
            entry.save()

    def _begin(self, found: list[tuple[nn.Module, str, Tensor]]) -> None:
        """Copies other buffers than before: modules were frozen, or have replaced a tensor."""
        before = {(id(entry.module), entry.name): entry for entry in self._entries}
        self._entries = []
        for module, name, tensor in found:
            known = before.get((id(module), name))
            if known is not None and known.tensor is tensor and known.has_shape:
                entry = known
                entry.save()
            else:
                entry = _Entry(module, name, tensor)
                entry.watch(is_new=known is None)
            self._entries.append(entry)
        small = [e for e in self._entries if e.tensor.numel() < _LARGE and e.copy is not None]
        self._small = [e.local for e in small], [e.copy for e in small if e.copy is not None]
        self._large = [e for e in self._entries if e.tensor.numel() >= _LARGE]

    @torch.no_grad()
    def restore_(self) -> None:
        """Restores the buffers bit for bit."""
        for entry in self._entries:
            _buffers(entry.module)[entry.name] = entry.tensor
            if entry.copy is None:
                continue
            if entry.has_shape:
                entry.local.copy_(entry.copy)
            else:
                entry.tensor.data = entry.copy.clone()

    @torch.no_grad()
    def restore_nonfinite_(self) -> None:
        """Restores the numbers that have become non-finite."""
        for entry in self._entries:
            current = _buffers(entry.module).get(entry.name)
            if current is None or entry.copy is None:
                continue
            local = to_local(current)
            if local.shape == entry.copy.shape:
                local.copy_(torch.where(local.isfinite(), local, entry.copy))

    def release(self) -> None:
        """Releases the modules and the copies."""
        vars(self).update(vars(BufferSnapshot()))

    def __getstate__(self) -> dict[str, Any]:
        # A deep copy of the guard, as plan() makes it, must not copy the user's modules.
        return vars(BufferSnapshot())


def _is_saved(buffer: Any) -> bool:
    # A buffer may be None, and that of a lazy module has no values before its first forward pass.
    return buffer is not None and not is_lazy(buffer) and buffer.numel() <= _TOO_LARGE


def _sum(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.sum(dtype=accumulation_dtype(real.device))
