"""Checksums of event files: equal to those of TensorBoard, for every length."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as usual_crc32c
from torch.utils.tensorboard import SummaryWriter

from lightning_bigopt import OptimizationMonitor
from lightning_bigopt.monitoring import event_records
from lightning_bigopt.monitoring.event_records import crc32c, fast_checksums, usual_checksums
from lightning_bigopt.monitoring.tensorboard import write_scalars
from tests.helpers import fit, loader
from tests.monitoring.helpers import Blocks


@pytest.mark.parametrize("length", [*range(4, 70), 127, 128, 129, 1023, 1025, 4096, 61_237])
def test_checksum_equals_that_of_tensorboard(length: int) -> None:
    data = random.Random(length).randbytes(length)
    assert crc32c(data) == usual_crc32c(data)
    assert crc32c(bytes(length)) == usual_crc32c(bytes(length))
    assert crc32c(b"\xff" * length) == usual_crc32c(b"\xff" * length)


def contents(folder: Path, count: int) -> bytes:
    with SummaryWriter(str(folder)) as writer:
        for step in range(3):
            write_scalars(writer, {f"tag/{i}": i / 7 for i in range(count)}, step=step)
    (file,) = folder.glob("events*")
    return file.read_bytes()


@pytest.mark.parametrize("count", [1, 20, 1000])
def test_file_is_the_same(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The times of the events are equal, too.
    monkeypatch.setattr("time.time", lambda: 1.5e9)
    calls: list[int] = []

    def counted(data: bytes) -> int:
        calls.append(len(data))
        return crc32c(data)

    monkeypatch.setattr(event_records, "crc32c", counted)
    ours = contents(tmp_path / "ours", count)
    assert len(calls) == (3 if count == 1000 else 0)  # the data of three events
    monkeypatch.setattr(event_records, "_LARGE", 1 << 30)
    assert contents(tmp_path / "usual", count) == ours


def test_writer_is_released_after_a_fit(tmp_path: Path) -> None:
    logger, kinds = TensorBoardLogger(tmp_path), []

    class Looks(Blocks):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            kinds.append(records())
            return super().training_step(batch, batch_idx)

    def records() -> bool:
        files: Any = logger.experiment._get_file_writer()
        return "write" in vars(files.event_writer._async_writer._writer)

    fit(Looks(lr=1e-3), loader(12, 4), OptimizationMonitor(every=1), max_epochs=1, logger=logger)
    assert kinds[1:] == [True] * 2
    assert not records()


def test_other_writers_are_left_unchanged() -> None:
    class Other:
        pass

    fast_checksums(Other())
    usual_checksums(Other())
