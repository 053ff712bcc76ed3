"""Learning rates that other code writes again and again, between saves, or into one update only."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core import rank_zero
from torch import Tensor

from lightning_bigopt import (
    GradientClipping,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    NormClip,
)
from tests.helpers import cpu_precision
from tests.optimizers.test_foreign_values import (
    FACTORS,
    Recorded,
    Validated,
    data,
    fit,
    scaled,
    trainer_of,
)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if text.startswith("Other code")]


# ------------------------------------------------- written between the engine and the update


class WritesLate(Callback):
    """Writes the learning rate at some updates, in a hook after that of the engine."""

    def __init__(self, *at: int) -> None:
        self.at, self.before = at, 0.0

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step in self.at:
            for group in optimizer.param_groups:
                self.before, group["lr"] = group["lr"], 0.4


class Restores(Callback):
    """Writes the learning rate back when the update has ended."""

    def __init__(self, late: WritesLate) -> None:
        self.late = late

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step - 1 in self.late.at:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = self.late.before


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("options", [{}, cpu_precision("16-mixed")], ids=["32", "16-mixed"])
def test_a_value_that_one_update_uses_is_reported(
    options: dict[str, Any], clips: bool, caplog: pytest.LogCaptureFixture
) -> None:
    module = Recorded()
    ours = [LearningRateScheduler(Linear()), *([GradientClipping(NormClip(1.0))] * clips)]
    with caplog.at_level(logging.INFO):
        fit(module, *ours, WritesLate(3), **options)
    assert module.rates[3] == 0.4
    assert module.rates[4:] == scaled(0.4, slice(4, None))
    (line,) = lines(caplog)
    assert "lr of weight from 0.0625 to 0.4" in line
    assert line.endswith("The update before has used the value without the schedule.")


def test_a_value_that_only_one_update_uses_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    module, late = Recorded(), WritesLate(3)
    with caplog.at_level(logging.INFO):
        fit(module, Restores(late), LearningRateScheduler(Linear()), late)
    assert module.rates[3] == 0.4
    assert module.rates[4:] == scaled(0.1, slice(4, None))
    (line,) = lines(caplog)
    assert "lr of weight from 0.0625 to 0.4" in line
    assert "for one update, and back" in line


def test_a_value_that_is_restored_after_it_became_the_base_is_refused() -> None:
    late = WritesLate(3)
    with pytest.raises(ValueError, match=r"^lr must have one writer.*two updates in a row"):
        fit(Recorded(), LearningRateScheduler(Linear()), late, Restores(late))


def test_a_value_that_every_update_uses_is_refused() -> None:
    module, late = Recorded(), WritesLate(*range(8))
    with pytest.raises(ValueError, match=r"^lr must have one writer.*two updates in a row"):
        fit(module, Restores(late), LearningRateScheduler(Linear()), late)
    assert len(module.rates) == 2


def test_a_hook_that_writes_before_the_step_is_followed() -> None:
    class Hooked(Recorded):
        def recorded(self, optimizer: Any) -> Any:
            optimizer.register_step_pre_hook(self.write)
            return super().recorded(optimizer)

        def write(self, optimizer: Any, *_: Any) -> None:
            if self.trainer.global_step == 3:
                for group in optimizer.param_groups:
                    group["lr"] = 0.4

    module = Hooked()
    fit(module, LearningRateScheduler(Linear()))
    assert module.rates[3:] == scaled(0.4, slice(3, None))


def test_the_step_hook_is_removed_after_the_fit() -> None:
    trainer = fit(Recorded(), LearningRateScheduler(Linear()))
    (optimizer,) = trainer.optimizers
    assert len(optimizer._optimizer_step_post_hooks) == 1  # that of the test


# --------------------------------------------------------------------------- repeated writes


class Decays(Callback):
    """Multiplies the learning rate at every k-th update, as a decay of the user's own."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= 0.999


def test_repeated_writes_warn_once_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    module = Recorded()
    message = r"Other code has changed lr for 3 updates of this fit.*group\['lr'\] \*= 0\.9"
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match=message) as warned:
        fit(module, LearningRateScheduler(Linear()), Decays(2), max_steps=20)
    assert len([one for one in warned if "Other code" in str(one.message)]) == 1
    found = lines(caplog)
    assert len([line for line in found if "new base values" in line]) == 3
    # The write after the last update comes after its end.
    assert found[-1] == "Other code has changed lr for 9 updates of this fit."
    # In effect the factors accumulate, which the warning says.
    assert module.rates[4] == pytest.approx(0.1 * 0.9 * 0.999 * 0.8 * 0.999 * 0.8)


def test_two_writes_in_a_fit_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(Recorded(), LearningRateScheduler(Linear()), Decays(3), max_steps=8)
    assert len(lines(caplog)) == 2


def test_each_field_is_counted_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    class Writes(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            field = ("lr", None, "weight_decay", None)[trainer.global_step % 4]
            for group in trainer.optimizers[0].param_groups:
                if field is not None:
                    group[field] = 0.2

    ours = [LearningRateScheduler(Linear()), HyperparameterScheduler("weight_decay", Linear())]
    with caplog.at_level(logging.INFO):
        fit(Recorded(), *ours, Writes(), max_steps=8)
    assert len(lines(caplog)) == 3


def test_one_write_per_epoch_of_one_update_says_what_it_is() -> None:
    class Writes(Callback):
        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 0.1 * 0.5**trainer.current_epoch

    message = r"two updates in a row .* once per epoch if an epoch has one update"
    with pytest.raises(ValueError, match=message):
        fit(Recorded(), LearningRateScheduler(Linear()), Writes(), updates=1)
    module = Recorded()
    with pytest.raises(ValueError, match=message):
        fit(module, LearningRateScheduler(Linear()), Writes(), accumulate_grad_batches=4)


def test_a_line_names_few_of_many_groups(caplog: pytest.LogCaptureFixture) -> None:
    class Many(Recorded):
        def configure_optimizers(self) -> Any:
            groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(50)]
            return self.recorded(torch.optim.SGD([*groups, {"params": self.layer.parameters()}]))

    class Writes(Callback):
        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= 1.5 if trainer.current_epoch else 1

    with caplog.at_level(logging.INFO):
        fit(Many(), LearningRateScheduler(Linear()), Writes())
    (line,) = lines(caplog)
    assert "lr of group2 from" in line
    assert "and 48 more" in line
    assert len(line) < 250


# ------------------------------------------------------- written around a save, and resumed

HOOKS = [
    "on_train_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_epoch_start",
    "on_train_batch_start",
]


class At(Callback):
    """Acts in one hook, at update 4."""

    def __init__(self, hook: str, act: Any) -> None:
        self.act = act
        setattr(self, hook, self.run)

    def run(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4 and not trainer.sanity_checking:
            self.act(trainer)


class BeginsEpoch(Callback):
    """Begins the epoch after a resume from the last batch of one, as in an uninterrupted run."""

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        epochs = trainer.fit_loop.epoch_progress.total
        if trainer.fit_loop.restarted_mid_epoch and epochs.processed == epochs.started:
            trainer.fit_loop.reset_restart_stage()


def write(trainer: Any) -> None:
    for group in trainer.optimizers[0].param_groups:
        group["lr"] = 0.4


def run(path: Path, callbacks: list[Any], limits: dict[str, Any], *, resume: bool) -> list[float]:
    module = Validated()
    trainer = trainer_of(*callbacks, **limits)
    trainer.fit(module, data(), data(), ckpt_path=path if resume else None)
    return module.rates


@contextlib.contextmanager
def no_report() -> Iterator[None]:
    """Raises for a report of changes: a value that was written before the save is none."""
    seen: list[str] = []
    logger, handler = rank_zero.log, logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not [text for text in seen if "Changes since" in text]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Lightning continues an epoch that had ended")
@pytest.mark.parametrize(
    ("limits", "is_first"), [({"max_steps": 8}, True), ({"max_steps": -1, "max_epochs": 2}, False)]
)
@pytest.mark.parametrize("order", ["write, save", "save, write"])
@pytest.mark.parametrize("hooks", [*itertools.product(HOOKS, HOOKS[:-1])], ids="-".join)
def test_a_write_beside_a_save_resumes_as_without_a_schedule(
    tmp_path: Path, hooks: tuple[str, str], order: str, limits: dict[str, Any], is_first: bool
) -> None:
    """Lightning alone shows which hooks run again, and so which value the resumed run has."""
    resumed: list[list[float]] = []
    for name in ("plain", "ours"):
        path = tmp_path / f"{name}.ckpt"

        def save(trainer: Any, path: Path = path) -> None:
            if not path.exists():
                trainer.save_checkpoint(path)

        own: list[Any] = [BeginsEpoch() if name == "plain" else LearningRateScheduler(Linear())]
        pair = [At(hooks[0], write), At(hooks[1], save)][:: 1 if order == "write, save" else -1]
        again: list[Any] = [At(hooks[0], write)]
        run(path, own + pair if is_first else pair + own, limits, resume=False)
        with no_report():
            callbacks = own + again if is_first else again + own
            resumed.append(run(path, callbacks, limits, resume=True))
    plain, rates = resumed
    assert set(plain) <= {0.1, 0.4}
    start = len(FACTORS) - len(plain)
    right = [lr * factor for lr, factor in zip(plain, FACTORS[start:], strict=True)]
    assert rates == pytest.approx(right)


def test_changes_of_the_schedule_are_still_reported_beside_a_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "written.ckpt"

    def act(trainer: Any) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] = 0.4
        trainer.save_checkpoint(path)

    fit(Recorded(), LearningRateScheduler(Linear()), At("on_train_epoch_end", act))
    trainer = trainer_of(LearningRateScheduler(Linear(start=3.0)))
    with (
        caplog.at_level(logging.INFO),
        pytest.warns(UserWarning, match=r"The learning rate jumps .*: 0\.05 → 0\.15 \(× 3\)\."),
    ):
        trainer.fit(Recorded(), data(), ckpt_path=path)
    (report,) = [text for text in caplog.messages if "Changes since" in text]
    assert "schedule: " in report
    assert "base_lrs" not in report


def test_a_value_in_a_tensor_that_one_update_uses_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Late(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if trainer.global_step == 3:
                for group in optimizer.param_groups:
                    assert isinstance(group["lr"], Tensor)
                    group["lr"].fill_(0.4)

    module = Recorded(torch.tensor(0.1))
    with caplog.at_level(logging.INFO):
        fit(module, LearningRateScheduler(Linear()), Late())
    assert module.rates[3:] == pytest.approx([0.4, *(0.4 * factor for factor in FACTORS[4:])])
    (line,) = lines(caplog)
    assert line.endswith("has used the value without the schedule.")


def test_a_copy_of_the_optimizer_in_the_fit_steps_without_the_fit() -> None:
    class Copies(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            copied = copy.deepcopy(trainer.optimizers[0])
            copied.param_groups[0]["lr"] = 7.0
            copied.step()

    module = Recorded()
    fit(module, LearningRateScheduler(Linear()), Copies())
    assert module.rates == scaled(0.1)
