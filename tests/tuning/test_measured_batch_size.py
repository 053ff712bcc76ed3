"""MeasuredBatchSize trains as the same sizes written in advance, and resumes to the bit."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GlobalBatchLoader,
    GradientClipping,
    LearningRateScheduler,
    MeasuredBatchSize,
    OptimizationMonitor,
    PiecewiseLinear,
    StepGuard,
    WarmupStableDecay,
    ZClip,
)
from tests.helpers import QUIET, cpu_precision

pytestmark = pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning")

ALWAYS, NEVER = 1e9, 1e-9
SAMPLES, EPOCHS = 480, 2


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.rates: list[float] = []
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(x.clone())
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def dataset() -> TensorDataset:
    x = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.sum(1, keepdim=True))


def data(**options: Any) -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size=8, **{"shuffle": True, **options})


def measured(tolerance: float = ALWAYS, **options: Any) -> MeasuredBatchSize:
    given = {"high": 32, "check_every": "20%", "window": "5%", "evaluate": 4, **options}
    return MeasuredBatchSize(8, tolerance=tolerance, **given)


def others() -> list[Any]:
    return [
        LearningRateScheduler(WarmupStableDecay(warmup="5%", decay="20%")),
        GradientClipping(ZClip()),
        StepGuard(),
    ]


def fit(*callbacks: Any, module: Any = None, **options: Any) -> Model:
    module = module or Model()
    torch.manual_seed(3)
    given = {**QUIET, "max_epochs": EPOCHS, "callbacks": [*others(), *callbacks], **options}
    trainer = L.Trainer(**given)
    trainer.fit(module, data())
    module.updates = trainer.global_step
    module.optimizer_state = trainer.optimizers[0].state_dict()
    return module


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("budget", [None, "960 samples"])
def test_equals_the_same_sizes_written_in_advance_to_the_bit(
    precision: str, budget: str | None
) -> None:
    policy = measured(budget=budget)
    limits = {"max_epochs": -1 if budget else EPOCHS}
    ours = fit(policy, **limits, **cpu_precision(precision))
    at = [samples for samples, _ in policy.measurements]
    assert [found.batch_size for _, found in policy.measurements] == [8, 16]
    assert at == [192, 384]  # 20 % and 40 % of 960 samples
    sizes = BatchSizeSteps({"0%": 8, "192 samples": 16, "384 samples": 32})
    steps = BatchSizeScheduler(sizes, lr_scaling="sqrt", budget=budget)
    theirs = fit(steps, **limits, **cpu_precision(precision))
    assert ours.updates == theirs.updates == 24 + 12 + 18
    assert ours.rates == pytest.approx(theirs.rates, rel=1e-12)
    torch.testing.assert_close(ours.seen, theirs.seen, rtol=0, atol=0)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(ours.optimizer_state, theirs.optimizer_state, rtol=0, atol=0)


def test_batch_is_kept_if_a_larger_one_costs_more_than_the_tolerance() -> None:
    policy = measured(NEVER)
    module = fit(policy)
    assert module.updates == 120
    assert [round(samples / 960, 3) for samples, _ in policy.measurements] == [0.2, 0.4, 0.6, 0.8]
    assert {found.batch_size for _, found in policy.measurements} == {8}
    assert all(found.verdicts[-1] != "within" for _, found in policy.measurements)


def test_logs_cost_and_samples_of_the_branches(tmp_path: Path) -> None:
    policy, logger = measured(), CSVLogger(tmp_path)
    fit(policy, OptimizationMonitor(), logger=logger, log_every_n_steps=1)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["batch/doubling_cost"]]
    values = rows[-1]
    found = [result for _, result in policy.measurements]
    assert float(values["batch/branch_samples"]) == sum(result.samples for result in found)
    assert float(values["batch/doubling_cost"]) == pytest.approx(found[-1].differences[-1])
    assert float(values["batch/planned_size"]) == 32
    # Windows of 5 % of 960 samples, of which the second is lengthened to four updates of 32.
    assert [result.window for result in found] == [64, 128]
    assert [result.samples for result in found] == [2 * (64 + 32), 2 * (128 + 32)]


class Dies(L.Callback):
    """Ends the process's fit after some updates, as a kill would."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.update:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("update", [10, 23, 24, 30, 36, 40])
def test_killed_and_resumed_run_equals_an_uninterrupted_one(update: int, tmp_path: Path) -> None:
    """Updates 24 and 36 are those before the measurements."""

    def saves() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")

    def run(*callbacks: Any, policy: Any, **options: Any) -> Any:
        module = Model()
        quiet = {**QUIET, "enable_checkpointing": bool(callbacks), "max_epochs": EPOCHS}
        trainer = L.Trainer(**quiet, callbacks=[*others(), policy, *callbacks])
        loader = sequential_loader()
        try:
            trainer.fit(module, loader, **options)
        except (KeyboardInterrupt, SystemExit):
            return None
        return module.state_dict(), trainer.optimizers[0].state_dict(), module.rates

    straight = run(policy=measured(0.5))
    assert run(Dies(update + 1), saves(), policy=measured(0.5)) is None
    resumed_policy = measured(0.5)
    path = tmp_path / f"step={update}.ckpt"
    resumed = run(policy=resumed_policy, ckpt_path=path, weights_only=True)
    torch.testing.assert_close(resumed[:2], straight[:2], rtol=0, atol=0)
    assert resumed[2] == straight[2][update:]


class Noisy(Model):
    """Its losses are random; its gradients are not."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + torch.rand(())


@pytest.mark.slow
def test_measurements_do_not_depend_on_the_random_states_which_a_resume_does_not_restore() -> None:
    results = []
    for seed in (3, 4):
        module, policy = Noisy(), measured(0.5)
        torch.manual_seed(seed)
        callbacks = [*others()[:2], policy]
        L.Trainer(**QUIET, max_epochs=EPOCHS, callbacks=callbacks).fit(module, data(shuffle=False))
        results.append([result.losses for _, result in policy.measurements])
    assert results[0] == results[1]
    assert len(results[0]) == 2


def sequential_loader() -> Any:
    """A DataLoader of a fixed order, which continues where the checkpoint was saved."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(dataset(), batch_size=8, shuffle=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"high": 24}, "high must be low times a power of 2, such as 32, got 24 for low=8"),
        ({"high": 8}, "high must be low times a power of 2"),
        ({"check_every": 0}, "check_every must be positive"),
        ({"tolerance": -1.0}, "tolerance must be positive"),
        ({"window": "1 hour"}, "window must be positive, and no time"),
        ({"lr_scaling": None}, "lr_scaling must be 'sqrt' or 'linear', got None"),
        ({"micro_batch_size": 0}, "micro_batch_size must be a positive"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeasuredBatchSize(8, **{"high": 32, **options})


def test_limit_in_updates_raises() -> None:
    """The samples of such a run are not known: they depend on the measured sizes."""
    with pytest.raises(ValueError, match="samples"):
        fit(measured(), max_steps=100, max_epochs=-1)


class SometimesNaN(Model):
    """Its loss is NaN for a sample that is in the branches of the first measurement."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        bad = bool((batch[0][:, 0] == dataset().tensors[0][5, 0]).any())
        return super().training_step(batch, batch_idx) * (float("nan") if bad else 1.0)


def test_measurement_with_a_loss_that_is_not_finite_keeps_the_batch() -> None:
    """Branches begin with the first samples of a sequential loader; StepGuard skips the update."""
    policy, module = measured(), SometimesNaN()
    trainer = L.Trainer(**QUIET, max_epochs=EPOCHS, callbacks=[*others(), policy])
    with pytest.warns(UserWarning, match=r"keeps the batch of 8: .* got none, because it"):
        trainer.fit(module, data(shuffle=False))
    assert not policy.measurements
    assert trainer.global_step == 120
    assert all(bool(p.isfinite().all()) for p in module.parameters())


class SometimesNone(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 7 == 3 else loss


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_module_that_leaves_out_batches_is_measured() -> None:
    policy = measured()
    fit(policy, module=SometimesNone())
    assert [found.batch_size for _, found in policy.measurements] == [8, 16]


def count(batch: Any) -> int:
    return 5 * len(batch[0])


def test_budget_without_known_samples_raises_before_training() -> None:
    module, policy = Model(), measured(budget="5000 tokens", tokens=count)
    with pytest.raises(ValueError, match="window must be '10000 samples' for a budget in tokens"):
        fit(policy, module=module, max_epochs=-1)
    assert not module.seen
    ours = measured(budget="4800 tokens", tokens=count, window="48 samples")
    assert fit(ours, max_epochs=-1).updates == 24 + 12 + 18


def test_measurement_at_a_learning_rate_of_zero_waits() -> None:
    policy, schedule = measured(), PiecewiseLinear([("0%", 0.0), ("50%", 0.0), ("60%", 1.0)])
    trainer = L.Trainer(
        **QUIET, max_epochs=EPOCHS, callbacks=[LearningRateScheduler(schedule), policy]
    )
    trainer.fit(Model(), data())
    assert [samples for samples, _ in policy.measurements] == [488, 680]


class WithSGD(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.slow
def test_rule_of_another_optimizer_warns() -> None:
    with pytest.warns(UserWarning, match="lr_scaling='sqrt', and 'linear' is recommended for SGD"):
        fit(measured(), module=WithSGD())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*(LeafSpec|set_vital|workers)")
        fit(measured(lr_scaling="linear"), module=WithSGD())


def test_exact_loader_raises() -> None:
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=[measured()])
    with pytest.raises(ValueError, match="loader must be a DataLoader with MeasuredBatchSize"):
        trainer.fit(Model(), GlobalBatchLoader(dataset(), micro_batch_size=8))
