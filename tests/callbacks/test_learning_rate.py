"""LearningRateScheduler in fits: the fraction of the budget, resume, and conflicts."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from lightning_bigopt import Cosine, LearningRateScheduler, Linear, WarmupStableDecay
from tests.helpers import ManualLayers, Probe, Regression, ResumableLoader, fit, loader

DOWN = Linear(start=1.0, end=0.0)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_update_t_gets_t_over_max_steps(accumulate: int) -> None:
    module = Probe(lr=2.0)
    fit(
        module,
        loader(20, 2),
        LearningRateScheduler(DOWN),
        max_steps=7,
        accumulate_grad_batches=accumulate,
    )
    assert module.lrs == [2.0 * (1 - t / 7) for t in range(7)]


def test_updates_get_the_fraction_of_batches_consumed_under_max_epochs() -> None:
    module = Probe(lr=1.0)
    # 5 batches an epoch in windows of 2: the last window of an epoch holds one batch.
    fit(module, loader(10, 2), LearningRateScheduler(DOWN), max_epochs=2, accumulate_grad_batches=2)
    assert module.lrs == [1 - consumed / 10 for consumed in (0, 2, 4, 5, 7, 9)]


def test_limit_train_batches_shortens_the_budget() -> None:
    module = Probe(lr=1.0)
    fit(module, loader(20, 2), LearningRateScheduler(DOWN), max_epochs=2, limit_train_batches=4)
    assert module.lrs == [1 - t / 8 for t in range(8)]


@pytest.mark.parametrize(
    ("limits", "updates"),
    [({"max_steps": 4, "max_epochs": 3}, 4), ({"max_steps": 40, "max_epochs": 1}, 5)],
)
def test_the_limit_that_ends_first_sets_the_budget(limits: dict[str, int], updates: int) -> None:
    module = Probe(lr=1.0)
    fit(module, loader(10, 2), LearningRateScheduler(DOWN), **limits)
    assert module.lrs == [1 - t / updates for t in range(updates)]


class EndlessStream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        data = Regression(8)
        while True:
            for index in range(8):
                yield data[index]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_budget_in_samples_ends_an_endless_stream(accumulate: int) -> None:
    module = Probe(lr=1.0)
    trainer = fit(
        module,
        DataLoader(EndlessStream(), batch_size=3),
        LearningRateScheduler(DOWN, budget="20 samples"),
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
    )
    each = 3 * accumulate
    starts = [s for s in range(0, 100, each) if s < 20]
    assert module.lrs == [1 - s / 20 for s in starts]
    assert trainer.global_step == len(starts)


def test_budget_in_tokens_uses_the_given_function() -> None:
    module = Probe(lr=1.0)
    fit(
        module,
        loader(10, 2),
        LearningRateScheduler(DOWN, budget="50 tokens", tokens=lambda batch: 7 * len(batch[0])),
        max_epochs=-1,
    )
    assert module.lrs == [1 - 14 * t / 50 for t in range(4)]


def test_unknown_length_raises_and_names_budget() -> None:
    with pytest.raises(ValueError, match=r"length of the training must be known.*budget="):
        fit(
            Probe(),
            DataLoader(EndlessStream(), batch_size=3),
            LearningRateScheduler(DOWN),
            max_epochs=3,
        )


def test_learning_rate_monitor_logs_the_same_values(tmp_path: Path) -> None:
    module, logger = Probe(lr=1.0), CSVLogger(tmp_path)
    fit(
        module,
        loader(12, 2),
        LearningRateScheduler(DOWN),
        LearningRateMonitor(),
        max_steps=6,
        logger=logger,
        log_every_n_steps=1,
    )
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        seen = [float(row["lr-SGD"]) for row in csv.DictReader(file)]
    assert seen == module.lrs


def test_scheduler_of_the_module_raises_or_is_replaced() -> None:
    class Scheduled(Probe):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.raises(ValueError, match=r"StepLR.*module_scheduler='replace'"):
        fit(Scheduled(), loader(8, 2), LearningRateScheduler(DOWN), max_steps=4)
    module = Scheduled(lr=1.0)
    fit(module, loader(8, 2), LearningRateScheduler(DOWN, module_scheduler="replace"), max_steps=4)
    assert module.lrs == [1.0, 0.75, 0.5, 0.25]


def test_two_optimizers_under_manual_optimization_are_scheduled() -> None:
    module = ManualLayers(partial(torch.optim.SGD, lr=1.0), partial(torch.optim.Adam, lr=0.1))
    fit(module, loader(8, 2), LearningRateScheduler(DOWN), max_epochs=1)
    assert module.seen == [(1 - t / 4, 0.1 * (1 - t / 4)) for t in range(4)]


@pytest.mark.parametrize("limits", [{"max_steps": 11}, {"max_epochs": 3}])
@pytest.mark.parametrize("stop", [2, 4, 5, 7])
def test_resume_gives_the_same_learning_rates_and_weights_to_the_bit(
    tmp_path: Path, limits: dict[str, int], stop: int
) -> None:
    def build() -> tuple[Probe, LearningRateScheduler, ResumableLoader]:
        schedule = WarmupStableDecay(warmup="20%", decay="50%")
        return (
            Probe(optimizer=torch.optim.AdamW),
            LearningRateScheduler(schedule),
            ResumableLoader(8, 2),
        )

    straight, scheduler, data = build()
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(straight, data, scheduler, checkpoint, enable_checkpointing=True, **limits)

    resumed, scheduler, data = build()
    fit(resumed, data, scheduler, ckpt_path=tmp_path / f"step={stop}.ckpt", **limits)
    assert resumed.lrs == straight.lrs[stop:]
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_resume_with_a_longer_limit_keeps_the_horizon_unless_extended(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(
        Probe(lr=1.0),
        loader(8, 2),
        LearningRateScheduler(DOWN),
        checkpoint,
        max_steps=4,
        enable_checkpointing=True,
    )
    path = tmp_path / "step=2.ckpt"
    kept = Probe(lr=1.0)
    with pytest.warns(UserWarning, match=r"trained for 4 steps.*8 steps.*on_resume='extend'"):
        fit(kept, ResumableLoader(8, 2), LearningRateScheduler(DOWN), max_steps=8, ckpt_path=path)
    assert kept.lrs == [0.5, 0.25, 0.0, 0.0, 0.0, 0.0]
    extended = Probe(lr=1.0)
    with pytest.warns(UserWarning, match=r"jumps when the run is resumed: 0\.5 → 0\.75 \(× 1\.5\)"):
        fit(
            extended,
            ResumableLoader(8, 2),
            LearningRateScheduler(DOWN, on_resume="extend"),
            max_steps=8,
            ckpt_path=path,
        )
    assert extended.lrs == [1 - t / 8 for t in range(2, 8)]


def test_checkpoint_of_another_scheduler_warns_and_uses_the_configured_learning_rate(
    tmp_path: Path,
) -> None:
    class Scheduled(Probe):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)
    fit(Scheduled(lr=9.0), loader(8, 2), checkpoint, max_steps=2, enable_checkpointing=True)
    module = Probe(lr=1.0)
    with pytest.warns(UserWarning, match="another learning-rate scheduler"):
        fit(
            module,
            ResumableLoader(8, 2),
            LearningRateScheduler(DOWN),
            max_steps=4,
            ckpt_path=tmp_path / "step=2.ckpt",
        )
    assert module.lrs == [0.5, 0.25]


def test_fast_dev_run_compresses_durations() -> None:
    module = Probe(lr=1.0)
    schedule = WarmupStableDecay(warmup=500, decay=1000)
    fit(module, loader(8, 2), LearningRateScheduler(schedule), fast_dev_run=True)
    assert len(module.lrs) == 1


def test_warmup_longer_than_the_run_raises() -> None:
    with pytest.raises(ValueError, match=r"warmup.*500"):
        fit(
            Probe(), loader(8, 2), LearningRateScheduler(WarmupStableDecay(warmup=500)), max_steps=4
        )


def test_second_fit_continues_and_a_new_trainer_starts_again() -> None:
    callback, module = LearningRateScheduler(Cosine(end=0.0)), Probe(lr=1.0)
    trainer = fit(module, loader(8, 2), callback, max_epochs=1)
    first = list(module.lrs)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(8, 2))
    curve = Cosine(end=0.0)
    assert first == [curve(t / 4) for t in range(4)]
    assert module.lrs[4:] == [curve(t / 8) for t in range(4, 8)]
    again = Probe(lr=1.0)
    fit(again, loader(8, 2), callback, max_epochs=1)
    assert again.lrs == first


def test_invalid_arguments_raise_with_their_names() -> None:
    with pytest.raises(ValueError, match=r"schedule must be a Schedule, got 'cosine'"):
        LearningRateScheduler("cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"module_scheduler must be .*got 'keep'"):
        LearningRateScheduler(DOWN, module_scheduler="keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"budget must be .*got '10%'"):
        LearningRateScheduler(DOWN, budget="10%")
    with pytest.raises(ValueError, match=r"tokens must be given.*'2e9 tokens'"):
        LearningRateScheduler(DOWN, budget="2e9 tokens")
