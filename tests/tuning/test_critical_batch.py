"""The critical batch size against a noisy quadratic in closed form; restored state; errors."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    LearningRateScheduler,
    Linear,
    ModelAveraging,
    OptimizationMonitor,
    StepGuard,
    ZClip,
)
from lightning_bigopt.averaging import EMA
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.tuning import CriticalBatchSize, critical_batch_size
from lightning_bigopt.tuning.batch_measurement import BatchMeasurement
from lightning_bigopt.tuning.critical_batch import MeasurementError
from lightning_bigopt.tuning.trial_callbacks import branch_callbacks
from tests.helpers import QUIET, ManualUpdates

SIZE, LR, MICRO, UPDATES = 12_000, 0.05, 4, 48
CURVATURE = torch.linspace(0.5, 4.0, SIZE)


class Quadratic(L.LightningModule):
    """Independent quadratics with noisy gradients: loss = curvature (w - x)^2 / 2, x ~ N(0, 1)."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((SIZE,), start))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        return (CURVATURE * (self.weight - x).square()).sum(1).mean() / 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


def noise(samples: int = 384) -> DataLoader[Any]:
    x = torch.randn(samples, SIZE, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x), batch_size=MICRO)


def expected_loss(multiple: int, start: float, *, cooldown: bool) -> float:
    """Returns the expected loss without that of the noise of the samples, in closed form.

    Mean and variance of each weight follow m <- (1 - a h) m and v <- (1 - a h)^2 v +
    (a h)^2 / batch, with the learning rate a and the curvature h.
    """
    curvature = CURVATURE.double()
    mean, variance = torch.full_like(curvature, start), torch.zeros_like(curvature)
    count = UPDATES // multiple
    for update in range(count):
        factor = 1 - update / count if cooldown else 1.0
        step = LR * multiple * factor * curvature
        mean = (1 - step) * mean
        variance = (1 - step).square() * variance + step.square() / (MICRO * multiple)
    return float((curvature * (mean.square() + variance)).sum() / 2)


@pytest.mark.slow
@pytest.mark.parametrize(("cooldown", "start"), [(False, 0.2), (True, 1.0), (True, 0.2)])
def test_differences_and_critical_batch_equal_those_of_the_noisy_quadratic(
    cooldown: bool, start: float
) -> None:
    """Without a decay the noise grows with the batch near the limit of stability: 2 / curvature."""
    multiples = (1, 2, 4, 8)
    expected = [expected_loss(k, start, cooldown=cooldown) for k in multiples]
    differences = [loss - expected[0] for loss in expected]
    tolerance = abs(differences[1] + differences[2]) / 2
    found = critical_batch_size(
        L.Trainer(**QUIET, max_steps=300),
        Quadratic(start),
        noise(),
        multiples=multiples,
        window=f"{UPDATES * MICRO} samples",
        tolerance=tolerance,
        evaluate=40,
        cooldown=cooldown,
    )
    # The sum of 12,000 squares has a standard deviation of at most 1.6 % (curvatures differ).
    for difference, loss, measured, error in zip(
        differences, expected, found.differences, found.standard_errors, strict=True
    ):
        assert abs(measured - difference) <= 3 * math.hypot(error, 0.016 * loss)
    assert found.window == UPDATES * MICRO
    assert found.updates == 48 + 24 + 12 + 6
    assert found.samples == 4 * (48 + 40) * MICRO
    if not cooldown:
        assert found.verdicts == ("within", "within", "above", "above")
        assert found.largest_batch_size == 2 * MICRO
        share = (tolerance - differences[1]) / (differences[2] - differences[1])
        assert found.critical_batch_size == pytest.approx(2 * MICRO * 2**share, rel=0.1)
    elif start == 1.0:  # far from the optimum, larger learning rates decay faster in closed form
        assert differences[3] < differences[2] < differences[1] < 0
        assert found.is_lower_bound
        assert found.verdicts == ("within",) * 4


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 1)
        )
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(x.clone())
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def dataset(samples: int = 480) -> TensorDataset:
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.sum(1, keepdim=True))


def data(**options: Any) -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size=8, **options)


def all_callbacks() -> list[Any]:
    return [
        LearningRateScheduler(Linear(start=1.0, end=0.1)),
        GradientClipping(ZClip()),
        BatchSizeScheduler(ConstantBatchSize(16)),
        ModelAveraging(EMA(half_life=5)),
        StepGuard(),
        OptimizationMonitor(),
    ]


LOADERS = {
    "sequential": data,
    "shuffled": lambda: data(shuffle=True),
    "exact": lambda: GlobalBatchLoader(dataset(), micro_batch_size=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_training_afterwards_equals_training_without_it_to_the_bit(
    loader: str, tmp_path: Path
) -> None:
    runs = []
    for measured in (False, True):
        module, source = Model(), LOADERS[loader]()
        options = {**QUIET, "max_epochs": 2, "default_root_dir": tmp_path}
        trainer = L.Trainer(**options, callbacks=all_callbacks())
        torch.manual_seed(3)
        if measured:
            found = critical_batch_size(
                trainer, module, source, window="10%", evaluate=4, multiples=(1, 2, 4)
            )
            assert found.batch_size == 16
            assert not module.seen
            assert trainer.global_step == trainer.current_epoch == 0
            assert not [*tmp_path.iterdir()]
        trainer.fit(module, source)
        optimizer = trainer.optimizers[0].state_dict()
        runs.append((module.state_dict(), optimizer, module.seen, float(torch.rand(1))))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=0)


@pytest.mark.parametrize("how", ["scheduler", "accumulation", "exact"])
def test_all_branches_train_on_the_same_samples_and_are_evaluated_on_the_next(how: str) -> None:
    batches: list[list[Tensor]] = []

    class Records(Model):
        def on_train_start(self) -> None:
            batches.append([])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batches[-1].append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    callbacks = [BatchSizeScheduler(ConstantBatchSize(16))] if how != "accumulation" else []
    trainer = L.Trainer(
        **QUIET,
        max_epochs=4,
        callbacks=callbacks,
        accumulate_grad_batches=2 if how == "accumulation" else 1,
    )
    found = critical_batch_size(
        trainer,
        Records(),
        LOADERS["exact" if how == "exact" else "sequential"](),
        multiples=(1, 2, 3),
        window="10%",
        evaluate=6,
    )
    assert found.batch_size == 16
    assert found.window == 192  # 10 % of 4 x 480 samples, as a multiple of 6 x 16
    assert len(batches) == 3
    for branch in batches:
        assert len(branch) == 192 // 8 + 6
        assert all(torch.equal(x, y) for x, y in zip(branch, batches[0], strict=True))


def records(batches: list[list[Tensor]]) -> Model:
    class Records(Model):
        def on_train_start(self) -> None:
            batches.append([])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batches[-1].append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    return Records()


def all_equal(branches: list[list[Tensor]]) -> bool:
    first = branches[0]
    return all(
        len(branch) == len(first) and all(map(torch.equal, branch, first)) for branch in branches
    )


def test_branches_over_the_end_of_an_epoch_train_on_the_same_batches() -> None:
    """An epoch of 13 batches holds one window of the largest batch; the branches have 4 of them."""
    batches: list[list[Tensor]] = []
    loader = DataLoader(dataset(100), batch_size=8, shuffle=True)
    trainer = L.Trainer(**QUIET, max_epochs=40)
    found = critical_batch_size(trainer, records(batches), loader, evaluate=6)
    assert found.window == 256  # four updates of 64
    assert [len(branch) for branch in batches] == [32 + 6] * 4
    assert all_equal(batches)
    assert found.samples == 4 * (256 + 6 * 8)


def test_evaluated_batches_are_counted_once() -> None:
    batches: list[list[Tensor]] = []
    loader = DataLoader(dataset(64), batch_size=8)
    found = critical_batch_size(L.Trainer(**QUIET, max_epochs=40), records(batches), loader)
    assert [len(losses) for losses in found.losses] == [8] * 4
    assert len({float(x.sum()) for x in batches[0][-8:]}) == 8


@pytest.mark.parametrize("size", [12, 20])
def test_exact_loader_evaluates_the_same_batches_for_all_multiples(size: int) -> None:
    batches: list[list[Tensor]] = []
    trainer = L.Trainer(
        **QUIET, max_epochs=4, callbacks=[BatchSizeScheduler(ConstantBatchSize(size))]
    )
    loader = GlobalBatchLoader(dataset(), micro_batch_size=8)
    critical_batch_size(
        trainer, records(batches), loader, multiples=(1, 2, 4), evaluate=8, window="240 samples"
    )
    evaluated = [branch[-8:] for branch in batches]
    assert [len(x) for x in evaluated[0]] == [8] * 8
    assert all_equal(evaluated)
    trained = [torch.cat(branch[:-8]) for branch in batches]
    assert all_equal([[x.sum(0)] for x in trained]) or all(
        torch.allclose(x.sum(0), trained[0].sum(0)) for x in trained
    )


def test_epoch_that_is_too_short_raises() -> None:
    loader = DataLoader(dataset(40), batch_size=8)
    with pytest.raises(ValueError, match=r"an epoch must have at least 8 batches .* got 5"):
        critical_batch_size(L.Trainer(**QUIET, max_epochs=40), Model(), loader)
    exact = GlobalBatchLoader(dataset(40), micro_batch_size=8)
    trainer = L.Trainer(
        **QUIET, max_epochs=40, callbacks=[BatchSizeScheduler(ConstantBatchSize(8))]
    )
    with pytest.raises(ValueError, match=r"an epoch must have at least 256 samples .* got 40"):
        critical_batch_size(trainer, Model(), exact)


class Unsized(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(dataset(100))


def test_loader_without_a_length_raises_if_the_branches_are_not_paired() -> None:
    loader = DataLoader(Unsized(), batch_size=8)
    trainer = L.Trainer(**QUIET, max_steps=1000)
    with pytest.raises(ValueError, match=r"window must end before the epoch .* write a shorter"):
        critical_batch_size(trainer, Model(), loader, window="640 samples")


def test_generator_of_a_batch_sampler_is_restored() -> None:
    orders = []
    for measured in (False, True):
        generator = torch.Generator().manual_seed(4)
        sampler = RandomSampler(dataset(), generator=generator)
        loader = DataLoader(dataset(), batch_sampler=BatchSampler(sampler, 8, drop_last=False))
        batches: list[list[Tensor]] = []
        if measured:
            options = {"evaluate": 5, "multiples": (1, 2), "window": "64 samples"}
            critical_batch_size(
                L.Trainer(**QUIET, max_epochs=2), records(batches), loader, **options
            )
            assert all_equal(batches)
        orders.append([x.clone() for x, _ in loader])
    assert all_equal(orders)


@pytest.mark.slow
def test_checkpoint_leaves_module_and_trainer_as_they_were(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=20, save_top_k=-1, filename="{step}")
    quiet = {**QUIET, "max_steps": 60, "enable_checkpointing": True}
    L.Trainer(**quiet, callbacks=[saves]).fit(Model(), data())
    runs = []
    for measured in (False, True):
        trainer, module = L.Trainer(**QUIET, max_steps=60), Model()
        torch.manual_seed(3)
        if measured:
            critical_batch_size(
                trainer, module, data(), ckpt_path=tmp_path / "step=20.ckpt", window="10%"
            )
            assert trainer.global_step == 0
        trainer.fit(module, data())
        assert trainer.global_step == 60
        runs.append((module.state_dict(), trainer.optimizers[0].state_dict()))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=0)


def test_average_of_lightning_raises_with_a_checkpoint() -> None:
    trainer = L.Trainer(**QUIET, max_steps=60, callbacks=[EMAWeightAveraging()])
    with pytest.raises(ValueError, match=r"must not contain WeightAveraging with ckpt_path"):
        critical_batch_size(trainer, Model(), data(), ckpt_path="some.ckpt")


class MeasuresAt(Capability):
    """Measures after some updates of a run, before the next window."""

    owns = "test"
    rank = 1000
    needs_horizon = True

    def __init__(self, update: int, measurement: BatchMeasurement) -> None:
        self.update, self.measurement = update, measurement
        self.result: CriticalBatchSize | None = None

    def begin_batch(self, batch: Any) -> None:
        trainer = batch.fit.trainer
        if trainer.global_step == self.update and batch.opens_window and self.result is None:
            self.result = self.measurement.run(
                batch.fit, batch_size=8, micro_batch=8, callbacks=branch_callbacks
            )


@pytest.mark.slow
def test_a_checkpoint_measures_as_the_run_does(tmp_path: Path) -> None:
    options: dict[str, Any] = {"window": "10%", "evaluate": 6, "tolerance": 0.001}
    within = MeasuresAt(20, BatchMeasurement(**options))
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=20, save_top_k=-1, filename="{step}")

    def callbacks() -> list[Any]:
        return [LearningRateScheduler(Linear(end=0.5)), GradientClipping(ZClip())]

    quiet = {**QUIET, "max_steps": 200, "enable_checkpointing": True}
    trainer = L.Trainer(**quiet, callbacks=[*callbacks(), within, saves])

    class Deterministic(Model):
        def __init__(self) -> None:
            super().__init__()
            self.net[2] = nn.Identity()

    trainer.fit(Deterministic(), data())
    again = L.Trainer(**{**quiet, "enable_checkpointing": False}, callbacks=callbacks())
    found = critical_batch_size(
        again, Deterministic(), data(), ckpt_path=tmp_path / "step=20.ckpt", **options
    )
    assert within.result is not None
    assert found == within.result
    start = critical_batch_size(again, Deterministic(), data(), **options)
    assert found.losses != start.losses


# -------------------------------------------------------------------------------- the result


def result(*losses: tuple[float, ...], tolerance: float = 0.01) -> CriticalBatchSize:
    return CriticalBatchSize(
        batch_size=32,
        multiples=(1, 2, 4, 8)[: len(losses)],
        losses=losses,
        tolerance=tolerance,
        window=320,
        samples=1000,
        updates=30,
    )


def test_standard_errors_are_those_of_the_paired_differences() -> None:
    base, other = (1.0, 2.0, 4.0, 3.0), (1.2, 1.9, 4.3, 3.1)
    found = result(base, other)
    paired = torch.tensor(other, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    assert found.differences == pytest.approx((0.0, float(paired.mean())))
    assert found.standard_errors == pytest.approx((0.0, float(paired.std()) / 2))
    assert found.verdicts == ("within", "undecided")
    assert found.largest_batch_size == 32


def test_branch_that_diverged_is_above_the_tolerance() -> None:
    found = result((1.0, 2.0), (1.0, 2.0), ())
    assert found.differences == (0.0, 0.0, math.inf)
    assert found.verdicts == ("within", "within", "above")
    assert found.critical_batch_size == found.largest_batch_size == 64
    assert "inf" in str(found)
    assert len(found.plot().lines[0].get_xdata()) == 2


def test_base_that_diverged_raises() -> None:
    with pytest.raises(MeasurementError, match="the branch with the current batch of 32 must have"):
        result((math.nan, math.nan), (1.0, 2.0))


def test_batches_without_a_finite_loss_are_left_out() -> None:
    found = result((1.0, math.nan, 2.0), (1.5, 7.0, 2.5), (1.5, 7.0, math.inf))
    assert found.differences == (0.0, 0.5, math.inf)
    assert found.verdicts == ("within", "above", "above")
    assert found.is_decided


def test_undecided_result_says_so() -> None:
    found = result((1.0, 2.0, 4.0), (1.2, 1.9, 4.3))
    assert not found.is_decided
    assert str(found).endswith("This is undecided: raise evaluate or window.")


def test_larger_bound_is_said() -> None:
    found = result((1.0, 2.0), (1.0, 2.0), (1.001, 2.001))
    assert found.is_lower_bound
    assert found.critical_batch_size == 128
    assert "is at least 128 samples (tolerance 0.01, 320 samples for each branch" in str(found)


# ---------------------------------------------------------------------------------- errors


class Manual(ManualUpdates, Model):
    """Makes the updates itself."""


class Unknown(Model):
    def configure_optimizers(self) -> Any:
        class Custom(torch.optim.SGD):
            """Its rule is not known by name."""

        return Custom(self.parameters(), lr=0.01)


class Frozen(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (
            Model,
            {"multiples": (2, 4)},
            r"multiples must be ascending, begin with 1 and .* \(2, 4\)",
        ),
        (Model, {"multiples": (1, 4, 2)}, "multiples must be ascending"),
        (Model, {"multiples": (1, 2.5)}, r"multiples\[1\] must be a positive integer, got 2.5"),
        (Model, {"tolerance": 0.0}, "tolerance must be positive.*, got 0.0; write 0.01"),
        (Model, {"window": "10 min"}, "window must be positive, and no time, got '10 min'"),
        (Model, {"window": 0}, "window must be positive"),
        (Model, {"evaluate": 1}, "evaluate must be a number of batches of at least 2, got 1"),
        (Model, {"lr_scaling": "cubic"}, "lr_scaling must be 'sqrt', 'linear' or None"),
        (Manual, {}, "automatic_optimization must be True to measure the critical batch size"),
        (Unknown, {}, "lr_scaling must be given for Custom, got None; write 'sqrt' for Adam"),
        (Frozen, {}, r"the learning rate must be positive .* got 0 in every .* ckpt_path="),
    ],
)
def test_errors_name_the_argument_and_the_way_out(
    module: Any, options: dict[str, Any], message: str
) -> None:
    trainer = L.Trainer(**QUIET, max_steps=100)
    with pytest.raises(ValueError, match=message):
        critical_batch_size(trainer, module(), data(), **options)


def test_trainer_without_a_limit_raises() -> None:
    with pytest.raises(ValueError, match="trainer must have a limit for critical_batch_size, got"):
        critical_batch_size(L.Trainer(**QUIET), Model(), data())


def test_trainer_at_its_limit_raises(tmp_path: Path) -> None:
    trainer, module = L.Trainer(**QUIET, max_steps=5), Model()
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    new = L.Trainer(**QUIET, max_steps=5)
    with pytest.raises(ValueError, match=r"updates left .*, got the checkpoint '.*last.ckpt' at"):
        critical_batch_size(new, Model(), data(), ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"trainer must have updates left .* 5 updates"):
        critical_batch_size(trainer, module, data())


def test_training_that_raises_restores_everything() -> None:
    class Failing(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 5:
                raise ArithmeticError("on purpose")
            return super().training_step(batch, batch_idx)

    module = Failing()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ArithmeticError):
        critical_batch_size(L.Trainer(**QUIET, max_steps=100), module, data())
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
