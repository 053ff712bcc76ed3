"""Copies and pickles of Trainer, module and callbacks before, during and after a fit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import Tensor

from lightning_bigopt import (
    Backoff,
    BatchSizeScheduler,
    BatchSizeSteps,
    Constant,
    GlobalBatchLoader,
    GradientClipping,
    GradientNoiseScale,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    LossSpike,
    NonFinite,
    NormClip,
    OptimizationMonitor,
    ReduceOnPlateau,
    Skip,
    StepGuard,
    ZClip,
)
from lightning_bigopt.engine.engine import Engine
from tests.helpers import QUIET, Probe, Regression, loader
from tests.older_lightning import fault_of_2_5_0

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "deepcopy": copy.deepcopy,
}
HOOKS = (
    "on_fit_start",
    "on_train_start",
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
)


class Validated(Probe):
    """Logs a metric that does not improve; some of its samples are in order."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0], batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.lrs.append(float(optimizer.param_groups[0]["lr"]))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1.0)

    def train_dataloader(self) -> Any:
        return loader(16, 2)

    def val_dataloader(self) -> Any:
        return loader(2, 2)


class ValidatedExactly(Validated):
    def train_dataloader(self) -> Any:
        return GlobalBatchLoader(Regression(16), micro_batch_size=2)


def module(kind: type[Validated] = Validated) -> Validated:
    return kind(lr=0.01, momentum=0.5)


def every_callback(folder: str | None = None) -> list[Any]:
    return [
        LearningRateScheduler(Linear(end=0.5)),
        ReduceOnPlateau("val_loss", patience=0, factor=0.5),
        HyperparameterScheduler("momentum", Linear(end=0.5)),
        GradientClipping(ZClip()),
        StepGuard([NonFinite(), LossSpike()], actions=[Skip(), Backoff()], forensics=folder),
        BatchSizeScheduler(
            BatchSizeSteps({"0%": 2, "50%": 4}), lr_scaling="sqrt", rewarmup="1 steps"
        ),
        GradientNoiseScale(),
        OptimizationMonitor(),
    ]


CALLBACKS: dict[str, Callable[[], list[Any]]] = {
    "none": list,
    "learning rate": lambda: [LearningRateScheduler(Linear())],
    "plateau": lambda: [LearningRateScheduler(Constant()), ReduceOnPlateau("val_loss", patience=0)],
    "field": lambda: [HyperparameterScheduler("momentum", Linear())],
    "clipping": lambda: [GradientClipping(NormClip(1.0, schedule=Linear()))],
    "guard": lambda: [LearningRateScheduler(Linear()), StepGuard(actions=[Skip(), Backoff()])],
    "noise scale": lambda: [GradientNoiseScale()],
    "monitor": lambda: [OptimizationMonitor()],
    "all": every_callback,
}


def trainer(*callbacks: Any, **options: Any) -> L.Trainer:
    settings = {**QUIET, "max_epochs": 2, "num_sanity_val_steps": 0, **options}
    return L.Trainer(**settings, callbacks=list(callbacks))


def assert_equal(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    """Compares modules and optimizers of two Trainers, given as (trainer, module), bit for bit."""
    for mine, theirs in zip(one[1].parameters(), other[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert one[1].lrs == other[1].lrs
    assert one[0].global_step == other[0].global_step
    states = [pair[0].optimizers[0].state_dict() for pair in (one, other)]
    for mine, theirs in zip(*(state["state"].values() for state in states), strict=True):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])
    assert states[0]["param_groups"] == states[1]["param_groups"]


@pytest.mark.parametrize(
    ("case", "kind", "way"),
    [
        *((case, Validated, "pickle") for case in CALLBACKS),
        ("all", Validated, "deepcopy"),
        ("all", ValidatedExactly, "pickle"),
    ],
)
def test_copy_before_and_after_a_fit_trains_like_the_original(
    case: str, kind: type[Validated], way: str
) -> None:
    original = trainer(*CALLBACKS[case]()), module(kind)
    copied = COPIES[way](original[0]), COPIES[way](original[1])
    original[0].fit(original[1])
    copied[0].fit(copied[1])
    assert_equal(copied, original)
    # A second fit, with more epochs, continues both.
    again = COPIES[way](original)
    for one, net in (original, again):
        one.fit_loop.max_epochs = 4
        one.fit(net)
    assert_equal(again, original)
    assert original[0].current_epoch == 4


class Interrupts(L.Callback):
    """Copies everything in one hook of the third update, and ends the fit there."""

    def __init__(self, hook: str, way: str) -> None:
        self.hook, self.copy = hook, COPIES[way]
        self.copied: Any = None

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        early = self.hook in ("on_fit_start", "on_train_start")
        if self.copied is None and (trainer.global_step == 3 or early):
            self.copied = ()  # copies do not interrupt
            self.copied = self.copy((trainer, pl_module))
            for thing in (trainer.callbacks, trainer.optimizers, pl_module):
                self.copy(thing)
            raise ZeroDivisionError

    def __getstate__(self) -> dict[str, Any]:
        return {"hook": self.hook, "copied": (), "copy": None}


for name in HOOKS:
    setattr(
        Interrupts,
        name,
        lambda self, trainer, pl_module, *_, name=name: (
            self.look(trainer, pl_module) if self.hook == name else None
        ),
    )


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode at the start of training")
@pytest.mark.parametrize(
    ("hook", "kind", "way"),
    [
        *((hook, Validated, "pickle") for hook in HOOKS),
        ("on_train_batch_end", Validated, "deepcopy"),
        ("on_train_batch_end", ValidatedExactly, "pickle"),
        ("on_before_optimizer_step", ValidatedExactly, "deepcopy"),
    ],
)
def test_copy_from_a_hook_trains_like_the_interrupted_original(
    hook: str, kind: type[Validated], way: str, tmp_path: Path
) -> None:
    interrupts = Interrupts(hook, way)
    often = {} if kind is ValidatedExactly else {"val_check_interval": 3}
    one = trainer(*every_callback(str(tmp_path)), interrupts, **often)
    original = one, module(kind)
    if hook == "on_train_epoch_end":
        one.limit_train_batches = 3
    with pytest.raises(ZeroDivisionError):
        one.fit(original[1])
    copied = interrupts.copied
    assert copied
    for each, net in (original, copied):
        each.fit(net)
    assert_equal(copied, original)
    assert copied[0].global_step > 3


@fault_of_2_5_0("RichProgressBar fails with rich 15", strict=False)
@pytest.mark.parametrize(
    ("bar", "way"), [(TQDMProgressBar, "pickle"), (RichProgressBar, "deepcopy")]
)
def test_trainer_with_a_progress_bar(bar: Any, way: str, capsys: Any) -> None:
    one = trainer(*every_callback(), bar(), enable_progress_bar=True)
    net = module()
    for _ in range(2):
        copied, other = COPIES[way](one), COPIES[way](net)
        one.fit(net)
        copied.fit(other)
        assert_equal((copied, other), (one, net))
        one.fit_loop.max_epochs = 4
    capsys.readouterr()


@pytest.mark.parametrize("way", COPIES)
def test_copy_has_no_reference_to_the_original(way: str) -> None:
    one, net = trainer(*every_callback()), module()
    one.fit(net)
    copied = COPIES[way](one)
    (engine,) = (callback for callback in copied.callbacks if isinstance(callback, Engine))
    (scheduler,) = (config.scheduler for config in copied.lr_scheduler_configs)
    assert scheduler.optimizer is copied.optimizers[0]
    assert scheduler.state_dict() == one.lr_scheduler_configs[0].scheduler.state_dict()
    assert scheduler.get_last_lr() == one.lr_scheduler_configs[0].scheduler.get_last_lr()
    assert engine.clock.samples == 32


def test_scheduler_with_a_function_of_the_user_is_copied() -> None:
    """A capability of the user's own may adjust the learning rate by a local function."""

    class Halves(LearningRateScheduler):
        def start(self, fit: Any) -> None:
            super().start(fit)
            fit.groups.adjust("lr", lambda value, progress: value / 2, owner=self)

    one, net = trainer(Halves(Linear())), module()
    one.fit(net)
    scheduler = one.lr_scheduler_configs[0].scheduler
    copied = pickle.loads(pickle.dumps(scheduler))
    assert copied.state_dict() == scheduler.state_dict()
