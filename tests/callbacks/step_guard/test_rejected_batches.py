"""The indices of rejected batches after a resume, compared with data that carries its index."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GlobalBatchLoader,
    StepGuard,
)
from tests.helpers import Probe, Regression, ResumableLoader, fit, loader

SIZE, MICRO = 26, 2


class AlwaysBad(Probe):
    """Records epoch, ``batch_idx`` and first sample of every batch; its loss is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, int, int]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.batches.append((self.current_epoch, batch_idx, int(batch[2][0])))
        return self.loss(batch[0], batch[1]) * math.nan

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None: ...


class SavesEveryBatch(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.count += 1
        trainer.save_checkpoint(self.folder / f"{self.count}.ckpt")


def exact(size: int = SIZE) -> GlobalBatchLoader:
    return GlobalBatchLoader(Regression(size), micro_batch_size=MICRO, shuffle="sequential")


LOADERS = {
    "DataLoader": lambda: loader(SIZE, MICRO),
    "saved position": lambda: ResumableLoader(SIZE, MICRO),
    "GlobalBatchLoader": exact,
}
SIZES = {
    "constant": lambda: [BatchSizeScheduler(ConstantBatchSize(3 * MICRO))],
    "steps": lambda: [BatchSizeScheduler(BatchSizeSteps({"0%": 4, "3 steps": 8, "5 steps": 12}))],
    "Trainer": list,
}
CASES = [
    (data, sizes)
    for data in LOADERS
    for sizes in SIZES
    if (data, sizes) != ("GlobalBatchLoader", "Trainer")
]


def train(data: str, sizes: str, *callbacks: Any, **options: Any) -> tuple[AlwaysBad, StepGuard]:
    module, guard = AlwaysBad(), StepGuard(max_consecutive=999)
    if sizes == "Trainer":
        options["accumulate_grad_batches"] = 3
    scheduler = SIZES[sizes]()
    fit(module, LOADERS[data](), guard, *scheduler, *callbacks, max_epochs=2, **options)
    return module, guard


def reported(guard: StepGuard) -> Iterator[tuple[int, int]]:
    """Yields epoch and index of all rejected batches."""
    for update in guard.rejections:
        assert update.worst[0][1] == update.batches[0]  # the first NaN of the window
        for index in update.batches:
            yield update.epoch, index


@pytest.mark.slow
@pytest.mark.parametrize(("data", "sizes"), CASES)
def test_indices_after_a_resume_are_those_of_the_data(
    data: str, sizes: str, tmp_path: Path
) -> None:
    straight, guard = train(data, sizes, SavesEveryBatch(tmp_path))
    index_of = {(epoch, sample): index for epoch, index, sample in straight.batches}
    assert list(reported(guard)) == [(epoch, index) for epoch, index, _ in straight.batches]
    count = len(straight.batches)
    for saved in range(1, count):
        module, guard = train(data, sizes, ckpt_path=tmp_path / f"{saved}.ckpt")
        if data == "DataLoader":  # it starts again, while Lightning continues to count
            expected = [(epoch, index) for epoch, index, _ in module.batches]
        else:
            expected = [(epoch, index_of[epoch, sample]) for epoch, _, sample in module.batches]
            assert (
                expected == [(e, index_of[e, s]) for e, _, s in straight.batches][-len(expected) :]
            )
        assert list(reported(guard)) == expected, saved


def test_indices_after_two_resumes_within_an_epoch(tmp_path: Path) -> None:
    straight, _ = train("GlobalBatchLoader", "constant", SavesEveryBatch(tmp_path))
    index_of = {(epoch, sample): index for epoch, index, sample in straight.batches}
    second = SavesEveryBatch(tmp_path)
    second.count = 100
    train("GlobalBatchLoader", "constant", second, ckpt_path=tmp_path / "2.ckpt")
    # Updates end at batches 3 and 6: the checkpoint is the second batch of the second window.
    module, guard = train("GlobalBatchLoader", "constant", ckpt_path=tmp_path / "105.ckpt")
    assert [index_of[e, s] for e, _, s in module.batches][:3] == [3, 4, 5]
    assert list(reported(guard)) == [(e, index_of[e, s]) for e, _, s in module.batches]


def test_indices_after_an_interrupt_and_a_second_fit() -> None:
    class Interrupts(L.Callback):
        at = 4

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.at -= 1
            if not self.at:
                raise KeyboardInterrupt

    data, module, guard = exact(), AlwaysBad(), StepGuard(max_consecutive=999)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=2,
        callbacks=[guard, BatchSizeScheduler(ConstantBatchSize(3 * MICRO)), Interrupts()],
    )
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module, data)
    before = len(module.batches)
    trainer.fit(module, data)
    assert module.batches[before][2] == 3 * MICRO  # the second window again
    found = list(reported(guard))
    assert [index for _, index in found][:9] == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_loader_of_an_older_checkpoint_counts_from_the_resume() -> None:
    data = exact()
    state = {"version": 1, "epoch": 1, "position": 12, "seed": 0, "samples": SIZE}
    data.load_state_dict(state)
    next(iter(data))
    assert data.micro_batch(0).epoch_index == 0
