"""Windows of bytes from the source files of Python's standard library, as a datamodule."""

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

from lightning_bigopt.checks import check_count, shown

__all__ = ["ByteWindows", "SourceText", "Split", "read_sources"]

Split: TypeAlias = Literal["train", "val"]

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
)


@cache
def read_sources(split: Split, *, validation_share: float = 0.1) -> bytes:
    """Reads the source files of the standard library that belong to one split.

    The checksum of a file's path decides its split: no file is in both splits, and the same Python
    version gives the same bytes on every machine.

    Args:
        split: ``"train"`` or ``"val"``.
        validation_share: Fraction of the files in the validation split, in [0, 1].

    Returns:
        The contents of the files in sorted order, separated by a zero byte.

    Raises:
        ValueError: If the split is unknown or the standard library has no source files.

    Example:
        >>> text = read_sources("train")
        >>> len(text) > 1_000_000, b"import " in text
        (True, True)
    """
    if split not in {"train", "val"}:
        raise ValueError(f"split must be 'train' or 'val', got {shown(split)}; write 'train'")
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
            "use a Python whose standard library is not packed into an archive"
        )
    return b"\0".join(path.read_bytes() for path in chosen)


class ByteWindows(Dataset[Tensor]):
    """Windows of ``length + 1`` bytes: ``length`` inputs, and as many targets shifted by one.

    Args:
        text: The text.
        length: Input bytes of one sample, positive.

    Raises:
        ValueError: If ``length`` is not positive, or ``text`` is shorter than one window.

    Example:
        >>> windows = ByteWindows(b"hello world", length=4)
        >>> len(windows), bytes(windows[0].tolist()), bytes(windows[1].tolist())
        (2, b'hello', b'o wor')
    """

    def __init__(self, text: bytes, *, length: int = 64) -> None:
        if length <= 0:
            raise ValueError(f"length must be positive, got {shown(length)}; write 64")
        if len(text) <= length:
            raise ValueError(
                f"text must be longer than length={length}, got {len(text)} bytes; lower length"
            )
        # bytes are read-only and torch warns about tensors on read-only memory, hence the copy.
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
    """A datamodule of byte windows from the source files of the standard library.

    Args:
        micro_batch_size: Samples in one training batch of one process.
        length: Input bytes of one sample.
        validation_samples: Number of validation windows, evenly spaced over all validation files;
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
        check_count("micro_batch_size", micro_batch_size, of="samples")
        check_count("length", length, of="bytes", hint="write 64")
        if validation_samples is not None:
            check_count("validation_samples", validation_samples, of="samples", hint="None for all")
        self.micro_batch_size = micro_batch_size
        self.length = length
        self.validation_samples = validation_samples

    def setup(self, stage: str) -> None:
        """Reads the source files of both splits."""
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
        """Makes a loader of shuffled training windows, without an incomplete last batch."""
        return DataLoader(
            self.train, batch_size=self.micro_batch_size, shuffle=True, drop_last=True
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Makes a loader of the validation windows, always in the same order."""
        return DataLoader(self.validation, batch_size=256)
