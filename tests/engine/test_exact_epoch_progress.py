"""The fraction of the budget under max_epochs with a GlobalBatchLoader, whose epochs are samples.

The right values come from the definition: (epochs done + samples of this epoch done / this epoch's
samples) / max_epochs.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    LearningRateScheduler,
    Linear,
    WarmupConstant,
    WarmupStableDecay,
)
from tests.batch_helpers import RAMPED, ExactEpochs, SaveInEpoch, exact_loader, ramped
from tests.helpers import QUIET

SIZE = 2  # samples of an update


def trainer_of(
    *callbacks: Any,
    policy: Any = None,
    scheduler: Any = None,
    on_resume: Any = None,
    **options: Any,
) -> L.Trainer:
    options = {**QUIET, "max_steps": -1, "reload_dataloaders_every_n_epochs": 1, **options}
    ours = [
        scheduler or LearningRateScheduler(Linear(), on_resume=on_resume),
        BatchSizeScheduler(policy or ConstantBatchSize(SIZE)),
    ]
    return L.Trainer(**options, callbacks=[*ours, *callbacks])


def starts(*epochs: int, size: int = SIZE) -> list[tuple[int, float]]:
    """Returns epoch and fraction of the epoch at which each update of ``size`` samples starts."""
    return [(e, at / n) for e, n in enumerate(epochs) for at in range(0, n, size)]


def expected(*epochs: int, of: int | None = None) -> Any:
    total = of or len(epochs)
    return pytest.approx([1 - (e + share) / total for e, share in starts(*epochs)], abs=1e-12)


@pytest.mark.parametrize("batches", [(4, 8, 12, 16), (16, 12, 8, 4), (3, 7, 1, 5)])
def test_reloaded_data_of_other_sizes_ends_on_the_budget(batches: tuple[int, ...]) -> None:
    samples = tuple(SIZE * count for count in batches)
    module = ExactEpochs(*samples)
    trainer_of(max_epochs=4).fit(module)
    assert module.rates == expected(*samples)


def test_equal_epochs_give_the_same_bits_as_a_data_loader() -> None:
    exactly, loader = ExactEpochs(14), ExactEpochs()
    trainer_of(max_epochs=3).fit(exactly)
    data = DataLoader(TensorDataset(torch.randn(14, 3)), batch_size=SIZE)
    trainer_of(max_epochs=3).fit(loader, data)
    assert exactly.rates == loader.rates


@pytest.mark.parametrize("on_resume", ["continue", "extend"])
@pytest.mark.parametrize(("before", "after"), [(16, 8), (8, 16), (12, 12), (10, 7)])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_resume_at_the_end_of_an_epoch_with_data_of_another_size(
    tmp_path: Path, before: int, after: int, on_resume: Any, hook: str
) -> None:
    path = tmp_path / "half.ckpt"
    saves = SaveInEpoch(path, hook, at=(1, before))
    trainer_of(saves, max_epochs=4).fit(ExactEpochs(before * SIZE))
    module = ExactEpochs(after * SIZE)
    trainer_of(max_epochs=4, on_resume=on_resume).fit(module, ckpt_path=path)
    epochs = [before * SIZE] * 2 + [after * SIZE] * 2
    right = [1 - (e + share) / 4 for e, share in starts(*epochs) if e >= 2]
    assert module.rates == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize(
    ("hook", "at"),
    [
        *(("on_train_batch_end", at) for at in [(0, 1), (0, 7), (1, 3), (1, 4), (2, 8), (2, 9)]),
        *(("on_train_epoch_end", at) for at in [(0, 7), (1, 4), (2, 9)]),
    ],
)
def test_resumed_learning_rates_equal_the_uninterrupted_ones(
    tmp_path: Path, hook: str, at: tuple[int, int]
) -> None:
    """Epochs of 13, 7 and 17 samples: 7, 4 and 9 updates."""
    path, epochs = tmp_path / "saved.ckpt", (13, 7, 17)
    straight, resumed = ExactEpochs(*epochs), ExactEpochs(*epochs)
    trainer_of(SaveInEpoch(path, hook, at=at), max_epochs=3).fit(straight)
    assert straight.rates == expected(*epochs)
    trainer_of(max_epochs=3).fit(resumed, ckpt_path=path)
    done = sum((7, 4, 9)[: at[0]]) + at[1]
    assert len(straight.rates) - len(resumed.rates) == done
    assert resumed.rates == straight.rates[done:]


def test_raised_max_epochs_with_other_data_continue_at_the_epoch() -> None:
    module, trainer = ExactEpochs(), trainer_of(max_epochs=4, reload_dataloaders_every_n_epochs=0)
    trainer.fit(module, exact_loader(16))
    for epochs, samples, first in [(8, 8, 4), (12, 32, 8)]:
        module.rates.clear()
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, exact_loader(samples))
        right = [1 - (first + e + at) / epochs for e, at in starts(*[samples] * 4)]
        assert module.rates == pytest.approx(right, abs=1e-12)


def test_interrupted_fit_continues_within_the_epoch() -> None:
    """Unlike a DataLoader, the loader continues; every sample is trained once."""

    class Interrupts(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if (trainer.current_epoch, arguments[-1]) == (1, 3) and len(module.rates) == 9:
                raise KeyboardInterrupt

    module = ExactEpochs()
    data = exact_loader(10)
    trainer = trainer_of(Interrupts(), max_epochs=3, reload_dataloaders_every_n_epochs=0)
    with pytest.raises(SystemExit):
        trainer.fit(module, data)
    trainer.fit(module, data)
    assert module.rates == expected(10, 10, 10)


# -------------------------------------------------------------------------- ramping batch size


@pytest.mark.parametrize("epochs", [(24, 24, 24), (12, 24, 48), (48, 24, 12), (30, 7, 30)])
def test_ramp_of_the_batch_size_follows_the_epochs(epochs: tuple[int, ...]) -> None:
    module = ExactEpochs(*epochs, micro=3)
    trainer_of(policy=RAMPED, max_epochs=len(epochs)).fit(module)
    rates, sizes = ramped(*epochs)
    assert module.sizes == sizes
    assert module.rates == pytest.approx(rates, abs=1e-12)


@pytest.mark.parametrize("number", range(1, 17, 2))
def test_ramp_of_the_batch_size_resumes_at_every_update(tmp_path: Path, number: int) -> None:
    class SavesUpdate(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == number:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    epochs = (12, 24, 48)
    straight, resumed = ExactEpochs(*epochs), ExactEpochs(*epochs)
    trainer_of(SavesUpdate(), policy=RAMPED, max_epochs=3).fit(straight)
    trainer_of(policy=RAMPED, max_epochs=3).fit(resumed, ckpt_path=tmp_path / "one.ckpt")
    assert resumed.rates == straight.rates[number:]
    assert resumed.sizes == straight.sizes[number:]


@pytest.mark.parametrize("threshold", ["50%", "2 epochs"])
def test_thresholds_are_reached_at_the_same_epoch_in_data_of_other_sizes(threshold: str) -> None:
    module = ExactEpochs(8, 16, 4, 12)
    trainer_of(policy=BatchSizeSteps({"0%": 2, threshold: 4}), max_epochs=4).fit(module)
    assert module.sizes == [2] * 12 + [4] * 4


# ---------------------------------------------------------------------- durations and budgets


def test_warmup_in_epochs_ends_with_its_epoch() -> None:
    module = ExactEpochs(8, 16, 4)
    scheduler = LearningRateScheduler(WarmupConstant(warmup="1 epoch"))
    trainer_of(scheduler=scheduler, max_epochs=3).fit(module)
    assert module.rates == pytest.approx([0, 0.25, 0.5, 0.75, *[1.0] * 10])


def test_budget_in_epochs_ends_within_an_epoch_of_another_size() -> None:
    module = ExactEpochs(8, 16, 4)
    scheduler = LearningRateScheduler(Linear(), budget="1.5 epochs")
    trainer_of(scheduler=scheduler, max_epochs=-1).fit(module)
    right = [1 - (e + share) / 1.5 for e, share in starts(8, 16) if e + share < 1.5]
    assert module.rates == pytest.approx(right, abs=1e-12)


def test_cooldown_in_epochs_lasts_epochs_of_the_new_data(tmp_path: Path) -> None:
    path, schedule = tmp_path / "stable.ckpt", WarmupStableDecay(warmup=0, decay="10%")
    saves = SaveInEpoch(path, "on_train_batch_end", at=(3, 8))
    trainer_of(saves, scheduler=LearningRateScheduler(schedule), max_epochs=10).fit(ExactEpochs(16))
    scheduler = LearningRateScheduler(
        schedule, on_resume="cooldown", cooldown="2 epochs", cooldown_shape="linear"
    )
    module = ExactEpochs(8)
    trainer_of(scheduler=scheduler, max_epochs=10).fit(module, ckpt_path=path)
    assert module.rates == pytest.approx([1 - i / 8 for i in range(8)], abs=1e-12)


def test_the_largest_fraction_of_several_limits_is_used() -> None:
    """Epochs of 6 updates reach max_epochs first, and longer ones max_steps."""
    longer = ExactEpochs(12, 24, 24)
    trainer_of(max_steps=24, max_epochs=3).fit(longer)
    epochs = [(e + share) / 3 for e, share in starts(12, 24, 24)][:24]
    right = [share if step < 6 else max(share, step / 24) for step, share in enumerate(epochs)]
    assert longer.rates == pytest.approx([1 - share for share in right], abs=1e-12)
    shorter = ExactEpochs(24, 6, 6)
    trainer_of(max_steps=20, max_epochs=3).fit(shorter)
    epochs = [(e + share) / 3 for e, share in starts(24, 6, 6)]
    right = [step / 20 if step < 12 else max(share, step / 20) for step, share in enumerate(epochs)]
    assert shorter.rates == pytest.approx([1 - share for share in right], abs=1e-12)


def test_budget_in_samples_counts_samples() -> None:
    module = ExactEpochs(8, 16, 4)
    scheduler = LearningRateScheduler(Linear(), budget="28 samples")
    trainer_of(scheduler=scheduler, max_epochs=-1).fit(module)
    assert module.rates == pytest.approx([1 - step / 14 for step in range(14)], abs=1e-12)


@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("limits", [{}, {"max_steps": 100}])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_epoch_start"])
def test_epoch_that_lightning_omits_after_a_resume_is_reported(
    tmp_path: Path, hook: str, limits: dict[str, Any], validates: bool
) -> None:
    class Validated(ExactEpochs):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    path, options = tmp_path / "end.ckpt", {"max_epochs": 3, **limits}
    data = {"val_dataloaders": DataLoader(TensorDataset(torch.randn(4, 3)))} if validates else {}
    at, kind = (1, 4) if "start" in hook else (0, 4), Validated if validates else ExactEpochs
    trainer_of(SaveInEpoch(path, hook, at=at), **options).fit(kind(8), **data)
    resumed = kind(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(**options).fit(resumed, ckpt_path=path, **data)
    found = [str(w.message) for w in caught if "Lightning continues an epoch" in str(w.message)]
    assert len(found) == (len(resumed.rates) < 8)  # two epochs of 4 updates
    assert len(resumed.rates) == (4 if validates and (limits or "start" in hook) else 8)
