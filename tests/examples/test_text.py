"""The text of the examples: splits and windows."""

from __future__ import annotations

import os
import subprocess
import sys
from zlib import crc32

import pytest
import torch

from lightning_bigopt.examples.text import ByteWindows, SourceText, read_sources


def test_every_file_is_in_exactly_one_split():
    train, val = read_sources("train"), read_sources("val")
    train_files, val_files = set(train.split(b"\0")), set(val.split(b"\0"))
    # Empty __init__.py files are equal.
    assert {file for file in train_files & val_files if len(file) > 100} == set()
    assert 0.03 < len(val) / (len(train) + len(val)) < 0.25


@pytest.mark.slow
def test_split_is_the_same_in_every_process():
    """Compares this process with one that has another hash seed."""
    source = (
        "from lightning_bigopt.examples.text import read_sources; from zlib import crc32;"
        "print(crc32(read_sources('train')), crc32(read_sources('val')))"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    other = subprocess.run(
        [sys.executable, "-c", source],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
    ).stdout
    assert other.split() == [str(crc32(read_sources(split))) for split in ("train", "val")]


def test_windows_cover_the_text_and_overlap_in_one_byte():
    text = bytes(range(50))
    windows = ByteWindows(text, length=7)
    inputs = b"".join(bytes(windows[i][:-1].tolist()) for i in range(len(windows)))
    targets = b"".join(bytes(windows[i][1:].tolist()) for i in range(len(windows)))
    assert inputs == text[:49]
    assert targets == text[1:50]


@pytest.mark.parametrize("size", [8, 14, 15, 16])
def test_every_window_has_the_full_length(size: int):
    windows = ByteWindows(bytes(size), length=7)
    assert {len(window) for window in windows} == {8}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ByteWindows(b"text", length=0), "length must be positive, got 0"),
        (lambda: ByteWindows(b"text", length=4), "text must be longer than length=4, got 4 bytes"),
        (lambda: read_sources("test"), "split must be 'train' or 'val', got 'test'"),
    ],
)
def test_invalid_arguments_raise_with_their_names(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_validation_windows_are_spread_over_all_files():
    data = SourceText(length=64, validation_samples=100)
    data.setup("fit")
    batches = list(data.val_dataloader())
    assert sum(map(len, batches)) == 100
    everything = SourceText(length=64, validation_samples=None)
    everything.setup("fit")
    step = len(everything.validation) / 100
    expected = torch.stack([everything.validation[int(i * step)] for i in range(100)])
    assert torch.equal(torch.cat(batches), expected)
