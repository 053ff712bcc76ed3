"""Real text that every machine has: the source of the running Python's standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias
from zlib import crc32

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["ByteWindows", "SourceText", "Split", "read_sources"]

Split: TypeAlias = Literal["train", "val"]

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
)


@cache
def read_sources(split: Split, *, validation_share: float = 0.1) -> bytes:
    """The standard library's source files of one split, end to end in sorted order.

    A file belongs to a split by the checksum of its path: no file is in both, and the same
    Python gives the same bytes on every machine.

    Args:
        split: ``"train"`` or ``"val"``.
        validation_share: Share of the files that are kept for validation, in [0, 1].

    Returns:
        The bytes, files separated by a zero byte.

    Raises:
        ValueError: If the split is unknown or the standard library has no source files.

    Example:
        >>> text = read_sources("train")
        >>> len(text) > 1_000_000, b"import " in text
        (True, True)
    """
    if split not in {"train", "val"}:
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    root = Path(sysconfig.get_path("stdlib"))
    chosen = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix == ".py":
                key = path.relative_to(root).as_posix().encode()
                is_validation = crc32(key) < validation_share * 2**32
                if is_validation == (split == "val"):
                    chosen.append(path)
    if not chosen:
        raise ValueError(
            f"the standard library must come with its source files, found none below {root}; "
            "use a Python that is not packed into an archive"
        )
    return b"\0".join(path.read_bytes() for path in chosen)


class ByteWindows(Dataset[Tensor]):
    """Windows of text, ``length + 1`` bytes each: the inputs and, one further, the targets.

    Args:
        text: The text.
        length: Bytes that the model reads in one sample, positive.

    Raises:
        ValueError: If ``length`` is not positive, or ``text`` holds no whole window.

    Example:
        >>> windows = ByteWindows(b"hello world", length=4)
        >>> len(windows), bytes(windows[0].tolist()), bytes(windows[1].tolist())
        (2, b'hello', b'o wor')
    """

    def __init__(self, text: bytes, *, length: int = 64) -> None:
        if length <= 0:
            raise ValueError(f"length must be positive, got {length!r}")
        if len(text) <= length:
            raise ValueError(f"text must be longer than length={length}, got {len(text)} bytes")
        # A copy of bytes into a tensor of its own, so that the tensor may be written to.
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.length = length

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.length
        return self.bytes[start : start + self.length + 1].long()

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        return [self[index] for index in indices]


class SourceText(LightningDataModule):
    """The standard library's source as windows of bytes, for training and validation.

    Args:
        micro_batch_size: Samples in a loader batch of one process.
        length: Bytes in a sample.
        validation_samples: How many validation windows, evenly spaced over all validation files;
            None for all.

    Example:
        >>> data = SourceText(micro_batch_size=4, length=16, validation_samples=8)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader())).shape
        torch.Size([4, 17])
    """

    def __init__(
        self,
        *,
        micro_batch_size: int = 32,
        length: int = 64,
        validation_samples: int | None = 1024,
    ) -> None:
        super().__init__()
        self.micro_batch_size = micro_batch_size
        self.length = length
        self.validation_samples = validation_samples

    def setup(self, stage: str) -> None:
        """Reads the files of both splits."""
        self.train = ByteWindows(read_sources("train"), length=self.length)
        self.validation: Dataset[Tensor] = self._spread(
            ByteWindows(read_sources("val"), length=self.length)
        )

    def _spread(self, windows: ByteWindows) -> Dataset[Tensor]:
        count = self.validation_samples
        if count is None or count >= len(windows):
            return windows
        indices = [index * len(windows) // count for index in range(count)]
        return torch.utils.data.Subset(windows, indices)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Shuffled windows of the training files, whole batches only."""
        return DataLoader(
            self.train, batch_size=self.micro_batch_size, shuffle=True, drop_last=True
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The same validation windows in the same order, every time."""
        return DataLoader(self.validation, batch_size=256)
