"""The end of the budget: the last update starts before it, and no update starts after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, IterableDataset

from lightning_bigopt import (
    BatchSizeRamp,
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    LearningRateScheduler,
    Linear,
    WarmupStableDecay,
)
from tests.helpers import Probe, Regression, ResumableLoader, SaveAt, fit, loader

DOWN = Linear(start=1.0, end=0.0)


class EndlessStream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        data = Regression(12)
        while True:
            for index in range(12):
                yield data[index]


def fractions(module: Probe) -> list[float]:
    """Returns the fraction of the budget at the start of each update, from a linear schedule."""
    return [1 - rate for rate in module.lrs]


@pytest.mark.parametrize("accumulate", [1, 2, 3, 7])
@pytest.mark.parametrize("limit", [1.0, 0.5, 5])
@pytest.mark.parametrize("samples", [20, 21])
def test_fractions_under_max_epochs_with_partial_windows_and_limits(
    accumulate: int, limit: float, samples: int
) -> None:
    module = Probe(lr=1.0)
    fit(
        module,
        loader(samples, 2),
        LearningRateScheduler(DOWN),
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        limit_train_batches=limit,
    )
    whole = -(-samples // 2)
    epoch = limit if isinstance(limit, int) else int(whole * limit)
    starts = [e * epoch + b for e in range(3) for b in range(0, epoch, accumulate)]
    assert fractions(module) == pytest.approx([s / (3 * epoch) for s in starts], abs=1e-15)
    assert starts[-1] < 3 * epoch  # the last update starts inside the budget


@pytest.mark.parametrize("total", [1, 5, 9, 17])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_under_max_steps_update_t_gets_exactly_t_over_total(total: int, accumulate: int) -> None:
    module = Probe(lr=1.0)
    fit(
        module,
        loader(10, 2),
        LearningRateScheduler(DOWN),
        max_steps=total,
        accumulate_grad_batches=accumulate,
    )
    assert module.lrs == [1 - t / total for t in range(total)]


@pytest.mark.parametrize("ramp", [True, False])
def test_batch_size_steps_do_not_change_fractions_under_max_steps(ramp: bool) -> None:
    module = Probe(lr=1.0)
    policy = BatchSizeSteps({"0%": 2, "30%": 4, "70%": 10}) if ramp else ConstantBatchSize(4)
    fit(
        module, loader(22, 2), LearningRateScheduler(DOWN), BatchSizeScheduler(policy), max_steps=11
    )
    assert module.lrs == [1 - t / 11 for t in range(11)]
    assert (len({len(window) for window in module.windows}) > 2) is ramp


@pytest.mark.parametrize(
    "limits",
    [
        {"max_epochs": 3},
        {"max_epochs": -1, "budget": "50 samples"},
        {"max_epochs": 2, "budget": "1000 samples"},
    ],
)
def test_batch_size_ramp_ends_with_the_budget(limits: dict[str, Any]) -> None:
    module, budget = Probe(lr=1.0), limits.pop("budget", None)
    fit(
        module,
        loader(22, 2),
        LearningRateScheduler(DOWN, budget=budget),
        BatchSizeScheduler(BatchSizeRamp(start=2, end=12, over="60%", increment=2)),
        **limits,
    )
    sizes = [len(window) for window in module.windows]
    before = [sum(sizes[:t]) for t in range(len(sizes))]
    whole = 50 if limits["max_epochs"] == -1 else 22 * limits["max_epochs"]
    assert len(set(sizes)) > 2
    assert fractions(module) == pytest.approx([b / whole for b in before], abs=1e-12)
    assert before[-1] < whole <= before[-1] + sizes[-1]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("budget", [1, 11, 12, 13, 36])
def test_endless_stream_ends_with_the_budget(budget: int, accumulate: int) -> None:
    module = Probe(lr=1.0)
    trainer = fit(
        module,
        DataLoader(EndlessStream(), batch_size=4),
        LearningRateScheduler(DOWN, budget=f"{budget} samples"),
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
    )
    starts = list(range(0, budget, 4 * accumulate))
    assert fractions(module) == pytest.approx([s / budget for s in starts], abs=1e-15)
    assert trainer.global_step == len(starts)


def test_endless_stream_with_batch_size_steps_ends_with_a_budget_in_tokens() -> None:
    module = Probe(lr=1.0)
    fit(
        module,
        DataLoader(EndlessStream(), batch_size=2),
        LearningRateScheduler(DOWN, budget="300 tokens", tokens=lambda batch: 5 * len(batch[0])),
        BatchSizeScheduler(BatchSizeSteps({"0%": 2, "40%": 6})),
        max_epochs=-1,
    )
    sizes = [len(window) for window in module.windows]
    before = [5 * sum(sizes[:t]) for t in range(len(sizes))]
    assert set(sizes) == {2, 6}
    assert fractions(module) == pytest.approx([b / 300 for b in before], abs=1e-12)
    assert before[-1] < 300 <= before[-1] + 5 * sizes[-1]


def test_updates_that_a_gradient_scaler_skips_count_as_consumed() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # overflows for some updates

    class RecordsLearningRate(Probe):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.lrs.append(float(optimizer.param_groups[0]["lr"]))

    module = RecordsLearningRate(lr=1.0)
    fit(
        module,
        loader(20, 2),
        LearningRateScheduler(DOWN),
        max_steps=10,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
    )
    assert scaler.get_scale() < 2.0**127
    assert module.lrs == [1 - t / 10 for t in range(10)]
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("duration", ["20 samples", "9 samples"])
def test_schedule_in_samples_does_not_depend_on_the_batch_sizes(duration: str) -> None:
    """Compares the factor by consumed samples over runs with different batch sizes."""
    schedule = WarmupStableDecay(warmup=duration, decay=duration, cooldown="linear")
    curves = []
    for policy in (
        ConstantBatchSize(2),
        BatchSizeRamp(start=2, end=12, over="80%", increment=2),
        BatchSizeSteps({"0%": 8, "50%": 2}),
    ):
        module = Probe(lr=1.0)
        fit(
            module,
            loader(24, 2),
            LearningRateScheduler(schedule),
            BatchSizeScheduler(policy),
            max_epochs=3,
        )
        sizes = [len(window) for window in module.windows]
        consumed = [sum(sizes[:t]) for t in range(len(sizes))]
        curves.append(dict(zip(consumed, module.lrs, strict=True)))
    finest, *others = curves
    for other in others:
        assert len(other) < len(finest)
        for consumed, rate in other.items():
            assert rate == pytest.approx(finest[consumed], abs=1e-12)


def test_warmup_in_samples_under_max_steps_ends_at_its_sample() -> None:
    module = Probe(lr=1.0)
    fit(
        module,
        loader(40, 2),
        LearningRateScheduler(WarmupStableDecay(warmup="12 samples", decay="0%")),
        BatchSizeScheduler(BatchSizeSteps({"0%": 2, "3 steps": 6})),
        max_steps=12,
    )
    sizes = [len(window) for window in module.windows]
    assert sizes[:5] == [2, 2, 2, 6, 6]
    # 12 samples are consumed after update 3: four updates.
    assert module.lrs[:6] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0], abs=1e-12)


@pytest.mark.parametrize("stop", range(1, 12))
def test_resume_at_any_step_of_a_ramp_gives_the_same_learning_rates(
    tmp_path: Path, stop: int
) -> None:
    def callbacks() -> list[Any]:
        return [
            LearningRateScheduler(WarmupStableDecay(warmup="8 samples", decay="30%")),
            BatchSizeScheduler(BatchSizeSteps({"0%": 2, "25%": 4, "60%": 6})),
        ]

    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight, resumed = Probe(), Probe()
    options: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True}
    fit(straight, ResumableLoader(14, 2), *callbacks(), checkpoint, **options)
    fit(
        resumed,
        ResumableLoader(14, 2),
        *callbacks(),
        max_epochs=3,
        ckpt_path=tmp_path / f"step={stop}.ckpt",
    )
    assert len(straight.lrs) > 11
    assert resumed.lrs == straight.lrs[stop:]
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def endless(*, resumed: Path | None = None, **options: Any) -> tuple[Any, Probe]:
    module = Probe(lr=1.0)
    limits = {"max_epochs": -1, "max_steps": -1}
    scheduler = LearningRateScheduler(DOWN, **options)
    trainer = fit(module, loader(40, 2), scheduler, ckpt_path=resumed, **limits)
    return trainer, module


def test_run_that_a_budget_has_ended_makes_no_further_update(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    trainer, module = endless(budget="8 steps")
    assert trainer.global_step == len(module.lrs) == 8
    for _ in range(3):
        trainer.save_checkpoint(path)
        trainer, module = endless(budget="8 steps", resumed=path)
        assert trainer.global_step == 8
        assert not module.lrs
    trainer.fit(module, loader(40, 2))
    assert not module.lrs


def test_run_that_a_cooldown_has_ended_makes_no_further_update(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    fit(Probe(lr=1.0), loader(40, 2), LearningRateScheduler(DOWN), SaveAt(path, 4), max_steps=8)
    cooldown: dict[str, Any] = {"on_resume": "cooldown", "cooldown": "2 steps"}
    trainer, module = endless(resumed=path, **cooldown)
    assert trainer.global_step == 6
    for _ in range(3):
        trainer.save_checkpoint(path)
        trainer, module = endless(resumed=path, **cooldown)
        assert trainer.global_step == 6
        assert not module.lrs


@pytest.mark.parametrize(
    ("minimum", "named"),
    [
        ({"min_steps": 5}, "got min_steps=5; remove it"),  # Lightning sets min_epochs=1, too
        ({"min_epochs": 2}, "got min_epochs=2; remove it"),
        ({"min_epochs": 1}, "got min_epochs=1; remove it"),
        ({"min_steps": 5, "min_epochs": 2}, "got min_steps=5 and min_epochs=2; remove them"),
    ],
)
def test_budget_with_a_minimum_of_the_trainer_raises(minimum: dict[str, int], named: str) -> None:
    scheduler = LearningRateScheduler(DOWN, budget="8 steps")
    with pytest.raises(ValueError, match=rf"a minimum with budget='8 steps'.*{named}"):
        fit(Probe(), loader(40, 2), scheduler, max_epochs=-1, **minimum)


# --------------------------------------------------------------- runs that end before the budget


class Stream(IterableDataset[Any]):
    """Twelve samples without a length."""

    def __iter__(self) -> Any:
        return iter(Regression(12))


def test_max_epochs_that_ends_a_run_without_a_known_length_warns() -> None:
    module = Probe(lr=1.0)
    scheduler = LearningRateScheduler(DOWN)
    match = r"^max_epochs ended the run at 60% of the budget of 20 steps, before the end of its sc"
    with pytest.warns(UserWarning, match=match) as found:
        fit(module, DataLoader(Stream(), 2), scheduler, max_steps=20, max_epochs=2)
    assert module.lrs == [1 - t / 20 for t in range(12)]
    assert len([w for w in found if "ended the run" in str(w.message)]) == 1


def test_max_epochs_that_ends_a_budget_in_tokens_warns() -> None:
    scheduler = LearningRateScheduler(DOWN, budget="100 tokens", tokens=lambda batch: 2)
    with pytest.warns(UserWarning, match=r"^max_epochs ended the run at 12% of .* 100 tokens, "):
        fit(Probe(lr=1.0), loader(12, 2), scheduler, max_epochs=1)


def test_run_without_a_known_length_that_max_steps_ends_does_not_warn() -> None:
    module = Probe(lr=1.0)  # a warning would be an error here
    fit(module, DataLoader(Stream(), 2), LearningRateScheduler(DOWN), max_steps=8, max_epochs=2)
    assert module.lrs == [1 - t / 8 for t in range(8)]


def test_run_that_a_callback_stops_does_not_warn() -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    module = Probe(lr=1.0)
    fit(module, loader(40, 2), LearningRateScheduler(DOWN), Stops(), max_steps=8)
    assert len(module.lrs) == 3


# ------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("budget", ["0 s", "0 steps", "0 epochs", "0 tokens"])
def test_budget_of_zero_is_refused(budget: str) -> None:
    with pytest.raises(ValueError, match=rf"^budget must be positive, got '{budget}'; write"):
        LearningRateScheduler(DOWN, budget=budget)


@pytest.mark.parametrize("budget", ["-2 hours", "-1 steps", "1e999 s"])
def test_budget_below_zero_or_not_finite_is_refused(budget: str) -> None:
    match = rf"^budget must be non-negative and finite, got '{budget}'"
    with pytest.raises(ValueError, match=match):
        LearningRateScheduler(DOWN, budget=budget)


@pytest.mark.parametrize("budget", ["nan s", "nan", "inf hours"])
def test_budget_that_is_no_number_is_refused(budget: str) -> None:
    with pytest.raises(ValueError, match=rf"^budget must be a duration such as .* got '{budget}'"):
        LearningRateScheduler(DOWN, budget=budget)


def test_budget_in_percent_is_refused_and_the_message_names_times() -> None:
    match = r"^budget must be in steps, epochs, samples, tokens or a time, got '50%'; .* '2 hours'"
    with pytest.raises(ValueError, match=match):
        LearningRateScheduler(DOWN, budget="50%")
