"""A capability for optimizers with a training and an evaluation mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_bigopt import GradientClipping, LearningRateScheduler, Linear, NormClip
from tests.engine.fake_averaging import copies
from tests.engine.fake_optimizer_modes import FakeOptimizerModes, ModalSGD
from tests.helpers import QUIET, Probe, ResumableLoader, loader

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


class Modal(Probe):
    """Records in hooks the weights, the optimizer's mode and the mean of its training weights."""

    def __init__(self) -> None:
        super().__init__(lr=0.05, optimizer=ModalSGD)
        self.trained: list[dict[str, Tensor]] = []
        self.evaluated: list[tuple[bool, dict[str, Tensor]]] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.lrs.append(optimizer.param_groups[0]["lr"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert all(group["train_mode"] for group in self.trainer.optimizers[0].param_groups)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.trained.append(copies(self))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        modes = [one.param_groups[0]["train_mode"] for one in self.trainer.optimizers]
        self.evaluated.append((any(modes), copies(self)))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.validation_step(batch, batch_idx)
        return torch.zeros(1)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def mean_of(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    mean = {name: torch.zeros_like(value) for name, value in weights[0].items()}
    for count, each in enumerate(weights, 1):
        for name, value in each.items():
            mean[name].lerp_(value, 1 / count)
    return mean


def own() -> list[Any]:
    clipping = GradientClipping(NormClip(max_norm=1.0))
    return [FakeOptimizerModes(), LearningRateScheduler(Linear(start=1.0, end=0.0)), clipping]


def trainer_with(*callbacks: Any, **options: Any) -> Any:
    return L.Trainer(**{**QUIET, "max_steps": 8, **options}, callbacks=list(callbacks))


def test_evaluations_in_a_fit_see_the_mean_and_steps_the_training_weights() -> None:
    plain, module = Modal(), Modal()
    trainer_with(*own()).fit(plain, loader(16, 2))
    trainer_with(*own(), val_check_interval=2).fit(module, loader(16, 2), loader(2, 2))
    for one, other in zip(plain.trained, module.trained, strict=True):
        assert same(one, other)
    for index, (in_train_mode, seen) in enumerate(module.evaluated[1:], 1):
        assert not in_train_mode
        assert same(seen, mean_of(module.trained[: 2 * index]))
    assert len(module.evaluated) == 5
    assert same(copies(module), mean_of(module.trained))  # a fit ends in evaluation mode


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("after_fit", [True, False])
def test_evaluations_of_their_own(stage: str, after_fit: bool) -> None:
    module, trainer = Modal(), trainer_with(*own())
    expected = copies(module)
    if after_fit:
        trainer.fit(module, loader(16, 2))
        expected = mean_of(module.trained)
    silent = {} if stage == "predict" else {"verbose": False}
    getattr(trainer, stage)(module, loader(2, 2), **silent)
    assert same(module.evaluated[0][1], expected)
    assert same(copies(module), expected)


def test_a_second_fit_goes_on_with_the_training_weights() -> None:
    straight, module = Modal(), Modal()
    trainer_with(*own()).fit(straight, loader(16, 2))
    trainer = trainer_with(*own(), max_steps=4)
    trainer.fit(module, loader(8, 2))
    assert not trainer.optimizers[0].param_groups[0]["train_mode"]
    first = copies(module)
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, loader(16, 2))
    assert same(first, mean_of(module.trained[:4]))
    assert len(module.trained) == 8


class SavesIn(L.Callback):
    def __init__(self, path: Path, hook: str) -> None:
        self.saved = 0

        def save(trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 4 and not self.saved:
                self.saved += 1
                before = trainer.optimizers[0].param_groups[0]["train_mode"]
                trainer.save_checkpoint(path)
                assert trainer.optimizers[0].param_groups[0]["train_mode"] == before

        setattr(self, hook, save)


HOOKS = ["on_train_batch_end", "on_validation_start", "on_validation_batch_end"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", [*HOOKS, "on_validation_end", "on_train_epoch_end"])
def test_a_checkpoint_holds_the_mean_and_resumes_to_the_bit(
    tmp_path: Path, hook: str, first: bool
) -> None:
    def fit(*callbacks: Any, **resume: Any) -> Modal:
        module = Modal()
        trainer = trainer_with(
            *([*callbacks, *own()] if first else [*own(), *callbacks]),
            max_steps=-1,
            max_epochs=2,
            val_check_interval=4,
        )
        trainer.fit(module, ResumableLoader(8, 2), loader(2, 2), **resume)
        return module

    path = tmp_path / "saved.ckpt"
    straight = fit(SavesIn(path, hook))
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert same(saved, mean_of(straight.trained[:4]))
    assert same(copies(Modal.load_from_checkpoint(path, weights_only=True)), saved)
    resumed = fit(ckpt_path=path, weights_only=True)
    assert resumed.lrs == straight.lrs[4:]
    for one, other in zip(straight.trained[4:], resumed.trained, strict=True):
        assert same(one, other)
    assert same(straight.evaluated[-1][1], resumed.evaluated[-1][1])
