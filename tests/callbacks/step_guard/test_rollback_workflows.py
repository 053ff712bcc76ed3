"""Rollbacks in runs with other schedulers, callbacks, folders, budgets, losses and precisions."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader

from lightning_bigopt import (
    EMA,
    Abort,
    Constant,
    LearningRateScheduler,
    ModelAveraging,
    NonFinite,
    OptimizationMonitor,
    RollBack,
    StepGuard,
    TooManyRejectionsError,
)
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import QUIET, ResumableLoader, cpu_precision
from tests.rolled_back import (
    BATCH,
    Plain,
    Poisoned,
    SavesAndStops,
    StopError,
    differing,
    final,
    guard,
    order_of,
    train,
)

SAMPLES = 120  # 30 updates an epoch


def bad(*updates: int) -> list[tuple[int, int]]:
    """Returns the samples of some updates of a loader in order."""
    return [(0, index) for u in updates for index in range(u * BATCH, (u + 1) * BATCH)]


BAD = bad(8, 9)  # rolls back from update 9 to 6


class InOrder(ResumableLoader):
    """Samples in order, with targets of the same size."""

    def __init__(self, size: int, batch_size: int = BATCH) -> None:
        super().__init__(size, batch_size)
        self.dataset.y = self.dataset.y / torch.arange(1, size + 1).unsqueeze(1)


def fit(module: Any, *callbacks: Any, samples: int = SAMPLES, **options: Any) -> L.Trainer:
    """Trains on samples in order, without other callbacks."""
    L.seed_everything(3, verbose=False)
    resume = {name: options.pop(name) for name in ("ckpt_path",) if name in options}
    options = {"max_steps": 20, "max_epochs": -1, **options}
    trainer = L.Trainer(**{**QUIET, **options}, callbacks=[*callbacks])
    trainer.fit(module, InOrder(samples), **resume, weights_only=bool(resume))
    return trainer


def places(own: StepGuard) -> list[tuple[int, int]]:
    return [(report.update, report.to) for report in own.rollbacks]


# ------------------------------------------------------------------- schedulers of the module

SCHEDULERS: dict[str, Any] = {
    "MultiStepLR": lambda o: MultiStepLR(o, [8, 20], gamma=0.1),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 40),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.9),
    "OneCycleLR": lambda o: OneCycleLR(o, 0.02, total_steps=60),
    "SequentialLR": lambda o: SequentialLR(
        o, [LinearLR(o, total_iters=5), CosineAnnealingLR(o, 30)], milestones=[5]
    ),
}


class Scheduled(Poisoned):
    """Returns a scheduler of torch."""

    def __init__(self, *arguments: Any, make: Any, scheduler: dict[str, Any], **kw: Any) -> None:
        super().__init__(*arguments, **kw)
        self.make, self.scheduler = make, scheduler

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = {"scheduler": self.make(optimizer), **self.scheduler}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


@pytest.mark.parametrize("to", ["memory", "folder"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_the_module_goes_back(name: str, to: str, tmp_path: Path) -> None:
    make, scheduler = SCHEDULERS[name], {"interval": "step"}
    own = guard(to=str(tmp_path) if to == "folder" else to)
    module = Scheduled(BAD, make=make, scheduler=scheduler)
    fit(module, own, max_steps=24)
    assert places(own) == [(9, 6)]
    clean = Scheduled(make=make, scheduler=scheduler)
    fit(clean, max_steps=24)
    assert module.lrs[:6] + module.lrs[10:] == clean.lrs


class Bursts(Scheduled):
    """Logs a constant metric; the batches 31 and 32 are bad, in the second epoch."""

    count = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("constant", 1.0, on_step=False, on_epoch=True)
        self.count += 1
        loss = super().training_step(batch, batch_idx)
        return loss * (math.nan if self.count in {31, 32} else 1.0)


@pytest.mark.parametrize("plateau", [False, True])
def test_a_scheduler_of_epochs_goes_on(plateau: bool) -> None:
    """A rollback over the end of an epoch undoes neither the end nor its lower learning rate."""
    if plateau:
        module = Bursts(
            make=lambda o: ReduceLROnPlateau(o, factor=0.1, patience=0),
            scheduler={"interval": "epoch", "monitor": "constant"},
        )
    else:
        module = Bursts(make=lambda o: StepLR(o, 1, gamma=0.1), scheduler={"interval": "epoch"})
    own = guard()
    fit(module, own, max_steps=80)
    assert places(own) == [(31, 26)]
    # The number of epochs that have ended; the plateau's first epoch is its best one.
    ended = [max(0, index // 30 - plateau) for index in range(len(module.lrs))]
    assert module.lrs == pytest.approx([0.01 * 0.1**count for count in ended])


def test_a_learning_rate_in_a_tensor_stays_the_same_tensor() -> None:
    """A compiled step, or a CUDA graph, reads it."""
    rate = torch.tensor(0.01)
    make: Any = lambda o: StepLR(o, 1, gamma=0.1)  # noqa: E731
    own, module = guard(), Bursts(make=make, scheduler={"interval": "epoch"}, lr=rate)
    trainer = fit(module, own, max_steps=40)
    assert places(own) == [(31, 26)]
    assert trainer.optimizers[0].param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.001)


# ----------------------------------------------------------------------- budgets and modules


@pytest.mark.parametrize("resumed", [False, True])
def test_snapshots_keep_their_distance_in_a_longer_run(resumed: bool, tmp_path: Path) -> None:
    """In percent of the budget, which is 30 updates at first and 120 in the second fit."""

    def parts() -> tuple[Any, ...]:
        own = guard(snapshot_every="5%", lr_factor=0.5, recover="10%")
        return own, LearningRateScheduler(Constant(), on_resume="extend")

    own, rates = parts()
    module = Poisoned(bad(20, 21))
    trainer = fit(module, own, rates, samples=800, max_steps=30)
    assert len(places(own)) == 1
    if resumed:
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        module, (own, rates) = Poisoned(bad(60, 61)), parts()
        warnings.filterwarnings("ignore", message="The learning rate jumps")
        fit(module, own, rates, samples=800, max_steps=120, ckpt_path=tmp_path / "a.ckpt")
    else:
        trainer.fit_loop.epoch_loop.max_steps = 120
        module.bad = set(bad(60, 61))
        trainer.fit(module, InOrder(800))
    update, to = places(own)[-1]
    assert update > 40
    assert update - to <= 7  # 5 % of 120, and the second bad update
    lowered = [rate for rate in module.lrs[-119:] if rate < 0.0099]
    assert 10 <= len(lowered) <= 24  # twice at most 12 updates, 10 % of 120


def test_another_module_has_its_own_snapshots_and_losses() -> None:
    own = guard()
    trainer = fit(Poisoned(), own, max_steps=20)
    other = Poisoned([(0, i) for i in range(2 * BATCH, 4 * BATCH)])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(5.0)
    trainer.fit_loop.epoch_loop.max_steps = 40
    trainer.fit(other, InOrder(SAMPLES))
    assert places(own) == [(23, 21)]
    assert min(float(p.detach().mean()) for p in other.parameters()) > 1.0


@pytest.mark.parametrize("first", [0, 1])
def test_a_second_fit_keeps_weights_that_were_changed_by_hand(first: int) -> None:
    """Its snapshots are new: there is none before its first accepted update."""
    own, module = guard(), Poisoned()
    trainer = fit(module, own, max_steps=20)
    with torch.no_grad():
        module.net[0].weight.add_(5.0)
    trainer.fit_loop.epoch_loop.max_steps = 40
    module.bad = set(bad(first, first + 1))
    if first == 0:
        with pytest.raises(TooManyRejectionsError, match="must have a snapshot to roll back to"):
            trainer.fit(module, InOrder(SAMPLES))
        return
    trainer.fit(module, InOrder(SAMPLES))
    assert places(own) == [(22, 21)]
    assert float(module.net[0].weight.detach().mean()) > 3.0


def test_the_losses_of_another_module_are_its_own() -> None:
    """They are 30 times as large as those of the first one."""
    own = StepGuard([NonFinite()], roll_back=RollBack(snapshot_every=5, updates=4))
    trainer = fit(Poisoned(), own, samples=800, max_steps=80)
    trainer.fit_loop.epoch_loop.max_steps = 120
    trainer.fit(Poisoned(bad(*range(200)), factor=30.0), InOrder(800))
    assert not own.rollbacks


def test_a_resume_in_the_same_process_keeps_the_losses_of_the_checkpoint(tmp_path: Path) -> None:
    """The guard has trained another module before: only a fit without a checkpoint forgets."""
    path = tmp_path / "a.ckpt"
    options: dict[str, Any] = {"samples": 800, "max_steps": 110}
    samples = bad(*range(90, 94))

    def own() -> StepGuard:
        return StepGuard([NonFinite()], roll_back=RollBack(snapshot_every=5, updates=4, recover=0))

    used, stops = own(), SavesAndStops(path, 88, 89)
    with pytest.raises(StopError):
        fit(Poisoned(samples, factor=30.0, lr=1e-3), used, stops, **options)
    module = Poisoned(samples, factor=30.0, lr=1e-3)
    trainer = L.Trainer(**QUIET, max_steps=110, max_epochs=-1, callbacks=[used])
    trainer.fit(module, InOrder(800), ckpt_path=path, weights_only=True)
    assert places(used) == [(93, 86)]


def test_abort_ends_a_resumed_run_that_has_had_more_rejections(tmp_path: Path) -> None:
    path, updates = tmp_path / "a.ckpt", bad(*range(8, 20))
    with pytest.raises(StopError):
        fit(Poisoned(updates), StepGuard([NonFinite()]), SavesAndStops(path, 12, 13))
    own = StepGuard([NonFinite()], actions=[Abort(after=2)], roll_back=RollBack(snapshot_every=5))
    with pytest.raises(TooManyRejectionsError, match="must not be rejected 2 times in a row"):
        fit(Poisoned(updates), own, ckpt_path=path)


# ------------------------------------------------------------------------------------- files


def test_files_of_another_run_are_not_used(tmp_path: Path, caplog: Any) -> None:
    to, path = str(tmp_path / "s"), tmp_path / "a.ckpt"
    with pytest.raises(StopError):
        fit(Poisoned(), guard(to=to), SavesAndStops(path, 8, 9))
    fit(Poisoned(lr=0.1), guard(to=to), max_steps=9)  # the same names
    own = guard(to=to)
    with caplog.at_level("INFO"), pytest.raises(TooManyRejectionsError, match="must have a snapsh"):
        fit(Poisoned(BAD), own, ckpt_path=path)
    assert "2 of 2 snapshots cannot be used: their files" in caplog.text


@pytest.mark.parametrize("before", ["memory", "folder"])
def test_another_place_for_snapshots_is_reported(before: str, tmp_path: Path, caplog: Any) -> None:
    """Snapshots of a checkpoint can be used with a folder; files need the folder."""
    names = {"memory": "memory", "folder": str(tmp_path / "s")}
    path = tmp_path / "a.ckpt"
    with pytest.raises(StopError):
        fit(Poisoned(), guard(to=names[before]), SavesAndStops(path, 8, 9))
    own = guard(to=names["folder" if before == "memory" else "memory"])
    with caplog.at_level("INFO"):
        if before == "memory":
            fit(Poisoned(BAD), own, ckpt_path=path)
            assert places(own) == [(9, 6)]
        else:
            with pytest.raises(TooManyRejectionsError, match="must have a snapshot"):
                fit(Poisoned(BAD), own, ckpt_path=path)
            assert "2 of 2 snapshots cannot be used: their files" in caplog.text
    assert re.search(r"step guard roll_back: RollBack\(.*to='.*'.*→ RollBack", caplog.text)


@pytest.mark.slow
def test_files_do_not_accumulate(tmp_path: Path) -> None:
    """Three of the run and three of each of the last two checkpoints, which are far apart."""
    own = guard(to=str(tmp_path / "s"), snapshot_every=1)

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step % 30 == 0:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    fit(Poisoned(), own, Saves(), max_steps=200)
    assert len(list((tmp_path / "s").iterdir())) <= 9
    assert own._rollbacks is not None
    assert len(own._rollbacks.state_dict()["store"]["files"]) <= 9


class Foreign(InOrder):
    """Has a state that torch.load(weights_only=True) refuses."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": np.random.RandomState(0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({k: v for k, v in state.items() if k != "generator"})


@pytest.mark.parametrize("skip_data", [True, False])
def test_the_state_of_a_loader_may_be_any_object(skip_data: bool, tmp_path: Path) -> None:
    """It is saved only to train the data again; a snapshot that cannot be read stays in memory."""
    own = guard(to=str(tmp_path), skip_data=skip_data, at_most=1)
    trainer = L.Trainer(**QUIET, max_steps=20, max_epochs=-1, callbacks=[own])
    module = Poisoned(BAD if skip_data else ())

    def run() -> None:
        trainer.fit(module, Foreign(SAMPLES, BATCH))

    if skip_data:
        run()
        assert places(own) == [(9, 6)]
    else:
        with pytest.warns(
            UserWarning, match="A snapshot could not be written to .*UnpicklingError"
        ):
            run()


# ------------------------------------------------------------------------- other callbacks


class Pretrained(Poisoned):
    """Has a backbone for BackboneFinetuning."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.backbone = self.net[0]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


@pytest.mark.parametrize("to", ["memory", "folder"])
def test_a_rollback_over_an_unfreezing_keeps_the_group_and_the_average(
    to: str, tmp_path: Path
) -> None:
    """The backbone is unfrozen after update 30; snapshots are taken after 26 and 31."""

    class Late(Pretrained):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            is_bad = self.trainer.current_epoch == 1 and batch_idx < 2
            return super().training_step(batch, batch_idx) * (math.nan if is_bad else 1.0)

    own = guard(to=str(tmp_path) if to == "folder" else to)
    averaging = ModelAveraging(EMA(half_life=5))
    unfreezes = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    module = Late()
    trainer = fit(module, own, averaging, unfreezes, max_steps=45)
    assert places(own) == [(31, 26)]
    assert len(trainer.optimizers[0].param_groups) == 2
    assert "net.0.weight" in averaging.average() or "backbone.weight" in averaging.average()
    trained = averaging.average("training")
    assert all(not torch.equal(averaging.average()[n], trained[n]) for n in trained)


@pytest.mark.parametrize("other", [EMAWeightAveraging, StochasticWeightAveraging])
def test_averages_of_lightning_are_refused(other: Any) -> None:
    options = {"swa_lrs": 0.01} if other is StochasticWeightAveraging else {}
    with pytest.raises(ValueError, match=f"must not contain {other.__name__} with RollBack"):
        fit(Poisoned(), guard(), other(**options))


def test_a_zero_redundancy_optimizer_is_refused() -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    with pytest.raises(ValueError, match="must not be a ZeroRedundancyOptimizer with RollBack"):
        fit(Poisoned(optimizer=ZeroRedundancyOptimizer), guard())


def test_abort_ends_the_run() -> None:
    own = StepGuard([NonFinite()], actions=[Abort(after=2)], roll_back=RollBack(snapshot_every=5))
    with pytest.raises(TooManyRejectionsError, match="must not be rejected 2 times in a row"):
        fit(Poisoned(BAD), own)
    assert not own.rollbacks


def test_the_error_names_a_checkpoint_before_the_discarded_stretch(tmp_path: Path) -> None:
    """A checkpoint of the bad stretch is newer, also at the second trigger."""
    own = StepGuard(
        [NonFinite()], roll_back=RollBack(snapshot_every=5, updates=4, recover=0, at_most=1)
    )
    saves = ModelCheckpoint(
        dirpath=tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}"
    )
    module = Poisoned(bad(*range(90, 200)), factor=30.0, lr=1e-3)
    with pytest.raises(TooManyRejectionsError) as caught:
        fit(module, own, saves, samples=1000, max_steps=200, enable_checkpointing=True)
    assert places(own) == [(93, 86)]
    found = re.search(r"step=(\d+)", str(caught.value))
    assert found is not None
    assert int(found[1]) == 88  # 92 was saved among the bad updates


# ------------------------------------------------------------------ losses and precisions


def test_a_loss_of_zero_is_no_limit() -> None:
    roll_back = RollBack()
    state = roll_back.initial_state()
    losses = [0.0] * 80 + [0.05] + [0.0] * 100
    assert [roll_back.observe(loss, state) for loss in losses] == [None] * len(losses)
    reasons = [roll_back.observe(100.0, state) for _ in range(12)]
    assert reasons[8] is None
    assert "above 0.022" in str(reasons[9])


class Diverges(Poisoned):
    """Its loss is NaN from one batch on, for a number of batches."""

    def __init__(self, first: int, number: int) -> None:
        super().__init__(lr=1e-3)
        self.first, self.last, self.count = first, first + number, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count += 1
        loss = super().training_step(batch, batch_idx)
        return loss * (math.inf if self.first <= self.count < self.last else 1.0)


@pytest.mark.parametrize("rolls_back", [False, True])
def test_an_endless_overflow_is_rejected(rolls_back: bool) -> None:
    """Under 16-mixed the scaler skips updates; after 40 in a row no scale is low enough."""
    precision = cpu_precision("16-mixed")
    if not rolls_back:
        with pytest.raises(TooManyRejectionsError, match="has skipped 40 updates in a row"):
            fit(Diverges(20, 1000), StepGuard(), max_steps=100, **precision)
        return
    own = guard()
    module = Diverges(20, 40)
    trainer = fit(module, own, samples=800, max_steps=100, **precision)
    assert places(own) == [(58, 16)]
    clean = Poisoned(lr=1e-3)
    L.seed_everything(3, verbose=False)
    other = L.Trainer(**{**QUIET, **precision}, max_steps=100, max_epochs=-1, callbacks=[guard()])
    batches = [*InOrder(800)]
    other.fit(clean, DataLoader(batches[:16] + batches[59:], batch_size=None))  # type: ignore[arg-type]
    assert not differing(final(module, trainer), final(clean, other))


def test_overflows_that_are_not_in_a_row_are_no_reason() -> None:
    """39 in a row, one good update, and 39 again."""

    class Twice(Diverges):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * (math.inf if 60 <= self.count < 99 else 1.0)

    own = guard()
    fit(Twice(20, 39), own, samples=800, max_steps=130, **cpu_precision("16-mixed"))
    assert not own.rollbacks


# ----------------------------------------------------------------------------------- logging


@pytest.mark.parametrize("resumed", [False, True])
def test_an_axis_in_samples_goes_on(resumed: bool, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    monitor, own = OptimizationMonitor(every=1, x_axis="samples"), guard()
    options: dict[str, Any] = {"max_steps": 20, "logger": logger}
    if resumed:
        path = tmp_path / "a.ckpt"
        with pytest.raises(StopError):
            fit(Poisoned(BAD), own, monitor, SavesAndStops(path, 15, 16), **options)
        monitor, own = OptimizationMonitor(every=1, x_axis="samples"), guard()
        options["ckpt_path"] = path
        logger._experiment = None
    fit(Poisoned(BAD), own, monitor, **options)
    curves = read_run(logger.log_dir).curves
    steps = [step for step, _ in curves["rollback/count"]]
    assert steps == [BATCH * n for n in range(1, 25)]
    rates = [value for _, value in curves["throughput/samples_per_second"]]
    assert min(rates) > 0


def test_data_that_is_trained_again_is_not_left_out() -> None:
    class Once(Poisoned):
        count = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.count += 1
            loss = super().training_step(batch, batch_idx)
            return loss * (math.nan if self.count in {9, 10} else 1.0)

    own = guard(skip_data=False)
    fit(Once(), own, max_steps=20)
    assert places(own) == [(9, 6)]
    assert own._rollbacks is not None
    assert own._rollbacks.metrics()["rollback/left_out"] == 0.0


@pytest.mark.parametrize("axis", ["updates", "samples"])
def test_the_plan_of_a_resumed_run_is_that_of_its_updates(axis: Any, tmp_path: Path) -> None:
    """After a rollback the loggers' step is ahead of the schedule."""
    logger, path = TensorBoardLogger(tmp_path), tmp_path / "a.ckpt"
    order = order_of(SAMPLES, 4)
    samples = order[8 * BATCH : 10 * BATCH]
    options: dict[str, Any] = {"logger": logger, "steps": 30}

    def parts() -> tuple[Any, ...]:
        return guard(), OptimizationMonitor(every=1, x_axis=axis)

    stops = SavesAndStops(path, 20, 21)
    with pytest.raises(StopError):
        train(Poisoned(samples), Plain(SAMPLES), *parts(), stops, **options)
    logger._experiment = None
    train(Poisoned(samples), Plain(SAMPLES), *parts(), ckpt_path=path, **options)
    curves = read_run(logger.log_dir).curves
    used, planned = dict(curves["optim/lr"]), dict(curves["plan/lr"])
    first = 20 if axis == "updates" else 21 * BATCH
    after = {step: rate for step, rate in planned.items() if step >= first}
    assert len(after) > 5
    assert min(after) == first
    assert after == pytest.approx({step: used[step] for step in after}, rel=1e-6)
