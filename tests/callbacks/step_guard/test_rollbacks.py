"""A run that rolls back ends as one whose order never held the bad samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_bigopt import (
    BatchSizeSteps,
    NonFinite,
    OptimizationMonitor,
    RollBack,
    StepGuard,
    TooManyRejectionsError,
)
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import ResumableLoader
from tests.rolled_back import (
    BATCH,
    Ordered,
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


def poisoned_run(
    first: int, updates: int, *, precision: str = "32-true", micro: int = BATCH, **options: Any
) -> tuple[Poisoned, Any, StepGuard, list[tuple[int, int]]]:
    """Trains with bad updates; returns the order of all samples too."""
    order = order_of(SAMPLES, 4)
    bad = order[first * BATCH : (first + updates) * BATCH]
    module, own = Poisoned(bad), guard(**options)
    trainer = train(module, Plain(SAMPLES), own, precision=precision, micro=micro)
    return module, trainer, own, order


def without(order: list[tuple[int, int]], start: int, stop: int) -> list[int]:
    """Returns the indices of an order without those of some updates."""
    return [index for _, index in [*order[: start * BATCH], *order[stop * BATCH :]]]


# The snapshots are taken after the updates 1, 6, 11, …, and the second bad update is the trigger.
@pytest.mark.parametrize(
    ("precision", "micro"),
    [
        ("32-true", BATCH),
        pytest.param("32-true", 2, marks=pytest.mark.slow),
        pytest.param("bf16-mixed", 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("first", "snapshot"),
    [(8, 6), (6, 6), (24, 21), (28, 26), (29, 26), (30, 26)],
    ids=["middle", "right after", "in epoch", "last of epoch", "across epochs", "first of epoch"],
)
def test_final_weights_are_those_without_the_samples(
    first: int, snapshot: int, precision: str, micro: int
) -> None:
    module, trainer, own, order = poisoned_run(first, 2, precision=precision, micro=micro)
    (report,) = own.rollbacks
    assert (report.update, report.to) == (first + 1, snapshot)
    assert (report.left_out, report.unit) == ((first + 2 - snapshot) * BATCH, "samples")
    clean = Poisoned()
    data = Ordered(without(order, snapshot, first + 2), SAMPLES)
    other = train(clean, data, guard(), precision=precision, micro=micro)
    assert trainer.global_step == other.global_step == 40
    assert not differing(final(module, trainer), final(clean, other))
    assert module.lrs[:snapshot] + module.lrs[first + 2 :] == clean.lrs
    assert own.fit is None


def resumed_run(
    path: Path, *, save: int, stop: int, order: list[tuple[int, int]], bad: Any, **options: Any
) -> tuple[Poisoned, Any, StepGuard]:
    with pytest.raises(StopError):
        train(Poisoned(bad), Plain(SAMPLES), guard(**options), SavesAndStops(path, save, stop))
    module, own = Poisoned(bad), guard(**options)
    return module, train(module, Plain(SAMPLES), own, ckpt_path=path), own


@pytest.mark.parametrize(
    ("to", "save", "stop"),
    [
        ("memory", 9, 12),
        ("folder", 10, 11),
        *(
            pytest.param(to, *batches, marks=pytest.mark.slow)
            for to in ("memory", "folder")
            for batches in [(7, 8), (9, 12), (10, 11), (10, 16), (12, 14), (25, 26)]
            if (to, *batches) not in [("memory", 9, 12), ("folder", 10, 11)]
        ),
    ],
)
def test_a_killed_run_ends_as_one_without_the_samples(
    tmp_path: Path, save: int, stop: int, to: str
) -> None:
    """Two bursts; the run is killed before, within and after the first rollback."""
    order, options = order_of(SAMPLES, 4), {"to": str(tmp_path / "s") if to == "folder" else to}
    bad = [*order[8 * BATCH : 10 * BATCH], *order[27 * BATCH : 29 * BATCH]]
    path = tmp_path / "saved.ckpt"
    module, trainer, own = resumed_run(path, save=save, stop=stop, order=order, bad=bad, **options)
    # After the first rollback, update u has the data of update u + 4: the snapshots 6, 11, 16, 21.
    first, second = own.rollbacks
    assert (first.update, first.to) == (9, 6)
    assert (second.update, second.to) == (24, 21)
    clean = Poisoned()
    kept = [*order[: 6 * BATCH], *order[10 * BATCH : 25 * BATCH], *order[29 * BATCH :]]
    other = train(clean, Ordered([i for _, i in kept], SAMPLES), guard())
    assert not differing(final(module, trainer), final(clean, other))
    saved = torch.load(path, weights_only=True)
    states = saved["callbacks"]["StepGuard"]["rollbacks"]["store"]["snapshots"]
    assert all(("state" in entry) == (to == "memory") for entry in states)
    if to == "folder":
        # The run ends within its last three snapshots; a checkpoint may need three others.
        assert 3 <= len(list((tmp_path / "s").iterdir())) <= 9


def test_a_persistent_burst_is_left_out_by_several_rollbacks() -> None:
    """A repeated trigger goes back by one snapshot more, and the loader goes on."""
    module, trainer, own, order = poisoned_run(17, 6, recover="50%")
    assert [(r.update, r.to) for r in own.rollbacks] == [(18, 16), (17, 11), (12, 6)]
    assert [r.left_out for r in own.rollbacks] == [3 * BATCH, 7 * BATCH, 7 * BATCH]
    clean = Poisoned()
    other = train(clean, Ordered(without(order, 6, 23), SAMPLES), guard())
    assert not differing(final(module, trainer), final(clean, other))
    assert own.metrics(None)["rollback/count"] == 3.0
    assert own.metrics(None)["rollback/left_out"] == 17.0 * BATCH


def test_the_same_snapshot_serves_again_after_recover() -> None:
    module, trainer, own, order = poisoned_run(17, 6, recover=0)
    assert [(r.update, r.to) for r in own.rollbacks] == [(18, 16), (17, 16), (17, 16)]
    clean = Poisoned()
    other = train(clean, Ordered(without(order, 16, 23), SAMPLES), guard())
    assert not differing(final(module, trainer), final(clean, other))


def test_the_run_ends_after_at_most_rollbacks(tmp_path: Path) -> None:
    order = order_of(SAMPLES, 4)
    own = guard(at_most=2)
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    module = Poisoned(order[17 * BATCH : 23 * BATCH])
    with pytest.raises(TooManyRejectionsError) as caught:
        train(module, Plain(SAMPLES), own, saves, enable_checkpointing=True)
    message = str(caught.value)
    assert message.startswith(
        "StepGuard must not roll back more often than at_most=2, got: Update 17 "
    )
    assert "step=16.ckpt; resume from it" in message
    assert len(own.rollbacks) == 2


def test_a_run_without_a_snapshot_ends() -> None:
    order = order_of(SAMPLES, 4)
    with pytest.raises(TooManyRejectionsError, match="must have a snapshot to roll back to, got"):
        train(Poisoned(order[: 2 * BATCH]), Plain(SAMPLES), guard())


@pytest.mark.parametrize("stop", [None, 14])
def test_the_learning_rate_is_lowered_and_recovers(tmp_path: Path, stop: int | None) -> None:
    """Closed form: the factor rises from 0.5 at update 6 to 1 at update 16, over the clock."""
    order = order_of(SAMPLES, 4)
    bad, options = order[8 * BATCH : 10 * BATCH], {"lr_factor": 0.5, "recover": 10}
    if stop is None:
        module, own = Poisoned(bad), guard(**options)
        train(module, Plain(SAMPLES), own)
        lrs = module.lrs[:6] + module.lrs[10:]
    else:
        path = tmp_path / "a.ckpt"
        module, _, own = resumed_run(path, save=12, stop=stop, order=order, bad=bad, **options)
        lrs = [math.nan] * 8 + module.lrs
    clean = Poisoned()
    train(clean, Ordered(without(order, 6, 10), SAMPLES), guard())
    factors = [1.0] * 6 + [min(1.0, 0.5 + 0.05 * (t - 6)) for t in range(6, 40)]
    expected = [f * rate for f, rate in zip(factors, clean.lrs, strict=True)]
    assert lrs[8:] == pytest.approx(expected[8:], rel=1e-12)
    assert stop is not None or lrs == pytest.approx(expected, rel=1e-12)


def test_a_loss_that_stays_high_rolls_back() -> None:
    order = order_of(SAMPLES, 4)
    options: dict[str, Any] = {"snapshot_every": 5, "updates": 4, "recover": 0}
    bad = order[90 * BATCH : 94 * BATCH]

    def own() -> StepGuard:
        return StepGuard([NonFinite()], roll_back=RollBack(**options))

    module, first = Poisoned(bad, factor=30.0, lr=1e-3), own()
    trainer = train(module, Plain(SAMPLES), first, steps=110)
    (report,) = first.rollbacks
    assert (report.update, report.to) == (93, 86)
    assert "above" in report.reason
    clean = Poisoned(lr=1e-3)
    other = train(clean, Ordered(without(order, 86, 94), SAMPLES), own(), steps=110)
    assert not differing(final(module, trainer), final(clean, other))
    assert report.loss_after is not None
    assert report.loss_before > 3 * report.loss_after


@pytest.mark.slow
def test_an_overflow_of_the_scaler_is_no_reason() -> None:
    """Under 16-mixed the scaler skips infinities; a NaN of the loss rolls back, with its scale."""
    order = order_of(SAMPLES, 4)
    options: dict[str, Any] = {"snapshot_every": 5, "updates": 4, "recover": 0}
    bad = order[90 * BATCH : 94 * BATCH]

    def own() -> StepGuard:
        return StepGuard([NonFinite()], roll_back=RollBack(**options))

    module, first = Poisoned(bad, factor=30.0, lr=1e-3), own()
    trainer = train(module, Plain(SAMPLES), first, steps=110, precision="16-mixed")
    assert [(r.update, r.to) for r in first.rollbacks] == [(93, 86)]
    clean = Poisoned(lr=1e-3)
    data = Ordered(without(order, 86, 94), SAMPLES)
    other = train(clean, data, own(), steps=110, precision="16-mixed")
    assert not differing(final(module, trainer), final(clean, other))
    scalers = [t.precision_plugin.scaler.state_dict() for t in (trainer, other)]
    assert scalers[0] == scalers[1]


def test_a_ramp_of_the_batch_follows_the_clock_that_went_back() -> None:
    """The batch grows from 4 to 8 samples at update 10, and after the rollback again."""
    order = order_of(SAMPLES, 4)
    policy = BatchSizeSteps({"0%": 4, "25%": 8})
    bad = order[10 * 4 : 10 * 4 + 8]
    module, own = (
        Poisoned(bad),
        StepGuard([NonFinite()], max_consecutive=1, roll_back=RollBack(snapshot_every=5)),
    )
    trainer = train(module, Plain(SAMPLES), own, policy=policy)
    (report,) = own.rollbacks
    assert (report.update, report.to, report.left_out) == (10, 6, 4 * 4 + 8)
    clean = Poisoned()
    kept = [*order[: 6 * 4], *order[10 * 4 + 8 :]]
    other = train(clean, Ordered([i for _, i in kept], SAMPLES), policy=policy)
    assert not differing(final(module, trainer), final(clean, other))


def test_under_max_epochs_the_schedule_follows_the_position_in_the_data() -> None:
    """The epochs are those planned: the run has fewer updates, and its schedule ends with it."""
    order = order_of(SAMPLES, 2)
    module, own = Poisoned(order[8 * BATCH : 10 * BATCH]), guard(snapshot_every="10%")
    trainer = train(module, Plain(SAMPLES), own, steps=-1, max_epochs=2)
    assert trainer.current_epoch == 2
    (report,) = own.rollbacks
    assert (report.update, report.to) == (9, 7)
    assert trainer.global_step == 60 - 3
    clean = Poisoned()
    train(clean, Plain(SAMPLES), steps=-1, max_epochs=2)
    assert module.lrs[10:] == clean.lrs[10:]  # update 7 of the run has the data of update 10


@pytest.mark.parametrize("kind", [DataLoader, ResumableLoader])
def test_a_loader_of_the_user_goes_on_behind_the_bad_data(kind: Any) -> None:
    def data() -> Any:
        if kind is ResumableLoader:
            return ResumableLoader(SAMPLES, BATCH)
        return DataLoader(Plain(SAMPLES), batch_size=BATCH)

    bad = [(0, i) for i in range(8 * BATCH, 10 * BATCH)]
    module, own = Poisoned(bad), guard()
    trainer = train(module, data(), own, steps=26)
    (report,) = own.rollbacks
    assert (report.update, report.to, report.left_out) == (9, 6, 4 * BATCH)
    assert trainer.global_step == 26
    kept = [i for step, batch in module.trained[:6] + module.trained[10:] for i in batch]
    assert kept == [*range(6 * BATCH), *range(10 * BATCH, 30 * BATCH)]
    assert [step for step, _ in module.trained] == [*range(10), *range(6, 26)]


@pytest.mark.parametrize("stateful", [False, True])
def test_data_may_be_trained_again(stateful: bool, caplog: Any) -> None:
    """With a loader that has a state; others go on, and a line says so."""
    order = [(0, i) for i in range(SAMPLES)]
    once = {i for _, i in order[8 * BATCH : 10 * BATCH]}

    class Once(Poisoned):
        """The samples are bad once."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            found = once & set(batch[2].tolist())
            once.difference_update(found)
            return loss * (math.nan if found else 1.0)

    module, own = Once(), guard(skip_data=False)
    loader: Any = ResumableLoader(SAMPLES, BATCH) if stateful else DataLoader(Plain(SAMPLES), 4)
    with caplog.at_level("INFO"):
        trainer = train(module, loader, own, steps=20)
    assert ("has no state_dict" in caplog.text) == (not stateful)
    (report,) = own.rollbacks
    assert report.replayed == stateful
    first = 6 if stateful else 10
    assert module.trained[10:] == [
        (6 + k, [*range((first + k) * BATCH, (first + k + 1) * BATCH)]) for k in range(14)
    ]
    if stateful:
        clean = Poisoned()
        other = train(clean, ResumableLoader(SAMPLES, BATCH), guard(), steps=20)
        assert not differing(final(module, trainer), final(clean, other))


def test_the_axis_of_the_loggers_goes_on(tmp_path: Path) -> None:
    order = order_of(SAMPLES, 4)
    logger, monitor = TensorBoardLogger(tmp_path), OptimizationMonitor(every=1)
    own = guard()
    module = Poisoned(order[8 * BATCH : 10 * BATCH])
    trainer = train(module, Plain(SAMPLES), own, monitor, steps=20, logger=logger)
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 24
    batches = trainer.fit_loop.epoch_loop.batch_progress
    assert (batches.total.ready, batches.current.ready) == (20, 24)  # the position goes on
    found = read_run(logger.log_dir)
    assert [step for step, _ in found.curves["rollback/count"]] == list(range(24))
    assert found.curves["rollback/count"][-1] == (23, 1.0)
    assert found.curves["rollback/left_out"][-1] == (23, 4.0 * BATCH)
    # The accepted updates of the discarded stretch: 6 and 7.
    assert [step for step, _ in found.curves["rollback/discarded_loss"]] == [6, 7]
    assert any("rolled back to update 6" in line for line in found.refusals)


def test_repeated_rollbacks_lower_what_is_left_of_the_learning_rate() -> None:
    """Closed form: 0.125 at update 6 after three rollbacks, back to 1 at update 26."""
    module, _, own, order = poisoned_run(17, 6, lr_factor=0.5, recover="50%")
    assert [r.to for r in own.rollbacks] == [16, 11, 6]
    clean = Poisoned()
    train(clean, Ordered(without(order, 6, 23), SAMPLES), guard())
    factors = [min(1.0, 0.125 + 0.875 * (t - 6) / 20) for t in range(6, 40)]
    expected = [f * rate for f, rate in zip(factors, clean.lrs[6:], strict=True)]
    assert module.lrs[-34:] == pytest.approx(expected, rel=1e-12)


def test_a_snapshot_of_a_checkpoint_serves_several_times(tmp_path: Path) -> None:
    """Training must not change the tensors that were loaded: a good update lies between."""
    order = order_of(SAMPLES, 4)
    module, trainer, own = resumed_run(
        tmp_path / "a.ckpt",
        save=18,
        stop=19,
        order=order,
        bad=[*order[17 * BATCH : 19 * BATCH], *order[20 * BATCH : 22 * BATCH]],
        recover=0,
    )
    assert [(r.update, r.to) for r in own.rollbacks] == [(18, 16), (18, 16)]
    clean = Poisoned()
    other = train(clean, Ordered(without(order, 16, 22), SAMPLES), guard())
    assert not differing(final(module, trainer), final(clean, other))
