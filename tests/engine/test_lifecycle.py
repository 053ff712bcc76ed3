"""The engine in the Trainer's callbacks: added, found again, idle, copied, and removed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GradientClipping,
    GradientNoiseScale,
    LearningRateScheduleMixin,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
    StepGuard,
    ZClip,
)
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.engine import Engine
from lightning_bigopt.gradients.optimizer_step import installed_step_control
from tests.helpers import QUIET, Probe, ResumableLoader, loader

DOWN = Linear(start=1.0, end=0.0)


def all_capabilities() -> list[Any]:
    return [
        LearningRateScheduler(DOWN),
        GradientClipping(NormClip(max_norm=1e-3)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 2, "50%": 4})),
        StepGuard(),
        GradientNoiseScale(),
        OptimizationMonitor(),
    ]


class ModuleWithAllStages(Probe):
    """A module with validation, test and prediction steps."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0], batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0])


def engines(trainer: Any) -> list[Engine]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Engine)]


def trainer_with(*callbacks: Any, **options: Any) -> Any:
    return L.Trainer(**{**QUIET, "max_steps": 8, **options}, callbacks=list(callbacks))


# ------------------------------------------------------------------------- in the callback list


def test_first_capability_inserts_the_engine_right_after_itself(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1)
    callbacks = [LearningRateMonitor(), *all_capabilities(), checkpoint]
    logger = CSVLogger(tmp_path)
    trainer = trainer_with(*callbacks, enable_checkpointing=True, logger=logger)
    trainer.fit(Probe(), loader(16, 2))
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert names.index("Engine") == names.index("LearningRateScheduler") + 1
    assert names[-1] == "ModelCheckpoint"
    assert len(engines(trainer)) == 1


def test_engine_repr_lists_its_capabilities() -> None:
    shown = []

    class RecordsRepr(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            shown.append(repr(trainer.callbacks))

    trainer = trainer_with(LearningRateScheduler(DOWN), StepGuard(), RecordsRepr())
    trainer.fit(Probe(), loader(16, 2))
    assert "Engine(lightning_bigopt: runs LearningRateScheduler, StepGuard)" in shown[0]
    assert "Engine(lightning_bigopt: idle)" in repr(trainer.callbacks)


def test_second_fit_uses_the_same_engine() -> None:
    trainer, module = trainer_with(*all_capabilities(), max_steps=4), Probe(lr=1.0)
    trainer.fit(module, loader(16, 2))
    (engine,) = engines(trainer)
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, loader(16, 2))
    assert engines(trainer) == [engine]
    # Windows of 1 batch in the first half of a budget, of 2 in the second.
    assert engine.clock.batches == (2 + 4) + 8
    assert module.lrs == [1 - t / 4 for t in range(4)] + [1 - t / 8 for t in range(4, 8)]


class ModuleWithMixin(LearningRateScheduleMixin, Probe):
    def configure_learning_rate_schedule(self) -> LearningRateScheduler:
        return LearningRateScheduler(DOWN)


def test_mixin_of_a_second_module_may_come_after_the_engine() -> None:
    trainer = trainer_with(GradientClipping(NormClip(max_norm=1e-3)), max_steps=4)
    first, second = ModuleWithMixin(lr=1.0), ModuleWithMixin(lr=1.0)
    trainer.fit(first, loader(16, 2))
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(second, loader(16, 2))
    assert len(engines(trainer)) == 1
    assert second.lrs == [1 - t / 8 for t in range(4, 8)]
    assert max(second.norms) < 1.001e-3


def test_capabilities_are_reset_for_another_trainer() -> None:
    clipping = GradientClipping(ZClip(warmup=2))
    trainer_with(clipping).fit(Probe(), loader(16, 2))
    assert clipping.reports()
    seen = []

    class RecordsState(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(clipping.reports())

    trainer_with(clipping, RecordsState()).fit(Probe(), loader(16, 2))
    assert seen == [{}]


def test_engine_and_its_capabilities_are_reset_for_another_trainer() -> None:
    first = trainer_with(LearningRateScheduler(DOWN), GradientClipping(ZClip(warmup=2)))
    first.fit(Probe(), loader(16, 2))
    module = Probe(lr=1.0)
    second = trainer_with(*first.callbacks)
    second.fit(module, loader(16, 2))
    assert engines(second) == engines(first)
    assert module.lrs == [1 - t / 8 for t in range(8)]
    (report,) = second.callbacks[2].reports().values()
    assert report.updates == 8


@pytest.mark.parametrize("by_pickle", [True, False], ids=["pickle", "deepcopy"])
def test_copies_of_trained_callbacks_are_reset_for_another_trainer(by_pickle: bool) -> None:
    first = trainer_with(LearningRateScheduler(DOWN), GradientClipping(ZClip(warmup=2)))
    first.fit(Probe(), loader(16, 2))

    def copied(thing: Any) -> Any:
        return pickle.loads(pickle.dumps(thing)) if by_pickle else copy.deepcopy(thing)

    module = Probe(lr=1.0)
    second = trainer_with(*copied(first.callbacks))
    second.fit(module, loader(16, 2))
    assert module.lrs == [1 - t / 8 for t in range(8)]
    (report,) = second.callbacks[2].reports().values()
    assert report.updates == 8
    # A copy of the whole Trainer continues instead.
    module, third = Probe(lr=1.0), copied(first)
    third.fit_loop.epoch_loop.max_steps = 16
    third.fit(module, loader(16, 2))
    assert module.lrs == [1 - t / 16 for t in range(8, 16)]
    (report,) = third.callbacks[2].reports().values()
    assert report.updates == 16


# --------------------------------------------------------------------------------- subclasses


class SetupFirst:
    """A user's mixin with a setup of its own, listed before the capability."""

    def setup(self, *arguments: Any, **options: Any) -> None:
        self.was_set_up = True


class MixedIn(SetupFirst, GradientClipping):
    pass


class Overridden(GradientClipping):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.was_set_up = True


class WithSuper(GradientClipping):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.was_set_up = True


class Grandchild(Overridden):
    pass


@pytest.mark.parametrize("kind", [MixedIn, Overridden, WithSuper, Grandchild])
def test_subclass_that_overrides_setup_keeps_the_engine(kind: Any) -> None:
    clipping, module = kind(NormClip(max_norm=1e-3)), Probe()
    trainer = trainer_with(clipping)
    trainer.fit(module, loader(16, 2))
    assert clipping.was_set_up
    assert len(engines(trainer)) == 1
    assert max(module.norms) < 1.001e-3


# ----------------------------------------------------------------------------- removed during a run


class Removes(L.Callback):
    def __init__(self, removed: Any, *, at: int, hook: str) -> None:
        self.removed, self.at = removed, at

        def remove(trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == self.at and self.removed in trainer.callbacks:
                trainer.callbacks.remove(self.removed)

        setattr(self, hook, remove)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("first", [True, False])
def test_removing_a_callback_in_mid_run_stops_only_that_capability(first: bool, hook: str) -> None:
    scheduler = LearningRateScheduler(DOWN)
    clipping = GradientClipping(NormClip(max_norm=1e-3))
    pair = [scheduler, clipping] if first else [clipping, scheduler]
    module = Probe(lr=1.0)
    trainer = trainer_with(Removes(scheduler, at=4, hook=hook), *pair)
    trainer.fit(module, loader(16, 2))
    assert max(module.norms) < 1.001e-3
    assert len(module.norms) == 8
    assert module.lrs[:4] == [1 - t / 8 for t in range(4)]
    assert len(set(module.lrs[5:])) == 1  # no longer scheduled


def test_removed_scheduler_keeps_its_last_value_under_an_adjustment() -> None:
    scheduler = LearningRateScheduler(DOWN)
    policy = BatchSizeScheduler(BatchSizeSteps({"0%": 2, "50%": 8}), lr_scaling="sqrt")
    module = Probe(lr=1.0)
    trainer = trainer_with(Removes(scheduler, at=2, hook="on_train_batch_end"), scheduler, policy)
    trainer.fit(module, loader(16, 2))
    assert module.lrs[:3] == [1.0, 7 / 8, 6 / 8]
    assert module.lrs[3] == module.lrs[2]
    assert module.lrs[-1] == pytest.approx(2 * module.lrs[2])  # a batch of 4 times the size


def test_callback_that_is_added_in_mid_run_warns_once_and_trains_in_the_next_fit() -> None:
    clipping = GradientClipping(NormClip(max_norm=1e-3))

    class Adds(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 3 and clipping not in trainer.callbacks:
                trainer.callbacks.append(clipping)
            if trainer.global_step == 5:  # the list changes again
                trainer.callbacks.append(L.Callback())

    module = Probe(lr=1.0)
    trainer = trainer_with(Adds(), LearningRateScheduler(DOWN), max_epochs=1, max_steps=-1)
    with pytest.warns(UserWarning, match=r"GradientClipping.* was added .* no effect") as given:
        trainer.fit(module, loader(16, 2))
    assert sum("was added" in str(warning.message) for warning in given) == 1
    first = len(module.norms)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(16, 2))
    assert len(module.norms) > first
    assert max(module.norms[first:]) < 1.001e-3


def test_checkpoint_after_removing_the_scheduler_keeps_the_base_learning_rate(
    tmp_path: Path,
) -> None:
    scheduler = LearningRateScheduler(DOWN)
    trainer = trainer_with(Removes(scheduler, at=4, hook="on_train_batch_end"), scheduler)
    trainer.fit(Probe(lr=1.0), loader(16, 2))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert [state["base_lrs"] for state in saved["lr_schedulers"]] == [[1.0]]


def test_removing_batch_size_scheduler_keeps_accumulation_windows_aligned() -> None:
    batches = BatchSizeScheduler(ConstantBatchSize(6))
    module = Probe()
    removes = Removes(batches, at=2, hook="on_train_batch_end")
    trainer = trainer_with(removes, batches, LearningRateScheduler(DOWN), max_steps=10)
    trainer.fit(module, loader(40, 2))
    assert [len(window) for window in module.windows] == [6, 6] + [2] * 8
    assert max(module.errors) < 1e-5


def test_callback_that_removes_itself_in_a_batch_hook_does_not_stop_the_engine() -> None:
    class RemovesItself(GradientClipping):
        """Lightning then skips the next callback in this hook, which is the engine."""

        def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 3:
                trainer.callbacks.remove(self)

    module = Probe(lr=1.0)
    trainer = trainer_with(RemovesItself(NormClip(max_norm=1e-3)), LearningRateScheduler(DOWN))
    trainer.fit(module, loader(16, 2))
    assert module.lrs == [1 - t / 8 for t in range(8)]
    assert engines(trainer)[0].clock.batches == 8


# ------------------------------------------------------------------------------- every stage


@pytest.mark.filterwarnings("error", "ignore:`isinstance.treespec:FutureWarning")
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_without_a_fit_is_unchanged(stage: str) -> None:
    plain, ours = ModuleWithAllStages(), ModuleWithAllStages()
    options = {"verbose": False} if stage != "predict" else {}
    expected = getattr(trainer_with(), stage)(plain, loader(4, 2), **options)
    trainer = trainer_with(*all_capabilities())
    found = getattr(trainer, stage)(ours, loader(4, 2), **options)
    if stage == "predict":
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    else:
        assert expected == found
    for one, other in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not [name for name in vars(trainer.strategy) if name in PATCHED]


PATCHED = ("process_dataloader", "lightning_module_state_dict")


def test_fit_removes_its_patches_from_strategy_and_optimizer() -> None:
    trainer = trainer_with(*all_capabilities())
    before = set(vars(trainer.strategy))
    trainer.fit(Probe(), loader(16, 2))
    assert set(vars(trainer.strategy)) - before <= {"_lightning_module"}
    assert not [name for name in vars(trainer.strategy) if name in PATCHED]
    (optimizer,) = trainer.optimizers
    assert installed_step_control(optimizer) is None
    assert "step" not in vars(optimizer)
    assert trainer.accumulate_grad_batches == 1


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_after_a_fit_keeps_the_clock(stage: str, tmp_path: Path) -> None:
    trainer, module = trainer_with(*all_capabilities(), max_steps=4), ModuleWithAllStages(lr=1.0)
    trainer.fit(module, loader(16, 2))
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, loader(16, 2))
    (engine,) = engines(trainer)
    clock = engine.clock.state_dict()
    getattr(trainer, stage)(
        module, loader(4, 2), ckpt_path=tmp_path / "four.ckpt", weights_only=True
    )
    assert engine.clock.state_dict() == clock


@pytest.mark.parametrize(
    "options",
    [
        {"barebones": True, "logger": None, "enable_checkpointing": None},
        {"overfit_batches": 2},
        {"fast_dev_run": 3},
        {"limit_train_batches": 3, "max_steps": -1, "max_epochs": 2},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:.*barebones.*", "ignore:.*overfit.*")
def test_barebones_overfit_fast_dev_run_and_limited_trainers_train(options: dict[str, Any]) -> None:
    quiet = {
        **QUIET,
        "max_steps": 6,
        **options,
    }
    if options.get("barebones"):
        quiet = {"accelerator": "cpu", "max_steps": 6, "barebones": True}
    module = Probe(lr=1.0)
    callbacks = [LearningRateScheduler(DOWN), GradientClipping(NormClip(max_norm=1e-3))]
    L.Trainer(**quiet, callbacks=callbacks).fit(module, loader(16, 2))
    assert max(module.norms) < 1.001e-3
    assert module.lrs == sorted(module.lrs, reverse=True)
    assert module.lrs[0] == 1.0


# ---------------------------------------------------------------------------------- copies


class CopiesInMidFit(L.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        if trainer.global_step != 3:
            return
        self.trainers = [copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))]
        self.modules = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]
        self.callbacks = [copy.deepcopy(c) for c in trainer.callbacks if c is not self]

    def __getstate__(self) -> dict[str, Any]:
        return {}


def test_trainer_module_and_callbacks_copy_and_pickle_before_during_and_after_a_fit() -> None:
    copies, trainer = CopiesInMidFit(), trainer_with(*all_capabilities())
    trainer.callbacks.append(copies)
    for copied in (copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))):
        assert len(copied.callbacks) == len(trainer.callbacks)
    module = Probe()
    trainer.fit(module, loader(16, 2))
    after = [copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))]
    for copied in [*copies.trainers, *after]:
        (engine,) = engines(copied)
        assert repr(engine) == "Engine(lightning_bigopt: idle)"
    for copied in copies.modules:
        fresh = Probe(lr=1.0)
        fresh.load_state_dict(copied.state_dict())
        trainer_with(*all_capabilities()).fit(fresh, loader(16, 2))
    trainer_with(*copies.callbacks).fit(Probe(), loader(16, 2))


# -------------------------------------------- state that is loaded but not resumed from: finders


class Tunable(Probe):
    def __init__(self) -> None:
        super().__init__(lr=0.05)
        self.lr, self.batch_size = 0.05, 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return loader(64, self.batch_size)


def saved_state(callback: Any) -> Any:
    return copy.deepcopy(callback.state_dict())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The checkpoint was trained for 4 steps")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("finder", ["learning rate", "batch size"])
def test_finders_of_lightning_keep_the_state_of_a_resume(
    tmp_path: Path, finder: str, first: bool
) -> None:
    """At a resume they save and restore all callbacks before the loaded state is used."""

    def capabilities() -> list[Any]:
        return [LearningRateScheduler(DOWN), GradientClipping(ZClip(warmup=2)), StepGuard()]

    straight = trainer_with(*capabilities(), max_steps=4, default_root_dir=tmp_path)
    straight.fit(Tunable())
    straight.save_checkpoint(tmp_path / "four.ckpt")
    expected = [saved_state(callback) for callback in straight.callbacks]
    finders = {
        "learning rate": lambda: LearningRateFinder(num_training_steps=20, update_attr=False),
        "batch size": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=1),
    }
    seen = []

    class RecordsState(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.extend(saved_state(c) for c in trainer.callbacks if hasattr(c, "saved_state"))

    own = capabilities()
    callbacks = [finders[finder](), *own] if first else [*own, finders[finder]()]
    trainer = trainer_with(*callbacks, RecordsState(), max_steps=8, default_root_dir=tmp_path)
    module = Tunable()
    trainer.fit(module, ckpt_path=tmp_path / "four.ckpt", weights_only=True)
    kept = [state for state in expected if "clock" not in state]
    assert seen == kept
    assert trainer.global_step == 8


def test_the_tuner_trains_nothing_and_changes_no_state(tmp_path: Path) -> None:
    clipping = GradientClipping(ZClip(warmup=2))
    trainer = trainer_with(LearningRateScheduler(DOWN), clipping, default_root_dir=tmp_path)
    module = Tunable()
    Tuner(trainer).lr_find(module, num_training=20)
    assert clipping.reports() == {}
    before = len(module.lrs)
    trainer.fit(module)
    (engine,) = engines(trainer)
    assert module.lrs[before:] == pytest.approx([module.lr * (1 - t / 8) for t in range(8)])
    assert engine.clock.batches == 8


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_loaded_state_that_no_fit_used_is_dropped(tmp_path: Path) -> None:
    trainer = trainer_with(GradientClipping(ZClip(warmup=2)), max_steps=4)
    trainer.fit(ModuleWithAllStages(), loader(16, 2))
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    clipping = GradientClipping(ZClip(warmup=2))
    other = trainer_with(clipping)
    other.test(
        ModuleWithAllStages(),
        loader(4, 2),
        ckpt_path=tmp_path / "four.ckpt",
        weights_only=True,
        verbose=False,
    )
    assert clipping.take_loaded_state() is None
    module = ModuleWithAllStages()
    other.fit(module, loader(16, 2))
    (report,) = clipping.reports().values()
    assert report.updates == 8


def test_resuming_a_finished_run_keeps_its_state(tmp_path: Path) -> None:
    def capabilities() -> list[Any]:
        return [LearningRateScheduler(DOWN), GradientClipping(ZClip(warmup=2))]

    trainer = trainer_with(*capabilities(), max_steps=4)
    trainer.fit(Probe(), loader(16, 2))
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    again = trainer_with(*capabilities(), max_steps=4)
    again.fit(Probe(), loader(16, 2), ckpt_path=tmp_path / "four.ckpt", weights_only=True)
    again.save_checkpoint(tmp_path / "again.ckpt")
    one, other = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("four", "again"))
    assert one["callbacks"] == other["callbacks"]


@pytest.mark.parametrize("limits", [{"max_steps": 8}, {"max_steps": -1, "max_epochs": 2}])
def test_checkpoint_of_a_plain_trainer_resumes_with_callbacks_added(
    tmp_path: Path, limits: dict[str, int]
) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "bare.ckpt")

    trainer_with(Saves(), **limits).fit(Probe(lr=1.0), ResumableLoader(8, 2))
    module = Probe(lr=1.0)
    scheduler = LearningRateScheduler(DOWN)
    with pytest.warns(UserWarning, match="written without LearningRateScheduler"):
        trainer_with(scheduler, GradientClipping(NormClip()), **limits).fit(
            module, ResumableLoader(8, 2), ckpt_path=tmp_path / "bare.ckpt", weights_only=True
        )
    assert module.lrs == [1 - t / 8 for t in range(3, 8)]


@pytest.mark.parametrize(
    ("name", "attributes"), [("rank", {"owns": "mine"}), ("owns", {"rank": 90}), ("owns", {})]
)
def test_a_capability_without_owns_or_rank_is_refused(
    name: str, attributes: dict[str, Any]
) -> None:
    own = type("Own", (Capability,), attributes)
    trainer = L.Trainer(**QUIET, max_steps=2, callbacks=[LearningRateScheduler(DOWN), own()])
    with pytest.raises(
        ValueError, match=rf"^{name} must be an attribute .*, got none in Own; write"
    ):
        trainer.fit(Probe(), loader(8, 2))
