"""Unusual runs: skipped batches, steps without a loss, unusual Trainers, copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    GradientNoiseScale,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
    ReduceOnPlateau,
    StepGuard,
)
from lightning_bigopt.engine.engine import Engine
from tests.engine.fake_averaging import FakeAveraging, Looked, copies
from tests.helpers import QUIET, Probe, ResumableLoader, cpu_precision, loader

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
DOWN = Linear(start=1.0, end=0.0)


def everything(*, batch: int = 2) -> list[Any]:
    """Every capability of the package that needs no further data, and a fake one."""
    return [
        LearningRateScheduler(DOWN),
        HyperparameterScheduler("weight_decay", Linear(start=1.0, end=0.5)),
        BatchSizeScheduler(BatchSizeSteps({"0%": batch, "50%": 2 * batch})),
        GradientClipping(NormClip(max_norm=1e-3)),
        StepGuard(),
        GradientNoiseScale(),
        OptimizationMonitor(),
        FakeAveraging(),
    ]


class Steps(Probe):
    """Keeps learning rate and clipped norm of every update; some batches give no loss."""

    def __init__(self, *, silent: tuple[int, ...] = (), refused: int | None = None) -> None:
        super().__init__(lr=1.0, optimizer=torch.optim.AdamW)
        self.silent, self.refused = silent, refused
        self.seen: list[list[int]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        self.seen.append(batch[2].tolist())
        return None if batch_idx in self.silent else self.loss(batch[0], batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.lrs.append(float(optimizer.param_groups[0]["lr"]))
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack([g.norm() for g in grads]).norm()) if grads else 0.0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == self.refused and self.current_epoch == 0 else None


def trainer_with(*callbacks: Any, **options: Any) -> Any:
    return L.Trainer(**{**QUIET, "max_steps": 8, **options}, callbacks=list(callbacks))


def engine_of(trainer: Any) -> Engine:
    (engine,) = (callback for callback in trainer.callbacks if isinstance(callback, Engine))
    return engine


# ------------------------------------------------------------------------------- odd Trainers


@pytest.mark.filterwarnings("ignore:.*overfit.*", "ignore:.*shuffling.*")
@pytest.mark.parametrize(
    "options",
    [{"barebones": True}, {**QUIET, "overfit_batches": 2}],
    ids=["barebones", "overfit_batches"],
)
def test_odd_trainers_train_as_any_other(options: dict[str, Any]) -> None:
    module = Steps()
    options = {"accelerator": "cpu", **options}
    trainer = L.Trainer(**options, max_steps=8, callbacks=everything())
    trainer.fit(module, loader(32, 2))
    assert module.lrs == [1 - t / 8 for t in range(8)]
    assert max(module.norms) < 1.001e-3
    windows = module.seen if "overfit_batches" not in options else module.seen[:2]
    assert windows == [[2 * i, 2 * i + 1] for i in range(len(windows))]
    assert engine_of(trainer).clock.batches == len(module.seen)


def test_an_error_in_a_validation_is_the_users_own() -> None:
    """No capability ends the evaluation with an error that hides it."""

    class Fails(Steps):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise ZeroDivisionError

    own = [*everything(), ReduceOnPlateau("val_loss")]
    with pytest.raises(ZeroDivisionError):
        trainer_with(*own, num_sanity_val_steps=0, val_check_interval=2).fit(
            Fails(), loader(32, 2), loader(2, 2)
        )


# ------------------------------------------------------------------------- steps without a loss


@pytest.mark.filterwarnings("ignore:.*training_step.*None")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_step_that_returns_none_makes_no_update(precision: str, accumulate: int) -> None:
    """Its data is consumed, and nothing is clipped, guarded or averaged for it."""
    silent = tuple(range(3 * accumulate, 4 * accumulate))
    own = [FakeAveraging(), StepGuard(), GradientClipping(NormClip(max_norm=1e-3))]
    module = Steps(silent=silent)
    trainer = trainer_with(
        LearningRateScheduler(DOWN),
        *own,
        max_steps=-1,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        **cpu_precision(precision),
    )
    trainer.fit(module, ResumableLoader(16 * accumulate, 2))
    assert len(module.seen) == 8 * accumulate
    assert own[0].updates == 7
    assert own[1].rejected == 0
    assert engine_of(trainer).clock.batches == 8 * accumulate
    made = [1 - t / 8 for t in range(8) if t != 3]
    assert [rate for rate in module.lrs if rate in made] == made
    assert max(module.norms) < 1.001e-3


# ----------------------------------------------------------------------------- refused batches


class SavesAtEpochEnd(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, *arguments: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("refused", [0, 3])
def test_a_batch_that_is_refused_is_neither_counted_nor_saved_as_trained(
    tmp_path: Path, refused: int, first: bool
) -> None:
    """``on_train_batch_start`` returns -1: Lightning counts the batch as processed, and ends."""
    path = tmp_path / "epoch.ckpt"

    def own() -> list[Any]:
        return [LearningRateScheduler(DOWN), FakeAveraging(), StepGuard()]

    straight, saves = Steps(refused=refused), SavesAtEpochEnd(path)
    callbacks = [saves, *own()] if first else [*own(), saves]
    trainer = trainer_with(*callbacks, max_steps=6)
    trainer.fit(straight, loader(16, 2))
    assert engine_of(trainer).clock.batches == 6
    assert straight.lrs == [1 - t / 6 for t in range(6)]
    saved = torch.load(path, weights_only=True)["callbacks"]
    (clock,) = (state["clock"] for key, state in saved.items() if "Engine" in key)
    assert clock["batches"] == refused
    assert float(saved["FakeAveraging"]["updates"]) == refused
    resumed = Steps()
    trainer_with(*own(), max_steps=6).fit(resumed, loader(16, 2), ckpt_path=path, weights_only=True)
    assert resumed.lrs == straight.lrs[refused:]
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


# -------------------------------------------------------------------------------------- copies


class CopiesInMidFit(L.Callback):
    """Copies module and Trainer during a fit, without this callback."""

    def __init__(self, *, by_pickle: bool) -> None:
        self.by_pickle = by_pickle
        self.found: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        if trainer.global_step == 3:
            for thing in (trainer, pl_module):
                twin = pickle.loads(pickle.dumps(thing)) if self.by_pickle else copy.deepcopy(thing)
                self.found.append(twin)

    def __getstate__(self) -> dict[str, Any]:
        return {"by_pickle": self.by_pickle, "found": []}


@pytest.mark.parametrize("by_pickle", [True, False], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "ours"])
def test_what_is_copied_in_mid_fit_trains_again(bare: bool, by_pickle: bool) -> None:
    """A Trainer can be copied with and without the callbacks; the original does not change."""
    copying = CopiesInMidFit(by_pickle=by_pickle)
    module = Looked()
    trainer = trainer_with(*([] if bare else everything()), copying)
    trainer.fit(module, loader(32, 2))
    straight = Looked()
    trainer_with(*([] if bare else everything())).fit(straight, loader(32, 2))
    for one, other in zip(straight.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)
    twin, other_module = copying.found
    assert twin is not trainer
    at_copy = copies(other_module)
    assert all(torch.equal(value, straight.trained[2][name]) for name, value in at_copy.items())
    twin.fit_loop.epoch_loop.max_steps = 12
    fresh = Looked()
    twin.fit(fresh, loader(32, 2))
    assert twin.global_step == 12
    assert trainer.global_step == 8
    # The module's copy under another Trainer.
    trainer_with(*([] if bare else everything()), max_steps=2).fit(other_module, loader(32, 2))
    assert len(other_module.trained) > 3


# ----------------------------------------------------------------------------- other processes


class Spawned(Looked):
    """Defined at module level, so that other processes can import it."""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_ddp_spawn_fits_in_its_workers_and_tests_in_the_parent() -> None:
    """The engine exists in the workers only; the weights come back."""
    module = Spawned()
    before = copies(module)
    trainer = trainer_with(*everything(batch=4), strategy="ddp_spawn", devices=2, max_steps=4)
    trainer.fit(module, loader(32, 2))
    assert not any(isinstance(callback, Engine) for callback in trainer.callbacks)
    after = copies(module)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    alone = trainer_with(*trainer.callbacks)
    alone.test(module, loader(4, 2), verbose=False)
    assert all(torch.equal(after[name], value) for name, value in module.evaluated[-1].items())
    trainer.test(module, loader(4, 2), verbose=False)
    assert trainer.state.finished
