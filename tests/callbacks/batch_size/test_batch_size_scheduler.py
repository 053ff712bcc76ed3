"""BatchSizeScheduler in fits: the gradient of every update is the mean over its planned samples."""

from __future__ import annotations

import copy
import csv
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
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from lightning_bigopt import (
    BatchSizePolicy,
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    FullBatch,
    GlobalBatchLoader,
    GradientNoiseScale,
    LearningRateScheduler,
    Linear,
    NoiseScaleBatchSize,
    SingleSample,
)
from tests.batch_helpers import RAMP, UnsizedStream
from tests.helpers import QUIET, Probe, ResumableLoader, cpu_precision, fit, loader


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fused"])
def test_every_gradient_is_the_mean_over_its_window(precision: str, optimizer: str) -> None:
    """Windows of 1 to 5 micro-batches over three epochs, with partial windows and a short batch."""
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


def test_windows_are_as_planned_and_set_accumulate_grad_batches() -> None:
    module = Probe()
    policy = BatchSizeSteps({"0%": 4, "2 steps": 6, "50%": 2})
    fit(module, loader(20, 2), BatchSizeScheduler(policy), max_steps=6)
    assert [len(window) for window in module.windows] == [4, 4, 6, 2, 2, 2]
    assert module.accumulations == [2, 2, 2, 2, 3, 3, 3, 1, 1, 1]


def test_last_window_of_an_epoch_is_shorter() -> None:
    module = Probe()
    fit(module, loader(14, 2), BatchSizeScheduler(ConstantBatchSize(6)), max_epochs=2)
    assert [len(window) for window in module.windows] == [6, 6, 2] * 2
    assert module.accumulations == [3, 3, 3, 3, 3, 3, 1] * 2
    assert max(module.errors) <= 1e-6


@pytest.mark.parametrize("size", [13, 14, 17, 18])
def test_loader_without_length_may_end_inside_a_window(size: int) -> None:
    module = Probe(lr=0.01)
    fit(
        module,
        DataLoader(UnsizedStream(size), batch_size=2),
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


class SaveAtBatch(L.Callback):
    """Saves at a given batch, which may be inside a window."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if args[-1] == self.batch:
            trainer.save_checkpoint(self.path)


def test_checkpoint_inside_a_window_resumes_with_a_new_window(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, path = ConstantBatchSize(6), tmp_path / "inside.ckpt"
    fit(
        Probe(),
        ResumableLoader(24, 2),
        BatchSizeScheduler(policy),
        SaveAtBatch(path, 4),
        max_epochs=1,
    )
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


class TakesIterator(Probe):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        raise AssertionError


class DeepSpeedLike(SingleDeviceStrategy):
    """DeepSpeed strategies are recognized by their name."""


@pytest.mark.filterwarnings("ignore:You are using the .dataloader_iter. step")
def test_conflicts_and_unsupported_loops_raise_at_fit_start() -> None:
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
    with pytest.raises(ValueError, match="got one that takes dataloader_iter; write training_step"):
        run(module=TakesIterator())
    strategy = DeepSpeedLike(device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"DeepSpeedLike.*gradient_accumulation_steps"):
        run(strategy=strategy)


def test_impossible_batch_sizes_raise() -> None:
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
def test_fit_restores_accumulation_and_module(raises: bool) -> None:
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


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_epochs": 2, "max_steps": 5}, [4, 4, 4, 8, 8]),  # updates end it: half of 5
        ({"max_epochs": 2, "max_steps": 500}, [*[4] * 8, *[8] * 4]),  # epochs do: half of 64
        ({"fast_dev_run": 1}, [2]),
        ({"fast_dev_run": 3}, [4, 2]),
    ],
)
def test_percentages_refer_to_the_limit_that_ends_first(
    limits: dict[str, int], expected: list[int]
) -> None:
    module = Probe(lr=0.01)
    policy = BatchSizeSteps({"0%": 4, "50%": 8})
    if "fast_dev_run" in limits:  # durations of a long run are compressed
        policy = BatchSizeSteps({"0%": 4, "1000 steps": 8})
    fit(module, loader(32, 2), BatchSizeScheduler(policy), **limits)
    assert [len(w) for w in module.windows] == expected
    assert max(module.errors) <= 1e-6


BEYOND = r"global batch of 64 samples is larger than an epoch of 13 samples.*at most 13 samples"


@pytest.mark.parametrize("policy", [ConstantBatchSize(64), BatchSizeSteps({"0%": 4, "75%": 64})])
@pytest.mark.parametrize("is_exact", [False, True])
def test_batch_larger_than_an_epoch_warns_once_at_the_start(
    policy: BatchSizePolicy, is_exact: bool
) -> None:
    module = Probe(lr=0.01)
    data: Any = loader(13, 2)
    if is_exact:
        data = GlobalBatchLoader(data.dataset, micro_batch_size=2, shuffle="sequential")
    started: list[int] = []

    class Notes(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            started.append(len(caught))

    with pytest.warns(UserWarning, match=BEYOND) as caught:
        fit(module, data, BatchSizeScheduler(policy), Notes(), max_epochs=4)
    messages = [str(warning.message) for warning in caught]
    assert sum("is larger than an epoch" in message for message in messages) == 1
    assert started[0] >= 1  # before the first batch
    assert module.windows[-1] == list(range(13))
    assert max(module.errors) <= 1e-6


@pytest.mark.parametrize(
    "policy", [ConstantBatchSize(12), FullBatch(), BatchSizeSteps({"0%": 2, "50%": 14})]
)
def test_batch_of_a_whole_epoch_does_not_warn(
    policy: BatchSizePolicy, recwarn: pytest.WarningsRecorder
) -> None:
    fit(Probe(lr=0.01), loader(13, 2), BatchSizeScheduler(policy), max_epochs=2)
    assert not [warning for warning in recwarn if "larger than an epoch" in str(warning.message)]


def test_adaptive_batch_larger_than_an_epoch_warns_when_it_is_reached() -> None:
    with pytest.warns(UserWarning, match="global batch of 64 samples is larger than an epoch"):
        fit(
            Probe(lr=0.01),
            loader(13, 2),
            BatchSizeScheduler(Grows()),
            GradientNoiseScale(),
            max_epochs=4,
        )


class Grows(NoiseScaleBatchSize):
    """Returns 64 after the first epoch, whatever the noise scale."""

    def __init__(self) -> None:
        super().__init__(low=4, high=64)

    def __call__(self, progress: Any, *, context: Any) -> int:
        return 64 if progress.epochs >= 1 else 4


def test_full_batch_and_single_sample() -> None:
    whole, single = Probe(lr=0.01), Probe(lr=0.01)
    fit(whole, loader(13, 2), BatchSizeScheduler(FullBatch()), max_epochs=2)
    assert whole.windows == [list(range(13))] * 2
    fit(single, loader(5, 1), BatchSizeScheduler(SingleSample()), max_epochs=1)
    assert single.windows == [[0], [1], [2], [3], [4]]
    assert max(whole.errors + single.errors) <= 1e-6
    with pytest.raises(ValueError, match=r"SingleSample.*set micro_batch_size to 1"):
        fit(Probe(), loader(5, 2), BatchSizeScheduler(SingleSample()), max_epochs=1)
    data = DataLoader(UnsizedStream(5), batch_size=2)
    with pytest.raises(ValueError, match="samples_per_epoch must be known for FullBatch"):
        fit(Probe(), data, BatchSizeScheduler(FullBatch()), max_epochs=1)


def test_batch_smaller_than_one_micro_batch_raises() -> None:
    policy = BatchSizeSteps({"0%": 8, "50%": 2})
    with pytest.raises(ValueError, match=r"sizes\['50%'\] must be at least .* 4 × 1 = 4, got 2"):
        fit(Probe(), loader(16, 4), BatchSizeScheduler(policy), max_epochs=1)


def test_loader_above_max_micro_batch_size_raises() -> None:
    policy = ConstantBatchSize(8)
    capped = BatchSizeScheduler(policy, max_micro_batch_size=4)
    with pytest.raises(ValueError, match=r"at most max_micro_batch_size = 4, got 8.*GlobalBatch"):
        fit(Probe(), loader(16, 8), capped, max_epochs=1)
    module = Probe(lr=0.01)
    fit(module, loader(16, 4), BatchSizeScheduler(policy, max_micro_batch_size=4), max_epochs=1)
    assert [len(w) for w in module.windows] == [8, 8]
    with pytest.raises(ValueError, match="max_micro_batch_size must be a positive number"):
        BatchSizeScheduler(policy, max_micro_batch_size=0)


def test_batch_size_is_logged_without_a_monitor(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    policy = BatchSizeSteps({"0%": 2, "2 steps": 6})
    options: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1, "max_steps": 4}
    fit(Probe(lr=0.001), loader(40, 2), BatchSizeScheduler(policy, lr_scaling="linear"), **options)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["batch/planned_size"]) for row in rows] == [2, 2, 6, 6]
    assert [float(row["batch/lr_factor"]) for row in rows] == [1, 1, 3, 3]
