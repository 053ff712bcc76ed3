"""Budgets that share a trunk: branches against plain runs, cost, interruption and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import optuna
import pytest
from torch import nn

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    Constant,
    Cosine,
    InfiniteSchedule,
    LearningRateScheduler,
    ModelAveraging,
    TailMean,
    WarmupConstant,
    WarmupCosine,
    WarmupStableDecay,
)
from lightning_bigopt.tuning import Choice, Log, study
from lightning_bigopt.tuning.trunk_files import Progress, read_progress, write_progress
from lightning_bigopt.tuning.trunk_schedule import budgets_in_updates, fork_of, with_fixed_warmup
from tests.tuning.study_helpers import Network, make_data, make_trainer

BUDGETS = ("25%", "50%", "100%")


@pytest.fixture(autouse=True)
def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class Noisy(Network):
    """Dropout, so that a branch must continue the random numbers of the trunk."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.net.insert(1, nn.Dropout(0.2))


def trainer_of(schedule: Any = None, **options: Any) -> L.Trainer:
    trainer = make_trainer(**{"max_steps": 40, "val_check_interval": 1.0, **options})
    schedule = schedule or WarmupStableDecay(warmup="5%", decay="20%")
    trainer.callbacks[0] = LearningRateScheduler(schedule)
    return trainer


def plain_loss(lr: float, budget: int, schedule: Any, module: type[Network] = Noisy) -> float:
    """Returns the final loss of an ordinary run of one budget."""
    L.seed_everything(0, verbose=False)
    network, trainer = module(lr), trainer_of(schedule, max_steps=budget)
    train, validation = make_data()
    trainer.fit(network, train, validation)
    (metrics,) = trainer.validate(network, validation, verbose=False)
    return float(metrics["val_loss"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "fixed", "shares", "budgets"),
    [
        # 5 % of the largest budget are two updates.
        (
            WarmupStableDecay(warmup="5%", decay="20%"),
            WarmupStableDecay(warmup=2, decay="20%"),
            BUDGETS,
            (10, 20, 40),
        ),
        # Ratios that are no powers of two: (t/13)/(3/13) may differ from t/3 in its last bit.
        (
            WarmupStableDecay(warmup="7.5%", decay="30%", warmup_shape="cosine"),
            WarmupStableDecay(warmup=3, decay="30%", warmup_shape="cosine"),
            (13, "67.5%", "100%"),
            (13, 27, 40),
        ),
        (
            InfiniteSchedule(warmup=2, decay=3, plateau=0.5, cooldown="30%"),
            InfiniteSchedule(warmup=2, decay=3, plateau=0.5, cooldown="30%"),
            BUDGETS,
            (10, 20, 40),
        ),
    ],
)
def test_branches_equal_plain_runs_of_their_budgets_to_the_bit(
    schedule: Any, fixed: Any, shares: Any, budgets: Any
):
    found = study(
        lambda: trainer_of(schedule),
        Noisy,
        make_data=make_data,
        space={"lr": Log(1e-3, 0.1)},
        trials=2,
        budgets=shares,
        pruner=None,
    )
    assert found.budgets == budgets
    for trial in found.trials:
        curve = [(n, plain_loss(trial.values["lr"], n, fixed)) for n in found.budgets]
        assert list(trial.curve) == curve
        assert trial.loss == curve[-1][1]
    # The last budget is the run that the Trainer of the user makes.
    assert found.trials[0].loss == plain_loss(found.trials[0].values["lr"], 40, schedule)


@pytest.mark.slow
def test_cost_counts_every_update_once():
    trained: list[int] = []

    class Counts(Noisy):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            trained.append(self.trainer.global_step)

    space = {"lr": Choice([0.05])}
    options: dict[str, Any] = {"space": space, "trials": 1, "budgets": BUDGETS}
    found = study(trainer_of, Counts, make_data=make_data, **options)
    # The trunk of 32 updates once, and the cooldowns of 2, 4 and 8; separate runs take 70.
    assert found.updates == len(trained) == 32 + 2 + 4 + 8
    assert found.updates_saved == 10 + 20 + 40 - 46
    assert "saved 24 of the 70 updates that separate runs would have trained" in str(found)


@pytest.mark.slow
def test_successive_halving_prunes_at_the_budgets_at_which_optuna_does():
    found = study(
        trainer_of,
        Network,
        make_data=make_data,
        space={"lr": Log(1e-4, 1.0)},
        trials=8,
        sampler="random",
        seed=4,
        budgets=BUDGETS,
    )
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=10, reduction_factor=2)
    oracle = optuna.create_study(pruner=pruner)
    ends = {}
    for trial in found.trials:
        asked = oracle.ask()
        values = dict(trial.curve)
        for step in found.budgets:
            asked.report(values.get(step, float("nan")), step)
            ends[trial.number] = step
            if step < 40 and asked.should_prune():
                break
        state = optuna.trial.TrialState[trial.state.upper()]
        oracle.tell(asked, trial.loss if trial.state == "complete" else None, state=state)
    assert {t.number: t.curve[-1][0] for t in found.trials} == ends
    assert {t.state for t in found.trials} == {"complete", "pruned"}
    assert all(t.curve[-1][0] < 40 for t in found.trials if t.state == "pruned")


class Interrupted(L.Callback):
    """Ends the process of a user's patience: an exit in the branch of the second budget."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.max_steps == 20 and trainer.global_step == 18:
            raise SystemExit(3)


@pytest.mark.slow
def test_interrupted_trial_goes_on_with_its_trunk(tmp_path: Path):
    storage, space = tmp_path / "study.db", {"lr": Log(1e-3, 0.1)}
    options: dict[str, Any] = {"space": space, "trials": 1, "budgets": BUDGETS}

    def interrupted() -> L.Trainer:
        trainer = trainer_of()
        trainer.callbacks.append(Interrupted())
        return trainer

    with pytest.raises(SystemExit):
        study(interrupted, Noisy, make_data=make_data, storage=storage, **options)
    kept = sorted(
        path.name for path in (tmp_path / "study.db.trunks").rglob("*.*") if path.is_file()
    )
    assert kept == [
        "progress.json",
        "update=16-process=0.pt",
        "update=16.ckpt",
        "update=8-process=0.pt",
        "update=8.ckpt",
    ]
    found = study(trainer_of, Noisy, make_data=make_data, storage=storage, **options)
    straight = study(trainer_of, Noisy, make_data=make_data, **options)
    (trial,) = found.trials
    assert trial.values == straight.trials[0].values
    assert trial.curve == straight.trials[0].curve
    assert (trial.updates, trial.updates_saved) == (46, 24)  # as without the interruption
    assert not (tmp_path / "study.db.trunks").exists()


@pytest.mark.parametrize(
    ("schedule", "budget", "fork"),
    [
        (WarmupStableDecay(warmup=10, decay="20%"), 100, 80),
        (WarmupStableDecay(warmup=10, decay="25%"), 50, 37),  # begins at 37.5
        (WarmupStableDecay(warmup=0, decay=30), 100, 70),
        (InfiniteSchedule(warmup=5, decay=20, cooldown="50%"), 100, 50),
    ],
)
def test_fork_is_the_last_update_with_the_same_factors(schedule: Any, budget: int, fork: int):
    assert fork_of(schedule, budget, 400) == fork
    mine, theirs = schedule.values(budget), schedule.values(400)
    assert mine[: fork + 1] == pytest.approx(theirs[: fork + 1], rel=1e-12)
    assert mine[fork + 1] < theirs[fork + 1]


@pytest.mark.parametrize(
    "schedule",
    [
        Cosine(),
        WarmupCosine(warmup=10),
        WarmupConstant(warmup=10),
        Constant(),
        WarmupStableDecay(warmup=10, decay="90%"),
    ],
)
def test_schedule_without_plateau_or_cooldown_raises(schedule: Any):
    with pytest.raises(ValueError, match="schedule must have a plateau and a cooldown"):
        fork_of(schedule, 100, 400)


def test_warmup_in_percent_is_that_of_the_largest_budget():
    fixed = with_fixed_warmup(WarmupStableDecay(warmup="5%"), 300)
    assert str(fixed.warmup) == "15 steps"
    assert fixed.values(100)[:16] == pytest.approx([update / 15 for update in range(16)])
    unchanged = WarmupStableDecay(warmup=7)
    assert with_fixed_warmup(unchanged, 300) == unchanged


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ("25%", r"budgets must be a list .* got '25%'"),
        ([], "budgets must be a list"),
        (["1 epoch"], r"budgets\[0\] must be a share or a number of updates, got '1 epoch'"),
        (["0%"], r"budgets\[0\] must be a share"),
        ([100, "25%"], "budgets must be different"),
    ],
)
def test_invalid_budgets_raise(budgets: Any, message: str):
    with pytest.raises(ValueError, match=message):
        budgets_in_updates(budgets, 400)


def test_budgets_need_max_steps():
    with pytest.raises(ValueError, match=r"max_steps of the Trainer must be positive .* got -1"):
        budgets_in_updates(BUDGETS, -1)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (BatchSizeScheduler(BatchSizeSteps({"0%": 8, "50%": 16})), "must not depend on the budget"),
        (ModelAveraging(TailMean(over="10%")), "must not depend on the budget"),
        (LearningRateScheduler(Cosine()), "schedule must have a plateau"),
        (LearningRateScheduler(WarmupStableDecay(), budget="9 steps"), "budget must be None"),
        (None, "callbacks must contain a LearningRateScheduler"),
    ],
)
def test_training_that_cannot_share_a_trunk_raises(callback: Any, message: str):
    def trainer() -> L.Trainer:
        made = trainer_of()
        kept = [c for c in made.callbacks if type(c) is not type(callback)]
        if callback is None:
            kept = []
        made.callbacks[:] = [*kept, *([] if callback is None else [callback])]
        return made

    with pytest.raises(ValueError, match=message):
        study(
            trainer,
            Network,
            make_data=make_data,
            space={"lr": Choice([0.05])},
            trials=1,
            budgets=BUDGETS,
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"max_epochs": 2}, [], "training ended after 16 updates, before the budget of 20"),
        ({}, [9], "training ended after 9 updates, before the budget of 20"),
    ],
)
def test_training_that_ends_before_a_budget_is_pruned(options: Any, more: Any, message: str):
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
            trainer.should_stop = trainer.should_stop or trainer.global_step in more

    def trainer() -> L.Trainer:
        made = trainer_of(**options)
        made.callbacks.append(Stops())
        return made

    with pytest.raises(ValueError, match=message):
        study(
            trainer,
            Network,
            make_data=make_data,
            space={"lr": Choice([0.05])},
            trials=1,
            budgets=[20, 40],
        )


def test_progress_under_other_conditions_is_discarded(tmp_path: Path):
    conditions = {"values": "lr=0.1", "budgets": [10, 40], "monitor": "val_loss", "seed": "0"}
    place = tmp_path / "trial"
    write_progress(place, Progress(losses={10: 0.5}, updates=9, conditions=conditions))
    assert read_progress(place, conditions).losses == {10: 0.5}
    (place / "update=8.ckpt").touch()
    for name, value in {"budgets": [10, 20], "seed": "1", "monitor": "loss"}.items():
        write_progress(place, Progress(losses={10: 0.5}, updates=9, conditions=conditions))
        assert read_progress(place, {**conditions, name: value}) == Progress(
            conditions={**conditions, name: value}
        )
        assert not place.exists()


@pytest.mark.slow
def test_trunk_of_a_deleted_study_is_not_used(tmp_path: Path):
    storage, space = tmp_path / "study.db", {"lr": Choice([0.05])}
    options: dict[str, Any] = {"space": space, "trials": 1, "budgets": BUDGETS}

    def interrupted() -> L.Trainer:
        trainer = trainer_of()
        trainer.callbacks.append(Interrupted())
        return trainer

    def other() -> Noisy:
        return Noisy(lr=0.02)

    with pytest.raises(SystemExit):
        study(interrupted, Noisy, make_data=make_data, storage=storage, **options)
    storage.unlink()
    options["space"] = {"max_norm": Choice([1.0])}
    found = study(trainer_of, other, make_data=make_data, storage=storage, **options)
    assert found.updates == 46


def test_folder_that_cannot_be_written_raises_before_training(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"folder must be a folder that can be written, got"):
        study(
            trainer_of,
            Network,
            make_data=make_data,
            space={"lr": Choice([0.05])},
            trials=1,
            budgets=BUDGETS,
            folder=tmp_path / "file" / "trunks",
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (ModelAveraging(TailMean(over="10%")), "must not depend on the budget .* ModelAveraging"),
        (LearningRateScheduler(WarmupStableDecay()), "LearningRateScheduler .* from the module"),
    ],
)
def test_callback_of_the_module_that_depends_on_the_budget_raises(callback: Any, message: str):
    class WithCallback(Network):
        def configure_callbacks(self) -> Any:
            return [callback]

    with pytest.raises(ValueError, match=message):
        study(
            trainer_of,
            WithCallback,
            make_data=make_data,
            space={"lr": Log(1e-3, 0.1)},
            trials=2,
            budgets=BUDGETS,
        )
