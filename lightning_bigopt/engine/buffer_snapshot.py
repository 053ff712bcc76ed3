"""Copies of the buffers that a forward pass may change, at the start of an accumulation window."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

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
        copy: The copy of its local part; None for a large buffer that has not changed.
        version: Torch's count of changes of a large buffer without a copy.
        may_be_constant: Whether it is not known yet if a large buffer changes.
    """

    module: nn.Module
    name: str
    tensor: Tensor
    copy: Tensor | None = None
    version: int = 0
    may_be_constant: bool = True

    def __post_init__(self) -> None:
        self.copy = self.local.clone()

    @property
    def local(self) -> Tensor:
        """The buffer on this process."""
        return to_local(self.tensor)

    @property
    def has_shape(self) -> bool:
        """Whether the buffer has the shape of its copy; the forward pass may set its ``data``."""
        return self.copy is None or self.copy.shape == self.local.shape

    def save(self) -> None:
        """Copies the buffer, unless it is large and has never changed."""
        if self.copy is None:
            if _version(self.tensor) != self.version:
                self.copy, self.may_be_constant = self.local.clone(), False
        elif self.local.numel() < _LARGE or not self.may_be_constant:
            self.copy.copy_(self.local)
        elif _has_same_bits(self.copy, self.local):
            # Most large buffers are constant: masks, tables of positions.
            self.copy, self.version = None, _version(self.tensor)
        else:
            self.copy.copy_(self.local)
            self.may_be_constant = False

    def saved(self) -> Tensor | None:
        """Returns a new tensor with the content of the copy; None for a large constant buffer."""
        if self.copy is None:
            return None
        if self.tensor is self.local or not self.has_shape:
            return self.copy.clone()
        whole = self.tensor.clone()  # a DTensor
        to_local(whole).copy_(self.copy)
        return whole


class BufferSnapshot:
    """Saves and restores the buffers of a module.

    A forward pass changes running statistics, codebooks, queues or the vectors of a spectral norm
    before the update to which it belongs. A rejected update must not change them, and a checkpoint
    inside a window, whose gradients are lost, must not contain the change. Buffers of any dtype
    are included, because a flag or a counter belongs to the tensor beside it, and so are buffers
    that the forward pass replaces by new tensors. Sparse, nested, quantized and expanded buffers
    and other subclasses of tensors are not included.

    All copies stay on the device. A buffer with 2^20 elements or more is copied in the first
    window of an epoch, and after that only if it changes: the first later window of the epoch in
    which it does is not restored. Buffers above 2^26 elements are never copied.

    Attributes:
        modules: The modules that were found; empty if none of them has a buffer.

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
        self.modules: list[nn.Module] = []
        self._entries: list[_Entry] = []
        self._empty: list[tuple[nn.Module, str]] = []  # buffers that are None
        self._keys: list[tuple[int, torch.Size]] = []
        self._small: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._large: list[_Entry] = []
        self._before_evaluation: list[Tensor | None] = []

    def watch(self, module: nn.Module) -> None:
        """Finds the modules inside a module; call it once per epoch, because they may change."""
        vars(self).update(vars(BufferSnapshot()))
        if next(module.buffers(), None) is not None:
            self.modules = list(module.modules())

    @torch.no_grad()
    def save(self) -> None:
        """Copies the buffers."""
        found, self._empty = [], []
        for module in self.modules:
            for name, buffer in _buffers(module).items():
                if buffer is None:
                    self._empty.append((module, name))
                # A lazy buffer has no shape before its first forward pass, and a nested one never.
                elif not (is_lazy(buffer) or buffer.is_nested):
                    found.append((module, name, buffer))
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
        """Copies other buffers than before: the forward pass has replaced a tensor."""
        before = {(id(entry.module), entry.name): entry for entry in self._entries}
        self._entries = []
        for module, name, tensor in found:
            entry = before.get((id(module), name))
            if entry is not None and entry.tensor is tensor and entry.has_shape:
                entry.save()
            elif _can_be_copied(tensor):
                entry = _Entry(module, name, tensor)
            else:
                continue
            self._entries.append(entry)
        small = [e for e in self._entries if e.tensor.numel() < _LARGE and e.copy is not None]
        self._small = [e.local for e in small], [e.copy for e in small if e.copy is not None]
        self._large = [e for e in self._entries if e.tensor.numel() >= _LARGE]

    @torch.no_grad()
    def restore_(self) -> None:
        """Restores the buffers bit for bit."""
        for module, name in self._empty:
            if name in _buffers(module):
                _buffers(module)[name] = None
        for entry in self._entries:
            _buffers(entry.module)[entry.name] = entry.tensor
            if entry.copy is None:
                continue
            if entry.has_shape:
                entry.local.copy_(entry.copy)
            else:
                entry.tensor.data = entry.copy.clone()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Registers copies of the saved buffers with the modules; puts the current ones back."""
        replaced: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []

        def replace(module: nn.Module, name: str, tensor: Tensor | None) -> None:
            buffers = _buffers(module)
            if name in buffers:
                replaced.append((buffers, name, buffers[name]))
                buffers[name] = tensor

        try:
            for module, name in self._empty:
                replace(module, name, None)
            for entry in self._entries:
                saved = entry.saved()
                if saved is not None:
                    replace(entry.module, entry.name, saved)
            yield
        finally:
            for buffers, name, current in replaced:
                buffers[name] = current

    @torch.no_grad()
    def begin_evaluation(self) -> None:
        """Remembers the current buffers before an evaluation inside the window."""
        current = [_buffers(entry.module).get(entry.name) for entry in self._entries]
        self._before_evaluation = [None if b is None else to_local(b).clone() for b in current]

    @torch.no_grad()
    def end_evaluation(self) -> None:
        """Keeps what the evaluation has written to buffers, such as a threshold.

        Compared by value, because averaged weights may have been exchanged in the meantime.
        """
        before, self._before_evaluation = self._before_evaluation, []
        for entry, old in zip(self._entries, before, strict=False):
            current = _buffers(entry.module).get(entry.name)
            if current is None or old is None or not _can_be_copied(current):
                continue
            if not _has_same_bits(old, to_local(current)):
                entry.tensor, entry.copy = current, to_local(current).clone()
                self._keys = []  # the lists of tensors are made again

    @torch.no_grad()
    def restore_nonfinite_(self) -> None:
        """Restores the numbers that have become non-finite."""
        for entry in self._entries:
            current = _buffers(entry.module).get(entry.name)
            if current is None or entry.copy is None or current.dtype.itemsize == 1:
                continue
            local = to_local(current)
            if local.shape == entry.copy.shape:
                local.copy_(torch.where(local.isfinite(), local, entry.copy))

    def __getstate__(self) -> dict[str, Any]:
        # A deep copy of the guard, as plan() makes it, must not copy the user's modules.
        return vars(BufferSnapshot())


def _can_be_copied(buffer: Tensor) -> bool:
    """Returns whether torch copies, compares and overwrites such a tensor, and it is not too large.

    Expanded tensors cannot be overwritten, and inference tensors not during training.
    """
    local = to_local(buffer)
    return (
        type(local) is Tensor
        and local.layout is torch.strided
        and not (local.is_quantized or local.is_meta or local.is_inference())
        and not any(n > 1 and s == 0 for n, s in zip(local.shape, local.stride(), strict=True))
        and local.numel() <= _TOO_LARGE
    )


def _has_same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
