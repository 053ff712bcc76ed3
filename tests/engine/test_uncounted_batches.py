"""Batches whose samples cannot be counted: features without sample counts train unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GradientClipping,
    GradientNoiseScale,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    LossSpike,
    NormClip,
    OptimizationMonitor,
    StepGuard,
)
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import QUIET, SaveAt

SAMPLES_TAGS = {
    "batch/global_size",
    "batch/micro_size",
    "progress/samples",
    "throughput/samples_per_second",
}
NO_TENSOR: dict[str, list[Any]] = {
    "int": [1, 2, 3, 4],
    "string": ["a", "bb", "ccc", "dddd"],
    "list of strings": [["a"], ["b"], ["c"], ["d"]],
    "dict": [{"text": "a"}] * 4,
    "scalar tensor": list(torch.arange(4.0)),
    "tuple": [(1, "a")] * 4,
}


class Plain:
    """A loader without a ``batch_size``."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Constants(L.LightningModule):
    """Its loss does not depend on the contents of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(3, 1)
        self.rates: list[float] = []

    def loss(self) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.layer(torch.ones(2, 3)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


class Fetches(Constants):
    """Fetches its batches itself."""

    def __init__(self, each: int = 1) -> None:
        super().__init__()
        self.each = each

    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        for _ in range(self.each):
            next(dataloader_iter)
        return self.loss()


def callbacks() -> list[Any]:
    return [
        LearningRateScheduler(Linear()),
        HyperparameterScheduler("momentum", Linear()),
        GradientClipping(NormClip(1e-2)),
        StepGuard(),
        OptimizationMonitor(every=1),
    ]


def trainer(*listed: Any, **options: Any) -> L.Trainer:
    return L.Trainer(**{**QUIET, "max_epochs": 2, **options}, callbacks=list(listed))


@pytest.mark.parametrize("batches", NO_TENSOR.values(), ids=NO_TENSOR)
def test_batches_without_a_tensor_train_and_leave_samples_out_of_the_log(
    batches: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    module, logger = Constants(), CSVLogger(tmp_path)
    trainer(*callbacks(), logger=logger).fit(module, Plain(batches))
    assert module.rates == [0.1 * (1 - t / 8) for t in range(8)]
    # The same run on batches with a known size.
    counted = Constants()
    trainer(*callbacks()).fit(counted, Plain([torch.ones(2)] * 4))
    for mine, other in zip(module.parameters(), counted.parameters(), strict=True):
        assert torch.equal(mine, other)
    logged = set(read_run(logger.log_dir).curves)
    assert logged & SAMPLES_TAGS == set()
    assert {"optim/lr", "grad_norm/total", "batch/accumulate", "time/step_median"} <= logged
    lines = [r.getMessage() for r in caplog.records if "cannot be counted" in r.getMessage()]
    assert len(lines) == 1  # not a line for each batch or epoch


def test_one_batch_that_cannot_be_counted_ends_the_count(tmp_path: Path) -> None:
    module, logger = Constants(), CSVLogger(tmp_path)
    batches = Plain([torch.ones(2), torch.ones(3), "text", torch.ones(2)])
    trainer(OptimizationMonitor(every=1), logger=logger, max_epochs=1).fit(module, batches)
    curves = read_run(logger.log_dir).curves
    assert [value for _, value in curves["progress/samples"]] == [2, 5]
    assert [value for _, value in curves["batch/global_size"]] == [2, 3]
    assert len(curves["grad_norm/total"]) == 4


def test_a_guard_weighs_uncounted_batches_equally() -> None:
    class Jumps(Constants):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss() + (1e6 if self.global_step == 12 and batch_idx % 2 else 0.0)

    guard = StepGuard([LossSpike(armed=8)])
    trainer(guard, max_steps=14, max_epochs=1, accumulate_grad_batches=2).fit(
        Jumps(), Plain(["text"] * 28)
    )
    (rejected,) = guard.rejections
    assert rejected.update == 12
    assert rejected.loss == pytest.approx(5e5, rel=1e-3)  # the mean of two micro-batches


@pytest.mark.parametrize(
    "needs_samples",
    [
        LearningRateScheduler(Linear(), budget="100 samples"),
        LearningRateScheduler(Linear(), samples="text"),
        GradientNoiseScale(),
        BatchSizeScheduler(ConstantBatchSize(2), micro_batch_size=1),
        OptimizationMonitor(x_axis="samples"),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_what_needs_samples_refuses(needs_samples: Any) -> None:
    module = Constants()
    with pytest.raises(ValueError, match=r"samples must be .*got .*; (pass samples=|write lambda)"):
        trainer(needs_samples).fit(module, Plain(["a"] * 4))
    assert module.rates == []


def test_samples_counted_by_a_function_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    monitor = OptimizationMonitor(every=1, samples=len)
    trainer(monitor, logger=logger, max_epochs=1).fit(Constants(), Plain(NO_TENSOR["string"]))
    samples = read_run(logger.log_dir).curves["progress/samples"]
    assert [value for _, value in samples] == [1, 3, 6, 10]


@pytest.mark.filterwarnings("ignore:(Found|You are using the) `dataloader_iter`")
@pytest.mark.parametrize("each", [1, 2])
def test_dataloader_iter_trains_as_without_the_package(each: int, tmp_path: Path) -> None:
    """The batches are fetched in the step; their hooks receive the batch before."""
    batches = [torch.ones(2)] * 8
    module, bare, logger = Fetches(each), Fetches(each), CSVLogger(tmp_path)
    monitor = OptimizationMonitor(every=1)
    options: dict[str, Any] = {"max_steps": 6, "max_epochs": -1}
    trainer(monitor, StepGuard(), logger=logger, **options).fit(module, Plain(batches))
    trainer(**options).fit(bare, Plain(batches))
    for mine, other in zip(module.parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert len(module.rates) == len(bare.rates) == 6
    logged = set(read_run(logger.log_dir).curves)
    assert logged & SAMPLES_TAGS == set()
    assert "grad_norm/total" in logged


@pytest.mark.filterwarnings("ignore:(Found|You are using the) `dataloader_iter`")
@pytest.mark.parametrize(
    "callback",
    [
        LearningRateScheduler(Linear(), budget="8 samples"),
        OptimizationMonitor(tokens=len),
        GradientNoiseScale(),
    ],
    ids=["budget", "tokens", "noise_scale"],
)
def test_dataloader_iter_is_refused_where_batches_are_counted(callback: Any) -> None:
    module = Fetches()
    with pytest.raises(ValueError, match=r"training_step must take a batch for .*dataloader_iter"):
        trainer(callback).fit(module, Plain([torch.ones(2)] * 8))
    assert module.rates == []


def test_budget_in_samples_refuses_a_checkpoint_that_did_not_count_them(tmp_path: Path) -> None:
    path = tmp_path / "2.ckpt"
    trainer(GradientClipping(NormClip(1.0)), SaveAt(path, 2)).fit(Constants(), Plain(["a"] * 4))
    resumed = trainer(
        LearningRateScheduler(Linear(), budget="100 samples", samples=len, on_resume="extend")
    )
    with pytest.raises(ValueError, match="samples must be counted from the beginning"):
        resumed.fit(Constants(), Plain(["a"] * 4), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("counts", [True, False])
def test_resume_logs_the_samples_of_the_whole_run_or_none(counts: bool, tmp_path: Path) -> None:
    path, logger = tmp_path / "2.ckpt", CSVLogger(tmp_path)
    first = OptimizationMonitor() if counts else StepGuard()
    trainer(first, SaveAt(path, 2)).fit(Constants(), Plain([torch.ones(2)] * 4))
    resumed = trainer(OptimizationMonitor(every=1), logger=logger)
    with pytest.warns(UserWarning, match="You're resuming|dataloader"):
        resumed.fit(Constants(), Plain([torch.ones(2)] * 4), ckpt_path=path, weights_only=True)
    curves = read_run(logger.log_dir).curves
    assert curves["batch/global_size"][0][1] == 2
    assert ("progress/samples" in curves) is counts
    if counts:
        assert curves["progress/samples"][0][1] == 6
