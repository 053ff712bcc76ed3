"""Optimizers with a training and an evaluation mode, against a plain loop without Lightning."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import schedulefree
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from lightning_bigopt import (
    BatchSizeScheduler,
    Constant,
    ConstantBatchSize,
    Cosine,
    GlobalBatchFinder,
    GlobalBatchLoader,
    GradientClipping,
    LearningRateRangeTest,
    LearningRateScheduler,
    NonFinite,
    NormClip,
    StepGuard,
    WarmupConstant,
    WarmupLinear,
    combine_optimizers,
    learning_rate_range_test,
)
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.optimizer_modes import OptimizerModes
from lightning_bigopt.engine.stage import Batch
from lightning_bigopt.engine.update import Rejection, Update
from tests.engine.fake_averaging import STAGES, copies, evaluate
from tests.engine.modal_optimizers import Free, MeanSGD, StrictSGD, SwappingSGD, plain_loop
from tests.helpers import QUIET, ManualLayers, Regression, ResumableLoader, cpu_precision, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:You're resuming"),
]

SCHEDULEFREE = [
    schedulefree.AdamWScheduleFree,
    schedulefree.SGDScheduleFree,
    schedulefree.RAdamScheduleFree,
    schedulefree.AdamWScheduleFreeReference,
    schedulefree.SGDScheduleFreeReference,
]
HOOKED = [MeanSGD, SwappingSGD]  # eval() of StrictSGD raises in the hooks of a module
OWN = [*HOOKED, StrictSGD]
every_optimizer = pytest.mark.parametrize("optimizer", [*SCHEDULEFREE, *OWN])
AdamW = schedulefree.AdamWScheduleFree


class Idle(Capability):
    """A capability without stages, which brings the engine."""

    owns, rank = "nothing", 90


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def all_same(some: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> bool:
    return len(some) == len(others) and all(map(same, some, others))


def trainer_with(*callbacks: Any, **options: Any) -> Any:
    return L.Trainer(**{**QUIET, "max_steps": 8, **options}, callbacks=list(callbacks))


def batches() -> Iterable[Any]:
    return loader(16, 2)


# --------------------------------------------------------------------------- training, evaluation


@every_optimizer
def test_training_and_validations_equal_a_plain_loop(optimizer: Any) -> None:
    trained, evaluated, end = plain_loop(optimizer, batches(), evaluate_after=[3, 6])
    module = Free(optimizer)
    trainer_with(Idle(), val_check_interval=3).fit(module, loader(16, 2), loader(2, 2))
    assert all_same(module.trained, trained)
    assert all_same(module.evaluated[1:], evaluated)  # after the sanity check
    assert same(copies(module), copies(end))  # a fit ends in evaluation mode
    assert not same(trained[-1], copies(end))


@pytest.mark.parametrize("stage", STAGES)
def test_evaluations_after_a_fit_see_the_weights_of_evaluation(stage: str) -> None:
    _, _, end = plain_loop(AdamW, batches())
    module, trainer = Free(AdamW), trainer_with(Idle())
    trainer.fit(module, loader(16, 2))
    evaluate(trainer, stage, module)
    assert same(module.evaluated[0], copies(end))
    assert same(copies(module), copies(end))


@pytest.mark.parametrize("stage", STAGES)
def test_an_evaluation_of_a_checkpoint_sees_its_weights(tmp_path: Path, stage: str) -> None:
    module, trainer = Free(AdamW), trainer_with(SavesIn(tmp_path / "a", "on_train_batch_end"))
    trainer.callbacks.append(Idle())
    trainer.fit(module, loader(16, 2))
    saved = torch.load(tmp_path / "a", weights_only=True)["state_dict"]
    assert not same(saved, copies(module))
    trainer.optimizers[0].train()  # by the user: the weights of the file are not trained ones
    evaluate(trainer, stage, module, ckpt_path=tmp_path / "a", weights_only=True)
    assert same(module.evaluated[0], saved)
    other = Free(AdamW)
    evaluate(trainer_with(Idle()), stage, other, ckpt_path=tmp_path / "a", weights_only=True)
    assert same(other.evaluated[0], saved)


def half_free(parameters: Any, lr: float, *, free: Any) -> torch.optim.Optimizer:
    """Returns SGD and an optimizer with modes as one optimizer, for the same parameters."""
    module = nn.ParameterList(parameters)
    return combine_optimizers(
        module, {"0": partial(torch.optim.SGD, lr=lr), "*": partial(free, lr=lr)}
    )


class Guided(Free):
    """Has the hooks that Lightning needs without this package."""

    def on_train_start(self) -> None:
        self.optimizers(use_pl_optimizer=False).train()  # type: ignore[union-attr]

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.optimizers(use_pl_optimizer=False).eval()  # type: ignore[union-attr]

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.optimizers(use_pl_optimizer=False).train()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "optimizer", [*SCHEDULEFREE, *HOOKED, *(partial(half_free, free=o) for o in [AdamW, *HOOKED])]
)
def test_hooks_of_the_module_that_switch_too_equal_a_plain_loop(
    optimizer: Any, tmp_path: Path
) -> None:
    trained, evaluated, end = plain_loop(optimizer, batches(), switch_after=[3, 6])
    module, resumed = Guided(optimizer), Guided(optimizer)
    saves = SavesIn(tmp_path / "a.ckpt", "on_train_batch_end")
    options = {"val_check_interval": 3}
    trainer_with(Idle(), saves, **options).fit(module, ResumableLoader(16, 2), loader(2, 2))
    assert all_same(module.trained, trained)
    assert all_same(module.evaluated[1:], evaluated)
    assert same(copies(module), copies(end))
    trainer_with(Idle(), **options).fit(
        resumed, ResumableLoader(16, 2), loader(2, 2), ckpt_path=saves.path, weights_only=True
    )
    assert all_same(resumed.trained, trained[4:])


# ------------------------------------------------------------------------------------ checkpoints


class SavesIn(L.Callback):
    """Saves in a hook after some updates."""

    def __init__(self, path: Path, hook: str, *, at: int = 4, **options: Any) -> None:
        self.path, self.saved = path, 0

        def save(trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == at and not self.saved and not trainer.sanity_checking:
                self.saved += 1
                trainer.save_checkpoint(path, **options)

        setattr(self, hook, save)


HOOKS = [
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
]


def fit_two_epochs(module: Free, *callbacks: Any, accumulate: int = 1, **resume: Any) -> Free:
    size = 16 * accumulate
    trainer_with(
        *callbacks,
        max_steps=-1,
        max_epochs=2,
        val_check_interval=size // 4,
        accumulate_grad_batches=accumulate,
    ).fit(module, ResumableLoader(size, 2), loader(2, 2), **resume)
    return module


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("optimizer", [AdamW, MeanSGD, StrictSGD, SwappingSGD])
def test_a_checkpoint_holds_the_weights_of_evaluation_and_resumes_to_the_bit(
    tmp_path: Path, optimizer: Any, hook: str, first: bool
) -> None:
    at = 8 if hook == "on_train_epoch_end" else 4
    saves = SavesIn(tmp_path / "a.ckpt", hook, at=at)
    callbacks = [saves, Idle()] if first else [Idle(), saves]
    unsaved = fit_two_epochs(Free(optimizer), Idle())
    straight = fit_two_epochs(Free(optimizer), *callbacks)
    assert all_same(straight.trained, unsaved.trained)  # saving changes nothing
    checkpoint = torch.load(saves.path, weights_only=True)
    assert checkpoint["state_dict"].keys() == straight.state_dict().keys()
    expected = plain_loop(optimizer, batches(), evaluate_after=[at])[1][0]
    assert same(checkpoint["state_dict"], expected)
    loaded = Free.load_from_checkpoint(saves.path, weights_only=True, optimizer=optimizer)
    assert same(copies(loaded), expected)
    resumed = fit_two_epochs(Free(optimizer), Idle(), ckpt_path=saves.path, weights_only=True)
    if hook != "on_train_batch_start":  # the loader has handed out a batch
        assert all_same(resumed.trained, straight.trained[at:])
        assert same(copies(resumed), copies(straight))
        assert same(resumed.evaluated[-1], straight.evaluated[-1])


@every_optimizer
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_optimizer_resumes_to_the_bit(
    tmp_path: Path, optimizer: Any, accumulate: int
) -> None:
    saves = SavesIn(tmp_path / "a.ckpt", "on_train_batch_end")
    straight = fit_two_epochs(Free(optimizer), Idle(), saves, accumulate=accumulate)
    resumed = fit_two_epochs(
        Free(optimizer), Idle(), accumulate=accumulate, ckpt_path=saves.path, weights_only=True
    )
    assert all_same(resumed.trained, straight.trained[4 * accumulate :])
    assert same(copies(resumed), copies(straight))


@pytest.mark.parametrize("optimizer", [AdamW, MeanSGD, StrictSGD, SwappingSGD])
def test_a_file_of_weights_holds_those_of_evaluation(tmp_path: Path, optimizer: Any) -> None:
    saves = SavesIn(tmp_path / "a.ckpt", "on_train_batch_end", weights_only=True)
    trainer_with(Idle(), saves).fit(Free(optimizer), loader(16, 2))
    checkpoint = torch.load(saves.path, weights_only=True)
    expected = plain_loop(optimizer, list(batches())[:4])[2]
    assert same(checkpoint["state_dict"], copies(expected))
    assert "callbacks" not in checkpoint


@pytest.mark.parametrize("on_epoch_end", [True, False])
def test_the_best_checkpoint_holds_what_was_validated(tmp_path: Path, on_epoch_end: bool) -> None:
    class Scored(Free):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("score", float(self.trainer.global_step), prog_bar=False)

    module = Scored(AdamW)
    saves = ModelCheckpoint(
        tmp_path, monitor="score", mode="max", save_on_train_epoch_end=on_epoch_end
    )
    trainer_with(Idle(), saves, enable_checkpointing=True).fit(module, loader(16, 2), loader(2, 2))
    saved = torch.load(saves.best_model_path, weights_only=True)["state_dict"]
    assert same(saved, module.evaluated[-1])


@pytest.mark.parametrize("free", [AdamW, MeanSGD, StrictSGD, SwappingSGD])
def test_a_part_of_a_combined_optimizer_is_switched(free: Any, tmp_path: Path) -> None:
    optimizer, path = partial(half_free, free=free), tmp_path / "a.ckpt"
    trained, evaluated, end = plain_loop(optimizer, batches(), evaluate_after=[3, 6])
    module = Free(optimizer)
    trainer_with(Idle(), val_check_interval=3).fit(module, loader(16, 2), loader(2, 2))
    assert all_same(module.trained, trained)
    assert all_same(module.evaluated[1:], evaluated)
    assert same(copies(module), copies(end))
    saves = SavesIn(path, "on_train_batch_end")
    trainer_with(saves, Idle(), max_steps=4).fit(Free(optimizer), ResumableLoader(16, 2))
    straight, resumed = straight_and_resumed(path, optimizer)
    assert all_same(resumed.trained, straight.trained[4:])


def straight_and_resumed(path: Path, optimizer: Any) -> tuple[Free, Free]:
    straight, resumed = Free(optimizer), Free(optimizer)
    trainer_with(Idle()).fit(straight, ResumableLoader(16, 2))
    trainer_with(Idle()).fit(resumed, ResumableLoader(16, 2), ckpt_path=path, weights_only=True)
    return straight, resumed


@every_optimizer
def test_a_checkpoint_after_the_fit_resumes_to_the_bit(tmp_path: Path, optimizer: Any) -> None:
    trainer, module = trainer_with(Idle(), max_steps=4), Free(optimizer)
    trainer.fit(module, ResumableLoader(16, 2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert same(saved, copies(plain_loop(optimizer, list(batches())[:4])[2]))
    straight, resumed = straight_and_resumed(tmp_path / "a.ckpt", optimizer)
    assert all_same(resumed.trained, straight.trained[4:])


@pytest.mark.parametrize("optimizer", [AdamW, SwappingSGD])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_checkpoint_of_an_error_resumes_to_the_bit(
    tmp_path: Path, optimizer: Any, error: type[BaseException]
) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 4:
                raise error

    saves = ModelCheckpoint(tmp_path, save_on_exception=True, filename="a")
    trainer = trainer_with(Idle(), Fails(), saves, enable_checkpointing=True)
    module = Free(optimizer)
    expected: Any = SystemExit if error is KeyboardInterrupt else error
    with pytest.raises(expected):
        trainer.fit(module, ResumableLoader(16, 2))
    assert same(copies(module), copies(plain_loop(optimizer, list(batches())[:4])[2]))
    (path,) = tmp_path.glob("*.ckpt")
    straight, resumed = straight_and_resumed(path, optimizer)
    assert all_same(resumed.trained, straight.trained[4:])


def test_an_error_in_a_validation_leaves_the_weights_of_evaluation(tmp_path: Path) -> None:
    class Fails(Free):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if self.trainer.global_step == 4:
                raise ZeroDivisionError

    module, trainer = Fails(AdamW), trainer_with(Idle(), val_check_interval=4)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, loader(16, 2), loader(2, 2))
    assert same(copies(module), copies(plain_loop(AdamW, list(batches())[:4])[2]))


def test_a_finished_run_that_is_resumed_keeps_its_training_weights(tmp_path: Path) -> None:
    trainer = trainer_with(Idle(), max_steps=4)
    trainer.fit(Free(AdamW), ResumableLoader(16, 2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer_with(Idle(), max_steps=4)
    again.fit(Free(AdamW), ResumableLoader(16, 2), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    again.save_checkpoint(tmp_path / "b.ckpt")
    straight, resumed = straight_and_resumed(tmp_path / "b.ckpt", AdamW)
    assert all_same(resumed.trained, straight.trained[4:])


@every_optimizer
def test_a_second_fit_with_the_same_optimizer_equals_a_plain_loop(optimizer: Any) -> None:
    class Keeps(Free):
        def configure_optimizers(self) -> Any:
            self.kept = vars(self).get("kept") or super().configure_optimizers()
            return self.kept

    trained, _, end = plain_loop(optimizer, [*loader(8, 2)] * 2, switch_after=[4])
    module, trainer = Keeps(optimizer), trainer_with(Idle(), max_steps=4)
    for limit in (4, 8):
        trainer.fit_loop.epoch_loop.max_steps = limit
        trainer.fit(module, loader(8, 2))
    assert all_same(module.trained, trained)
    assert same(copies(module), copies(end))


# -------------------------------------------------------------------------- with a bare Trainer


@pytest.mark.parametrize("optimizer", SCHEDULEFREE)
def test_a_checkpoint_of_a_bare_trainer_resumes_to_the_bit(tmp_path: Path, optimizer: Any) -> None:
    saves = SavesIn(tmp_path / "a.ckpt", "on_train_batch_end")
    straight, resumed = Guided(optimizer), Free(optimizer)
    trainer_with(saves).fit(straight, ResumableLoader(16, 2))
    trainer_with(Idle()).fit(
        resumed, ResumableLoader(16, 2), ckpt_path=saves.path, weights_only=True
    )
    assert all_same(resumed.trained, straight.trained[4:])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("optimizer", [AdamW, SwappingSGD])
def test_a_bare_trainer_continues_from_the_weights_of_evaluation(
    tmp_path: Path, optimizer: Any
) -> None:
    saves = SavesIn(tmp_path / "a.ckpt", "on_train_batch_end")
    trainer_with(Idle(), saves).fit(Free(optimizer), ResumableLoader(16, 2))
    bare = Guided(optimizer)
    trainer_with().fit(bare, ResumableLoader(16, 2), ckpt_path=saves.path, weights_only=True)
    trained, _, _ = plain_loop(optimizer, batches(), switch_after=[4])
    assert all_same(bare.trained, trained[4:])
    with pytest.raises(Exception, match=r"not in train mode|in evaluation mode"):
        trainer_with().fit(
            Free(optimizer), ResumableLoader(16, 2), ckpt_path=saves.path, weights_only=True
        )


# ---------------------------------------------------------------------------- everything else


@pytest.mark.parametrize("optimizer", [AdamW, schedulefree.SGDScheduleFree, SwappingSGD])
def test_a_skipped_update_equals_a_plain_loop_without_its_batch(optimizer: Any) -> None:
    class Bad(Free):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 2:
                next(self.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]

    all_batches = list(batches())
    trained, _, end = plain_loop(optimizer, all_batches[:2] + all_batches[3:])
    module = Bad(optimizer)
    trainer_with(StepGuard([NonFinite()])).fit(module, loader(16, 2))
    assert all_same(module.trained[:2] + module.trained[3:], trained)
    assert same(copies(module), copies(end))


class RollsBack(Capability):
    """Rolls back to the end of the second update at the fifth one."""

    owns, rank = "rolls back", 45

    def decide(self, update: Update) -> Rejection | None:
        if update.progress.steps != 4:
            return None
        return Rejection(reason="bad", roll_back=self.taken)

    def end_batch(self, batch: Batch) -> None:
        if batch.fit.trainer.global_step == 2:
            self.taken = batch.fit.take_snapshot()


@every_optimizer
def test_a_rollback_across_a_validation_equals_a_plain_loop(optimizer: Any) -> None:
    all_batches = list(batches())
    trained, _, end = plain_loop(optimizer, all_batches[:2] + all_batches[5:])
    module = Free(optimizer)
    trainer_with(RollsBack(), val_check_interval=3).fit(module, loader(16, 2), loader(2, 2))
    assert all_same(module.trained[4:], trained[1:])
    assert same(copies(module), copies(end))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_other_precisions_resume_to_the_bit(tmp_path: Path, precision: str) -> None:
    straight, resumed = Free(AdamW), Free(AdamW)
    saves = SavesIn(tmp_path / "a.ckpt", "on_train_batch_end")
    clipping = GradientClipping(NormClip(max_norm=1.0))
    options = {"val_check_interval": 3}
    trainer_with(saves, clipping, **options, **cpu_precision(precision)).fit(
        straight, ResumableLoader(16, 2), loader(2, 2)
    )
    saved = torch.load(saves.path, weights_only=True)["state_dict"]
    assert not same(saved, straight.trained[3])
    trainer_with(GradientClipping(NormClip(1.0)), **options, **cpu_precision(precision)).fit(
        resumed, ResumableLoader(16, 2), loader(2, 2), ckpt_path=saves.path, weights_only=True
    )
    assert all_same(resumed.trained, straight.trained[4:])
    assert same(copies(resumed), copies(straight))


def test_several_optimizers_of_which_some_have_modes(tmp_path: Path) -> None:
    def make() -> ManualLayers:
        torch.manual_seed(0)
        return ManualLayers(AdamW, torch.optim.AdamW, SwappingSGD)

    class SavesAfterTwelve(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
            if trainer.global_step == 12:
                self.weights = copies(module)
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    straight, saves = make(), SavesAfterTwelve()
    trainer_with(Idle(), saves, max_steps=24).fit(straight, ResumableLoader(16, 2))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    differ = [
        not torch.equal(saved[f"layers.{i}.weight"], saves.weights[f"layers.{i}.weight"])
        for i in range(3)
    ]
    assert differ == [True, False, True]
    resumed = make()
    trainer_with(Idle(), max_steps=24).fit(
        resumed, ResumableLoader(16, 2), ckpt_path=tmp_path / "a.ckpt", weights_only=True
    )
    assert same(copies(resumed), copies(straight))


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start"])
def test_a_group_that_is_added_during_the_fit_is_trained(tmp_path: Path, hook: str) -> None:
    class Grows(L.Callback):
        """Adds the second layer after two updates."""

        def __init__(self) -> None:
            def add(trainer: Any, module: Any, *arguments: Any) -> None:
                (optimizer,) = trainer.optimizers
                if trainer.global_step == 2 and len(optimizer.param_groups) == 1:
                    optimizer.add_param_group({"params": list(module.net[2].parameters())})

            setattr(self, hook, add)

    class Half(Free):
        def configure_optimizers(self) -> Any:
            return AdamW(self.net[0].parameters(), lr=0.05)

    module, oracle = Half(AdamW), Half(AdamW)
    one = oracle.configure_optimizers()
    for number, (x, y, _) in enumerate(list(loader(4, 2)) * 4):
        if number == 2:
            one.add_param_group({"params": list(oracle.net[2].parameters())})
        one.train()
        if number == 4:
            training = copies(oracle)
            one.eval()
            evaluated = copies(oracle)
            one.train()
            oracle.load_state_dict(training)
        oracle.zero_grad()
        nn.functional.mse_loss(oracle.net(x), y).backward()
        one.step()
    one.eval()
    saves = SavesIn(tmp_path / "a.ckpt", "on_train_batch_end")
    trainer_with(Grows(), Idle(), saves, max_steps=8).fit(module, loader(4, 2))
    assert same(torch.load(saves.path, weights_only=True)["state_dict"], evaluated)
    assert same(copies(module), copies(oracle))


class FindsInEpochs(LearningRateFinder):
    """Runs before the first and the second epoch, and leaves the learning rate."""

    def __init__(self) -> None:
        super().__init__(num_training_steps=3, update_attr=False)

    def on_fit_start(self, *arguments: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch in (0, 1):
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("in_epochs", [True, False])
def test_a_learning_rate_finder_runs_and_changes_nothing(
    tmp_path: Path, first: bool, in_epochs: bool
) -> None:
    def finder() -> Any:
        if in_epochs:
            return FindsInEpochs()
        return LearningRateFinder(num_training_steps=3, update_attr=False)

    straight = fit_two_epochs(Free(AdamW), Idle())
    found = Free(AdamW)
    callbacks = [finder(), Idle()] if first else [Idle(), finder()]
    trainer_with(
        *callbacks,
        max_steps=-1,
        max_epochs=2,
        val_check_interval=4,
        default_root_dir=tmp_path,
    ).fit(found, loader(16, 2), loader(2, 2))
    assert len(found.trained) == 16 + 3  # after the first epoch Lightning's trial makes no step
    assert all_same(found.trained[-8:], straight.trained[-8:])
    assert same(copies(found), copies(straight))


@pytest.mark.parametrize("optimizer", [AdamW, SwappingSGD])
@pytest.mark.parametrize("as_callback", [True, False])
@pytest.mark.filterwarnings("ignore:The learning-rate range test found no")
def test_a_range_test_runs_and_changes_nothing(optimizer: Any, as_callback: bool) -> None:
    options: dict[str, Any] = {"steps": 13, "start": 1e-6, "end": 1e-4, "on_result": "report"}
    straight, tested = Free(optimizer), Free(optimizer)
    trainer_with(Idle()).fit(straight, loader(16, 2))
    trainer = trainer_with(Idle(), *([LearningRateRangeTest(**options)] if as_callback else []))
    if not as_callback:
        learning_rate_range_test(trainer, tested, loader(16, 2), **options)
    trainer.fit(tested, loader(16, 2))
    assert all_same(tested.trained, straight.trained)
    assert same(copies(tested), copies(straight))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [AdamW, SwappingSGD])
def test_a_batch_finder_runs_and_changes_nothing(optimizer: Any) -> None:
    def fit(*finder: L.Callback) -> Free:
        module = Free(optimizer)
        batches = GlobalBatchLoader(Regression(16), micro_batch_size=2, shuffle="sequential")
        size = BatchSizeScheduler(ConstantBatchSize(2))
        trainer_with(*finder, size).fit(module, batches)
        return module

    straight = fit()
    found = fit(GlobalBatchFinder(global_batch_size=2, headroom=0.0))
    assert all_same(found.trained, straight.trained)
    assert same(copies(found), copies(straight))


def test_a_checkpoint_that_is_restored_within_the_fit_restores_the_training_weights(
    tmp_path: Path,
) -> None:
    """As a finder of Lightning restores one after its trial."""

    class Restores(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                nn.init.zeros_(module.net[0].weight)
                trainer._checkpoint_connector.restore(tmp_path / "a.ckpt", weights_only=True)
                trainer.fit_loop.restarting = trainer.fit_loop.epoch_loop.restarting = False

    module = Free(AdamW)
    trainer_with(Idle(), Restores()).fit(module, ResumableLoader(16, 2))
    assert all_same(module.trained[4:], plain_loop(AdamW, batches())[0][4:])


def test_fsdp1_is_refused() -> None:
    trainer: Any = SimpleNamespace(
        optimizers=[Free(AdamW).configure_optimizers()], strategy=FSDPStrategy()
    )
    with pytest.raises(ValueError, match=r"not be FSDPStrategy .* got AdamWSchedule"):
        OptimizerModes(trainer, Free(AdamW)).prepare()


@pytest.mark.parametrize("optimizer", [AdamW, SwappingSGD])
@pytest.mark.parametrize("average", [EMAWeightAveraging(), StochasticWeightAveraging(0.01, 1)])
def test_callbacks_that_exchange_the_weights_at_the_end_are_refused(
    optimizer: Any, average: L.Callback
) -> None:
    trainer = trainer_with(Idle(), average)
    message = f"not contain {type(average).__name__} with .* got {optimizer.__name__}, which"
    with pytest.raises(ValueError, match=message):
        trainer.fit(Free(optimizer), loader(16, 2))
    trainer_with(Idle(), average).fit(Free(torch.optim.AdamW), loader(16, 2))


@pytest.mark.parametrize(
    ("optimizer", "schedule", "is_said"),
    [
        (AdamW, WarmupLinear(warmup="10%"), True),
        (AdamW, Cosine(), True),
        (AdamW, WarmupConstant(warmup="10%"), False),
        (AdamW, Constant(), False),
        (torch.optim.AdamW, Cosine(), False),
    ],
)
def test_a_schedule_that_decays_is_not_needed(
    optimizer: Any, schedule: Any, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        trainer_with(LearningRateScheduler(schedule)).fit(Free(optimizer), loader(16, 2))
    said = [record.message for record in caplog.records if "WarmupConstant()" in record.message]
    assert len(said) == is_said
    assert all("AdamWScheduleFree evaluates an average of its weights" in line for line in said)


def test_a_schedule_of_warm_up_alone_equals_a_plain_loop() -> None:
    module = Free(AdamW)
    trainer_with(LearningRateScheduler(WarmupConstant(warmup=4))).fit(module, loader(16, 2))
    oracle = Free(AdamW)
    one = oracle.configure_optimizers()
    one.train()
    for number, (x, y, _) in enumerate(batches()):
        one.param_groups[0]["lr"] = 0.05 * min(number / 4, 1)
        one.zero_grad()
        nn.functional.mse_loss(oracle.net(x), y).backward()
        one.step()
        assert same(module.trained[number], copies(oracle))
