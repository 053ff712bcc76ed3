"""Checkpoints saved in any hook by any callback hold the state that ``global_step`` counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    Constant,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    StepGuard,
    ZClip,
)
from lightning_bigopt.engine.capability import Capability
from tests.helpers import QUIET, Probe, Regression, loader
from tests.older_lightning import fault_of_2_5_0


def capabilities() -> list[Any]:
    return [
        LearningRateScheduler(Linear(start=1.0, end=0.0)),
        HyperparameterScheduler("weight_decay", Linear(start=1.0, end=0.5)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 2, "50%": 5}), lr_scaling="sqrt"),
        GradientClipping(ZClip(warmup=3)),
        StepGuard(),
    ]


class ModuleWithValidation(Probe):
    def __init__(self) -> None:
        super().__init__(lr=0.1, optimizer=torch.optim.AdamW, weight_decay=0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0], batch[1]))


class SavesIn(L.Callback):
    """Saves once, in a given hook at a given update."""

    def __init__(self, path: Path, hook: str, *, at: int) -> None:
        self.path, self.at = path, at
        self.saved_at: int | None = None

        def save(trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == self.at and self.saved_at is None:
                self.saved_at = self.at
                trainer.save_checkpoint(self.path)

        setattr(self, hook, save)


def fit(module: L.LightningModule, callbacks: list[Any], **resume: Any) -> None:
    data = GlobalBatchLoader(Regression(23), micro_batch_size=2, seed=1)
    options: dict[str, Any] = {**QUIET, "max_epochs": 2, "val_check_interval": 4}
    options["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = L.Trainer(**options, callbacks=callbacks)
    trainer.fit(module, data, loader(4, 2), **resume)


HOOKS = [
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_epoch_end",
]


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("hook", HOOKS)
def test_checkpoint_saved_in_any_hook_resumes_at_global_step(
    tmp_path: Path, hook: str, place: str
) -> None:
    straight = ModuleWithValidation()
    at = 12 if hook == "on_train_epoch_end" else 8
    saves = SavesIn(tmp_path / "saved.ckpt", hook, at=at)
    own = capabilities()
    fit(straight, [saves, *own] if place == "first" else [*own, saves])
    assert saves.saved_at == at, len(straight.lrs)
    resumed = ModuleWithValidation()
    fit(resumed, capabilities(), ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
    assert resumed.lrs == straight.lrs[at:]
    assert resumed.windows == straight.windows[at:]
    assert resumed.norms == straight.norms[at:]
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@fault_of_2_5_0("no ModelCheckpoint(save_on_exception=)")
@pytest.mark.parametrize("place", ["first", "last"])
def test_checkpoint_of_an_error_resumes_at_global_step(tmp_path: Path, place: str) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 8:
                raise ZeroDivisionError

    straight = ModuleWithValidation()
    fit(straight, capabilities())
    own = [Fails(), *capabilities()] if place == "first" else [*capabilities(), Fails()]
    saves = ModelCheckpoint(tmp_path, filename="saved", save_on_exception=True, every_n_epochs=99)
    with pytest.raises(ZeroDivisionError):
        fit(ModuleWithValidation(), [*own, saves])
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]
    engine = next(state for key, state in saved.items() if "Engine" in key)
    assert engine["groups"] == {"weight_decay": [[0.1]]}
    assert engine["loader"] is not None
    resumed = ModuleWithValidation()
    fit(resumed, capabilities(), ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
    assert resumed.lrs == straight.lrs[8:]
    assert resumed.norms == straight.norms[8:]


def test_checkpoint_saved_after_a_fit_continues_the_loader_and_keeps_bases(tmp_path: Path) -> None:
    def train(epochs: int, module: Probe, **resume: Any) -> Any:
        own = [
            LearningRateScheduler(Constant(), on_resume="extend"),
            HyperparameterScheduler("weight_decay", Constant()),
            BatchSizeScheduler(ConstantBatchSize(4)),
        ]
        trainer = L.Trainer(**QUIET, max_epochs=epochs, callbacks=own)
        data = GlobalBatchLoader(Regression(23), micro_batch_size=2, seed=1)
        trainer.fit(module, data, **resume)
        return trainer

    def model(weight_decay: float) -> Probe:
        return Probe(lr=0.01, optimizer=torch.optim.AdamW, weight_decay=weight_decay)

    straight = model(0.1)
    train(4, straight)
    train(2, model(0.1)).save_checkpoint(tmp_path / "saved.ckpt")
    # A resume of the finished run, which trains nothing, saves the same state.
    finished = train(2, model(0.1), ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
    finished.save_checkpoint(tmp_path / "again.ckpt")
    for name in ("saved.ckpt", "again.ckpt"):
        # The base of the checkpoint is used, not the changed one of the config.
        resumed = model(0.2)
        train(4, resumed, ckpt_path=tmp_path / name, weights_only=True)
        for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_validation_end"])
@pytest.mark.filterwarnings("ignore:The checkpoint was written without LearningRateScheduler")
@pytest.mark.parametrize("at", [4, 6, 8])
def test_checkpoint_of_a_bare_trainer_continues_epochs(tmp_path: Path, hook: str, at: int) -> None:
    saves = SavesIn(tmp_path / "saved.ckpt", hook, at=at)
    options: dict[str, Any] = {**QUIET, "max_epochs": 3}
    trainer = L.Trainer(**options, callbacks=[saves])
    trainer.fit(ModuleWithValidation(), loader(8, 2), loader(4, 2))
    if at == 6 and hook != "on_train_batch_end":
        assert saves.saved_at is None  # update 6 is inside an epoch
        return
    resumed = ModuleWithValidation()
    trainer = L.Trainer(**options, callbacks=[LearningRateScheduler(Linear(start=1.0, end=0.0))])
    trainer.fit(
        resumed, loader(8, 2), loader(4, 2), ckpt_path=tmp_path / "saved.ckpt", weights_only=True
    )
    assert resumed.lrs == pytest.approx([0.1 * (1 - t / 12) for t in range(at, 12)])


# ------------------------------------------------------------------------------ saved weights


class AddsOneToSavedBias(Capability):
    """A capability that adds one to a bias in the saved weights."""

    owns, rank = "marks", 70
    collected = 0

    def saved_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.collected += 1
        return {**state_dict, "net.2.bias": state_dict["net.2.bias"] + 1}


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_saved_weights_are_changed_in_full_and_weights_only_checkpoints(
    tmp_path: Path, weights_only: bool, hook: str
) -> None:
    path = tmp_path / "saved.ckpt"
    found = []

    class Saves(L.Callback):
        def save(self, trainer: Any, module: Any, *arguments: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(path, weights_only=weights_only)
                found.append(module.net[2].bias.detach().clone())

    setattr(Saves, hook, Saves.save)
    trainer = L.Trainer(
        **QUIET, max_steps=6, limit_train_batches=3, callbacks=[Saves(), AddsOneToSavedBias()]
    )
    module = Probe()
    trainer.fit(module, loader(16, 2))
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(saved["net.2.bias"], found[0] + 1)
    assert saved.keys() == module.state_dict().keys()
    Probe.load_from_checkpoint(path, weights_only=True)
    trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=weights_only)
    after = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(after["net.2.bias"], module.net[2].bias)


def test_batch_ends_before_weights_are_collected(tmp_path: Path) -> None:
    """Weights are collected before the callbacks' states, so the batch must end before both."""
    order = []

    class RecordsOrder(AddsOneToSavedBias):
        def end_batch(self, batch: Any) -> None:
            order.append("end")

        def saved_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            order.append("weights")
            return state_dict

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "saved.ckpt", weights_only=True)

    trainer = L.Trainer(**QUIET, max_steps=3, callbacks=[Saves(), RecordsOrder()])
    trainer.fit(Probe(), loader(16, 2))
    assert order == ["end", "end", "weights", "end"]


def test_saved_weights_are_unchanged_while_a_finder_trains(tmp_path: Path) -> None:
    """Lightning's finder replaces the callbacks, trains, and restores its own checkpoint."""

    class Tunable(Probe):
        lr = 0.05

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    class RecordsSavedWeights(LearningRateFinder):
        def lr_find(self, trainer: Any, pl_module: Any) -> None:
            original = type(trainer.strategy).optimizer_step

            def step(strategy: Any, *arguments: Any, **options: Any) -> Any:
                result = original(strategy, *arguments, **options)
                weights.append(strategy.lightning_module_state_dict()["net.2.bias"].clone())
                biases.append(pl_module.net[2].bias.detach().clone())
                return result

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(trainer.strategy), "optimizer_step", step)
                super().lr_find(trainer, pl_module)

    weights: list[Any] = []
    biases: list[Any] = []
    finder = RecordsSavedWeights(
        num_training_steps=10, update_attr=False, early_stop_threshold=None
    )
    trainer = L.Trainer(
        **QUIET, max_steps=2, callbacks=[AddsOneToSavedBias(), finder], default_root_dir=tmp_path
    )
    trainer.fit(Tunable(), loader(64, 2))
    assert len(weights) >= 10
    assert all(torch.equal(one, other) for one, other in zip(weights, biases, strict=True))
