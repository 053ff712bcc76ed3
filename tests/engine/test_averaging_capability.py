"""Weight averaging as a capability, without changes to the engine."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_bigopt import (
    GradientClipping,
    LearningRateScheduler,
    Linear,
    NonFinite,
    NormClip,
    StepGuard,
)
from lightning_bigopt.engine.engine import Engine
from tests.engine.fake_averaging import STAGES, FakeAveraging, Looked, copies, evaluate
from tests.helpers import QUIET, ResumableLoader, cpu_precision, loader

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def average_of(first: dict[str, Tensor], later: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    found = {name: value.clone() for name, value in first.items()}
    for weights in later:
        for name, value in weights.items():
            found[name].lerp_(value, 0.5)
    return found


def trainer_with(*callbacks: Any, **options: Any) -> Any:
    return L.Trainer(**{**QUIET, "max_steps": 6, **options}, callbacks=list(callbacks))


# -------------------------------------------------------------------------- once per made update


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_every_made_update_is_averaged_once(fused: bool, accumulate: int) -> None:
    module, averaging = Looked(fused=fused), FakeAveraging()
    before = copies(module)
    trainer = trainer_with(averaging, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(24, 2))
    assert averaging.updates == trainer.global_step == 6
    made = module.trained[accumulate - 1 :: accumulate]
    assert same(averaging.average, average_of(before, made))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("precision", "fused", "skips"),
    [
        ("32-true", False, StepGuard([NonFinite()])),
        ("32-true", True, StepGuard([NonFinite()])),
        ("32-true", True, GradientClipping(NormClip())),  # by found_inf, in the kernel
        ("16-mixed", False, None),  # a GradScaler makes no step
        ("16-mixed", True, None),  # a GradScaler leaves it to the kernel
        ("16-mixed", True, GradientClipping(NormClip())),
    ],
)
def test_a_skipped_update_is_not_averaged(
    precision: str, fused: bool, skips: Any, accumulate: int
) -> None:
    module, averaging = Looked(bad=(1, 4), fused=fused), FakeAveraging()
    before = copies(module)
    trainer = trainer_with(
        *([] if skips is None else [copy.deepcopy(skips)]),
        averaging,
        accumulate_grad_batches=accumulate,
        **cpu_precision(precision),
    )
    trainer.fit(module, loader(24, 2))
    assert trainer.global_step == 6
    assert averaging.updates == 4
    trained = module.trained[accumulate - 1 :: accumulate]
    made = [weights for index, weights in enumerate(trained) if index not in (1, 4)]
    assert same(averaging.average, average_of(before, made))
    for index in (1, 4):
        assert same(trained[index], trained[index - 1])


def test_an_optimizer_that_evaluates_several_times_makes_one_update() -> None:
    module, averaging = Looked(optimizer=torch.optim.LBFGS, max_iter=5), FakeAveraging()
    before = copies(module)
    trainer_with(averaging).fit(module, loader(24, 2))
    assert averaging.updates == 6
    assert same(averaging.average, average_of(before, module.trained))


# ----------------------------------------------------------------------------------- evaluation


def test_validation_inside_a_fit_sees_the_average_and_training_does_not() -> None:
    plain, module, averaging = Looked(), Looked(), FakeAveraging()
    before = copies(module)
    options = {"val_check_interval": 2}
    trainer_with(**options).fit(plain, loader(24, 2), loader(2, 2))
    trainer_with(averaging, **options).fit(module, loader(24, 2), loader(2, 2))
    for one, other in zip(plain.trained, module.trained, strict=True):
        assert same(one, other)
    assert same(module.evaluated[0], before)  # the sanity check, before the average exists
    for index, seen in enumerate(module.evaluated[1:], 1):
        assert same(seen, average_of(before, module.trained[: 2 * index]))
    assert len(module.evaluated) == 4


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_without_a_fit_sees_the_weights_as_they_are(stage: str) -> None:
    module = Looked()
    before = copies(module)
    evaluate(trainer_with(FakeAveraging()), stage, module)
    assert same(module.evaluated[0], before)
    assert same(copies(module), before)


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_after_a_fit_sees_the_average(stage: str) -> None:
    module, averaging = Looked(), FakeAveraging()
    trainer = trainer_with(averaging)
    trainer.fit(module, loader(24, 2))
    evaluate(trainer, stage, module)
    assert same(module.evaluated[0], averaging.average)
    assert same(copies(module), module.trained[-1])


class Fails(Looked):
    """Raises in the evaluation after the sanity check."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if not self.trainer.sanity_checking:
            raise ZeroDivisionError

    test_step = validation_step


def test_an_error_in_a_validation_inside_a_fit_leaves_the_training_weights() -> None:
    module, averaging = Fails(), FakeAveraging()
    with pytest.raises(ZeroDivisionError):
        trainer_with(averaging, val_check_interval=2).fit(module, loader(24, 2), loader(2, 2))
    assert same(module.evaluated[-1], averaging.average)
    assert same(copies(module), module.trained[-1])


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_error_in_an_evaluation_of_its_own_leaves_the_training_weights(stage: str) -> None:
    module, averaging = Fails(), FakeAveraging()
    trainer = trainer_with(averaging)
    trainer.fit(module, loader(24, 2))
    with pytest.raises(ZeroDivisionError):
        evaluate(trainer, stage, module)
    assert same(module.evaluated[-1], averaging.average)
    assert same(copies(module), module.trained[-1])


def test_a_capability_taken_out_in_an_evaluation_still_ends_it() -> None:
    class Leaves(L.Callback):
        def on_validation_batch_end(self, trainer: Any, *arguments: Any) -> None:
            trainer.callbacks.remove(averaging)

    module, averaging = Looked(), FakeAveraging()
    trainer = trainer_with(averaging, Leaves())
    trainer.fit(module, loader(24, 2))
    evaluate(trainer, "validate", module)
    assert same(module.evaluated[0], averaging.average)
    assert same(copies(module), module.trained[-1])


class Inside(L.Callback):
    """A callback that forwards its hooks to a capability that is not in the Trainer's list."""

    def __init__(self, inner: FakeAveraging) -> None:
        self.inner = inner

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.inner.setup(trainer, pl_module, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_capability_inside_another_callback_is_evaluated_too(stage: str) -> None:
    module, averaging = Looked(), FakeAveraging()
    trainer = trainer_with(Inside(averaging))
    trainer.fit(module, loader(24, 2))
    evaluate(trainer, stage, module)
    assert same(module.evaluated[0], averaging.average)
    assert same(copies(module), module.trained[-1])


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_engine_in_the_list_begins_no_evaluation(stage: str) -> None:
    module, averaging = Looked(), FakeAveraging()
    trainer = trainer_with(averaging)
    trainer.fit(module, loader(24, 2))
    trainer.callbacks.append(Engine())
    evaluate(trainer, stage, module)
    assert same(module.evaluated[0], averaging.average)
    assert same(copies(module), module.trained[-1])


# ------------------------------------------------------------------------------------ checkpoints


class SavesIn(L.Callback):
    """Saves at one update, in a hook, and records the average at that time."""

    def __init__(self, path: Path, hook: str, averaging: FakeAveraging, **options: Any) -> None:
        self.path, self.saved = path, 0
        self.average: dict[str, Tensor] = {}

        def save(trainer: Any, module: Any, *arguments: Any) -> None:
            if trainer.global_step == 4 and not self.saved:
                self.saved += 1
                trainer.save_checkpoint(path, **options)
                self.average = {n: v.clone() for n, v in averaging.average.items()}

        setattr(self, hook, save)


HOOKS = [
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
]


def fit(averaging: FakeAveraging, *callbacks: Any, first: bool = True, **resume: Any) -> Looked:
    own = [averaging, LearningRateScheduler(Linear(start=1.0, end=0.0))]
    module = Looked()
    trainer = trainer_with(
        *([*callbacks, *own] if first else [*own, *callbacks]),
        max_steps=-1,
        max_epochs=2,
        val_check_interval=4,
    )
    trainer.fit(module, ResumableLoader(8, 2), loader(2, 2), **resume)
    return module


@pytest.mark.filterwarnings("ignore:You're resuming")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_checkpoint_holds_the_average_and_resumes_to_the_bit(
    tmp_path: Path, hook: str, first: bool
) -> None:
    path, straight_average = tmp_path / "saved.ckpt", FakeAveraging()
    saves = SavesIn(path, hook, straight_average)
    straight = fit(straight_average, saves, first=first)
    checkpoint = torch.load(path, weights_only=True)
    assert same(checkpoint["state_dict"], saves.average)
    assert checkpoint["state_dict"].keys() == straight.state_dict().keys()
    assert same(checkpoint["callbacks"]["FakeAveraging"]["training"], straight.trained[3])
    loaded = Looked.load_from_checkpoint(path, weights_only=True)
    assert same(copies(loaded), saves.average)
    resumed_average = FakeAveraging()
    resumed = fit(resumed_average, ckpt_path=path, weights_only=True)
    left = 3 if hook == "on_train_batch_start" else 4  # the loader has handed the batch out
    assert len(resumed.trained) == left
    if left == 4:
        for one, other in zip(straight.trained[4:], resumed.trained, strict=True):
            assert same(one, other)
        assert same(straight_average.average, resumed_average.average)
        assert same(straight.evaluated[-1], resumed.evaluated[-1])
    assert resumed_average.updates == 4 + left


def test_a_file_of_weights_alone_holds_the_average(tmp_path: Path) -> None:
    averaging = FakeAveraging()
    saves = SavesIn(tmp_path / "a.ckpt", "on_train_batch_end", averaging, weights_only=True)
    fit(averaging, saves)
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert same(checkpoint["state_dict"], saves.average)
    assert "callbacks" not in checkpoint


def test_a_bare_trainer_goes_on_from_the_average(tmp_path: Path) -> None:
    averaging = FakeAveraging()
    saves = SavesIn(tmp_path / "saved.ckpt", "on_train_batch_end", averaging)
    fit(averaging, saves)
    module = Looked()

    class Looks(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert same(copies(pl_module), saves.average)

    trainer_with(Looks(), max_steps=6).fit(
        module, ResumableLoader(8, 2), ckpt_path=tmp_path / "saved.ckpt", weights_only=True
    )
    assert len(module.trained) == 2


def test_a_checkpoint_that_is_saved_after_the_fit_resumes_too(tmp_path: Path) -> None:
    """Between fits the weights are not changed: the model in the file is the training one."""
    first = FakeAveraging()
    trainer, module = trainer_with(first, max_steps=4), Looked()
    trainer.fit(module, ResumableLoader(8, 2))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert same(saved, copies(module))
    second, resumed = FakeAveraging(), Looked()
    trainer_with(second, max_steps=8).fit(
        resumed, ResumableLoader(8, 2), ckpt_path=tmp_path / "after.ckpt", weights_only=True
    )
    straight, whole = FakeAveraging(), Looked()
    trainer_with(straight, max_steps=8).fit(whole, ResumableLoader(8, 2))
    assert same(whole.trained[-1], resumed.trained[-1])
    assert same(straight.average, second.average)
    assert (first.updates, second.updates) == (4, 8)


def test_lightnings_best_checkpoint_is_that_of_the_average(tmp_path: Path) -> None:
    """ModelCheckpoint saves in ``on_validation_end``, after the training weights are back."""

    class Scored(Looked):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("score", float(self.trainer.global_step), prog_bar=False)

    averaging, module = FakeAveraging(), Scored()
    saves = ModelCheckpoint(tmp_path, monitor="score", mode="max", save_top_k=1)
    trainer = trainer_with(averaging, saves, val_check_interval=3, enable_checkpointing=True)
    trainer.fit(module, loader(24, 2), loader(2, 2))
    saved = torch.load(saves.best_model_path, weights_only=True)
    assert same(saved["state_dict"], module.evaluated[-1])
    evaluate(trainer, "validate", module, ckpt_path="best", weights_only=True)
    assert same(module.evaluated[-1], saved["state_dict"])
