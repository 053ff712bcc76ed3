"""BatchSizeScheduler in real fits: every update's gradient is the mean over its planned samples."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch.utils.data import DataLoader, IterableDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    LearningRateScheduler,
    Linear,
)
from tests.kit import QUIET, Probe, Regression, ResumableLoader, cpu_precision, loader


def fit(
    module: L.LightningModule, data: Any, *callbacks: Any, ckpt_path: Any = None, **options: Any
) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, "callbacks": list(callbacks), **options})
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def steps(**sizes: int) -> BatchSizeSteps:
    return BatchSizeSteps({f"{n.removeprefix('at')} steps": size for n, size in sizes.items()})


RAMP = BatchSizeSteps(
    {
        "0%": 2,
        "1 steps": 4,
        "2 steps": 6,
        "3 steps": 10,
        "4 steps": 8,
        "5 steps": 2,
        "6 steps": 8,
        "7 steps": 4,
        "9 steps": 10,
        "10 steps": 6,
    }
)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fused"])
def test_every_gradient_is_the_mean_over_its_window(precision: str, optimizer: str) -> None:
    """Windows 1, 2, 3, 5, 4, 1, 4, 2, 5, 3 with tails and a short last batch, over three epochs."""
    options: dict[str, Any] = {"lr": 0.01}
    if optimizer != "sgd":
        options |= {"optimizer": torch.optim.AdamW, "fused": optimizer == "fused"}
    module = Probe(**options)
    trainer = fit(
        module, loader(27, 2), BatchSizeScheduler(RAMP), max_epochs=3, **cpu_precision(precision)
    )
    assert len(module.windows) == trainer.global_step
    assert max(module.errors) <= (1e-6 if precision == "32-true" else 2e-2)
    for epoch_of in range(3):  # every sample once an epoch, in order
        seen = [i for window in module.windows for i in window][27 * epoch_of : 27 * (epoch_of + 1)]
        assert seen == list(range(27))


def test_the_windows_are_the_planned_ones_and_the_trainer_shows_them() -> None:
    module = Probe()
    policy = BatchSizeSteps({"0%": 4, "2 steps": 6, "50%": 2})
    fit(module, loader(20, 2), BatchSizeScheduler(policy), max_steps=6)
    assert [len(window) for window in module.windows] == [4, 4, 6, 2, 2, 2]
    assert module.accumulations == [2, 2, 2, 2, 3, 3, 3, 1, 1, 1]


def test_the_tail_of_an_epoch_is_a_shorter_window_known_in_advance() -> None:
    module = Probe()
    fit(module, loader(14, 2), BatchSizeScheduler(ConstantBatchSize(6)), max_epochs=2)
    assert [len(window) for window in module.windows] == [6, 6, 2] * 2
    assert module.accumulations == [3, 3, 3, 3, 3, 3, 1] * 2
    assert max(module.errors) <= 1e-6


class Unsized(IterableDataset[Any]):
    def __init__(self, size: int) -> None:
        self.data = Regression(size)

    def __iter__(self) -> Any:
        return (self.data[i] for i in range(len(self.data)))


@pytest.mark.parametrize("size", [13, 14, 17, 18])
def test_a_loader_without_length_may_end_inside_a_window(size: int) -> None:
    module = Probe(lr=0.01)
    fit(
        module,
        DataLoader(Unsized(size), batch_size=2),
        BatchSizeScheduler(ConstantBatchSize(8), budget=f"{2 * size} samples"),
        max_epochs=2,
    )
    assert max(module.errors) <= 1e-6
    assert sum(map(len, module.windows)) == 2 * size


def test_validation_inside_a_window_changes_nothing() -> None:
    plain, validated = Probe(), Probe()
    validated.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    fit(plain, loader(20, 2), BatchSizeScheduler(ConstantBatchSize(6)), max_epochs=2)
    trainer = L.Trainer(
        **{
            **QUIET,
            "max_epochs": 2,
            "val_check_interval": 2,
            "callbacks": [BatchSizeScheduler(ConstantBatchSize(6))],
        }
    )
    trainer.fit(validated, loader(20, 2), loader(4, 2))
    assert plain.windows == validated.windows
    for mine, theirs in zip(plain.parameters(), validated.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resume_across_batch_size_steps_is_exact(tmp_path: Path, stop: int) -> None:
    def build() -> tuple[Probe, list[Any], ResumableLoader]:
        policy = BatchSizeSteps({"0%": 4, "25%": 8, "50%": 6, "3 epochs": 2})
        return (
            Probe(optimizer=torch.optim.AdamW),
            [BatchSizeScheduler(policy), LearningRateScheduler(Linear(start=1.0, end=0.1))],
            ResumableLoader(16, 2),
        )

    straight, callbacks, data = build()
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(straight, data, *callbacks, checkpoint, enable_checkpointing=True, max_epochs=4)
    resumed, callbacks, data = build()
    fit(resumed, data, *callbacks, ckpt_path=tmp_path / f"step={stop}.ckpt", max_epochs=4)
    assert resumed.windows == straight.windows[stop:]
    assert resumed.lrs == straight.lrs[stop:]
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class SaveAt(L.Callback):
    """Saves at any batch, inside a window too."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if args[-1] == self.batch:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_inside_a_window_opens_a_whole_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, path = ConstantBatchSize(6), tmp_path / "inside.ckpt"
    fit(Probe(), ResumableLoader(24, 2), BatchSizeScheduler(policy), SaveAt(path, 4), max_epochs=1)
    resumed = Probe()
    with caplog.at_level("INFO"):
        fit(
            resumed,
            ResumableLoader(24, 2),
            BatchSizeScheduler(policy),
            max_epochs=1,
            ckpt_path=path,
        )
    assert resumed.windows == [list(range(10, 16)), list(range(16, 22)), [22, 23]]
    assert max(resumed.errors) <= 1e-6
    assert "inside a window (2 of 3 micro-batches)" in caplog.text


def test_two_owners_and_unsupported_loops_raise_at_fit_start() -> None:
    def run(*callbacks: Any, module: Any = None, **options: Any) -> None:
        fit(
            module or Probe(),
            loader(8, 2),
            BatchSizeScheduler(ConstantBatchSize(4)),
            *callbacks,
            **{"max_epochs": 1, **options},
        )

    with pytest.raises(ValueError, match=r"accumulate_grad_batches must be 1.*got 2"):
        run(accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="GradientAccumulationScheduler"):
        run(GradientAccumulationScheduler({0: 1}))
    with pytest.raises(ValueError, match="StochasticWeightAveraging"):
        run(StochasticWeightAveraging(swa_lrs=0.1))
    manual = Probe()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization must be True"):
        run(module=manual)


def test_batches_that_no_window_can_hold_raise() -> None:
    for size in (5, 1):
        with pytest.raises(ValueError, match=rf"{size}"):
            fit(Probe(), loader(8, 2), BatchSizeScheduler(ConstantBatchSize(size)), max_epochs=1)
    with pytest.raises(ValueError, match="policy must be a BatchSizePolicy, got 64"):
        BatchSizeScheduler(64)  # type: ignore[arg-type]
    for bad in (0, -4):
        with pytest.raises(ValueError, match=str(bad)):
            ConstantBatchSize(bad)
    with pytest.raises(ValueError, match="got"):
        BatchSizeSteps({})


@pytest.mark.parametrize("raises", [False, True])
def test_a_fit_leaves_no_trace(raises: bool) -> None:
    class Failing(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if raises and batch_idx == 3:
                raise ArithmeticError("on purpose")
            return super().training_step(batch, batch_idx)

    module, trainer = (
        Failing(),
        L.Trainer(**QUIET, max_epochs=1, callbacks=[BatchSizeScheduler(ConstantBatchSize(4))]),
    )
    before = set(module.__dict__)
    try:
        trainer.fit(module, loader(12, 2))
    except ArithmeticError:
        assert raises
    assert trainer.accumulate_grad_batches == 1
    assert type(trainer.accumulate_grad_batches) is int
    assert set(module.__dict__) - before <= {"_hparams"}  # Lightning's own
    assert copy.deepcopy(module).net is not module.net
