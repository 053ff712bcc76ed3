"""study(): trials against plain runs and Optuna itself, paths, failures, storage and restarts."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import optuna
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_bigopt import (
    BatchSizeScheduler,
    GradientClipping,
    LearningRateScheduler,
    OptimizationMonitor,
    WarmupStableDecay,
)
from lightning_bigopt.tuning import Choice, Integer, Log, Uniform, study
from tests.helpers import QUIET
from tests.tuning.study_helpers import Network, make_data, make_trainer, plain_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:BruteForceSampler is experimental"),
]


@pytest.fixture(autouse=True)
def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def run(space: dict[str, Any], **options: Any) -> Any:
    return study(
        options.pop("make_trainer", make_trainer),
        options.pop("make_module", Network),
        make_data=make_data,
        space=space,
        **{"trials": 3, "pruner": None, **options},
    )


def test_trials_equal_plain_runs_with_the_same_values_to_the_bit():
    found = run({"lr": Log(1e-3, 0.3)}, sampler="random")
    assert [trial.state for trial in found.trials] == ["complete"] * 3
    for trial in found.trials:
        assert trial.loss == plain_run(trial.values["lr"])
    best = min(found.trials, key=lambda trial: trial.loss)
    assert found.best_loss == best.loss
    assert found.best_values == {"lr": best.values["lr"]}
    assert found.updates == 3 * 24
    assert found.updates_saved == 0
    assert [step for step, _ in best.curve] == [4, 8, 12, 16, 20, 24]


def test_fields_of_callbacks_equal_a_plain_run_with_callbacks_made_so():
    space = {"schedule.decay": Choice(["60%"]), "clip.max_norm": Choice([0.3])}
    found = run(space, trials=1)
    L.seed_everything(0, verbose=False)
    module, trainer = Network(), make_trainer()
    trainer.callbacks[:2] = [
        LearningRateScheduler(WarmupStableDecay(warmup="10%", decay="60%")),
        GradientClipping(type(trainer.callbacks[1].rule)(max_norm=0.3)),
    ]
    trainer.fit(module, *make_data())
    assert found.best_loss == float(trainer.callback_metrics["val_loss"])
    assert found.best_loss != plain_run(0.05)


def test_same_seed_gives_the_same_study_and_another_one_others():
    space = {"lr": Log(1e-3, 0.3), "width": Integer(2, 6)}
    first, second, other = (run(space, seed=seed) for seed in (1, 1, 2))
    values = [[dict(trial.values) for trial in found.trials] for found in (first, second, other)]
    assert values[0] == values[1] != values[2]
    assert [t.loss for t in first.trials] == [t.loss for t in second.trials]


def test_points_are_those_of_a_seeded_sampler_of_optuna():
    found = run({"lr": Log(1e-3, 0.3)}, sampler="random", seed=3)
    # Each trial has a sampler of its own, seeded from (seed, number).
    for trial in found.trials:
        seed = random.Random(f"3/{trial.number}").getrandbits(32)
        oracle = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
        assert trial.values["lr"] == oracle.suggest_float("lr", 1e-3, 0.3, log=True)


def test_median_pruner_prunes_the_trials_that_optuna_prunes():
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    found = run({"lr": Log(1e-3, 10.0)}, sampler="random", pruner=pruner, trials=6)
    states = {trial.number: trial.state for trial in found.trials}
    assert set(states.values()) == {"complete", "pruned"}
    # The oracle is told the same curves. A trial that is pruned has no later values.
    oracle = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=2))
    for trial in found.trials:
        asked = oracle.ask()
        for step, value in trial.curve:
            asked.report(value, step)
            is_last = (step, value) == trial.curve[-1]
            if step < 24:
                assert asked.should_prune() == (is_last and trial.state == "pruned")
        state = optuna.trial.TrialState[trial.state.upper()]
        oracle.tell(asked, trial.loss if trial.state == "complete" else None, state=state)
    stopped = next(trial for trial in found.trials if trial.state == "pruned")
    assert stopped.updates == stopped.curve[-1][0] < 24
    assert "pruner stopped it" in stopped.reason


def validated_at_the_end() -> L.Trainer:
    return make_trainer(val_check_interval=1.0)


def test_divergence_and_refused_values_are_pruned_with_their_reasons():
    space = {"lr": Choice([0.05, 1e20]), "clip.max_norm": Choice([1e30, -1.0])}
    sampler = optuna.samplers.BruteForceSampler(seed=0)
    found = run(space, sampler=sampler, trials=4, make_trainer=validated_at_the_end)
    by_values = {(t.values["lr"], t.values["clip.max_norm"]): t for t in found.trials}
    assert by_values[0.05, 1e30].state == "complete"
    diverged = by_values[1e20, 1e30]
    assert diverged.state == "pruned"
    assert diverged.reason.startswith("updates must not be rejected 3 times in a row")
    for lr in (0.05, 1e20):
        refused = by_values[lr, -1.0]
        assert refused.state == "pruned"
        assert refused.reason.startswith("refused: max_norm must be positive")
        assert refused.updates == 0


def bare_trainer(**options: Any) -> L.Trainer:
    return L.Trainer(**{**QUIET, "max_steps": 22, "val_check_interval": 4, **options})


def plain_data() -> Any:
    train, validation = make_data()
    return DataLoader(train.dataset, batch_size=8), validation


def test_non_finite_value_is_pruned_without_a_guard():
    found = study(
        bare_trainer,
        Network,
        make_data=plain_data,
        space={"lr": Choice([1e25, 0.05])},
        trials=2,
        sampler=optuna.samplers.BruteForceSampler(seed=0),
    )
    bad = next(trial for trial in found.trials if trial.values["lr"] == 1e25)
    assert bad.state == "pruned"
    assert bad.reason in ("val_loss was nan after 4 updates", "val_loss was inf after 4 updates")
    assert bad.updates == 4


class OutOfMemory(Network):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.lr > 0.1 and batch_idx == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().training_step(batch, batch_idx)


def test_out_of_memory_is_pruned():
    found = run(
        {"lr": Choice([0.05, 0.2])},
        make_module=OutOfMemory,
        sampler=optuna.samplers.BruteForceSampler(seed=0),
        trials=2,
    )
    large = next(trial for trial in found.trials if trial.values["lr"] == 0.2)
    assert (large.state, large.updates) == ("pruned", 2)
    assert large.reason == "out of memory: CUDA out of memory. Tried to allocate 20.00 GiB"


class Faulty(Network):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise KeyError("a fault of the user")


def test_fault_of_the_user_is_raised_with_the_values(tmp_path: Path):
    with pytest.raises(KeyError, match="a fault of the user") as caught:
        run({"lr": Choice([0.05])}, make_module=Faulty, storage=tmp_path / "study.db")
    if hasattr(caught.value, "__notes__"):
        assert caught.value.__notes__ == ["Trial 0 has failed with lr=0.05."]
    (trial,) = stored(tmp_path).trials
    assert trial.state.name == "FAIL"
    assert "a fault of the user" in trial.user_attrs["reason"]


def test_study_without_any_trained_trial_raises_with_the_reasons():
    with pytest.raises(ValueError, match=r"2 trials .* none .*max_norm must be positive.*change"):
        run({"clip.max_norm": Uniform(-2.0, -1.0)}, trials=2)


def stored(folder: Path, name: str = "study.db") -> optuna.Study:
    return optuna.load_study(study_name="study", storage=f"sqlite:///{folder / name}")


@pytest.mark.parametrize("name", ["study.db", "study.journal"])
def test_study_goes_on_with_other_points(tmp_path: Path, name: str):
    space = {"lr": Log(1e-3, 0.3)}
    first = run(space, storage=tmp_path / name, trials=2)
    both = run(space, storage=tmp_path / name, trials=4)
    again = run(space, storage=tmp_path / name, trials=4)
    assert [t.values for t in both.trials[:2]] == [t.values for t in first.trials]
    assert len({t.values["lr"] for t in both.trials}) == 4
    assert again == both
    assert both.trials[3].loss == plain_run(both.trials[3].values["lr"])


def test_trial_of_a_dead_process_is_repeated_first(tmp_path: Path):
    space = {"lr": Log(1e-3, 0.3)}
    run(space, storage=tmp_path / "study.db", trials=1)
    killed = stored(tmp_path).ask()
    value = killed.suggest_float("lr", 1e-3, 0.3, log=True)
    process = os.spawnlp(os.P_WAIT, "true", "true")  # a number that no process has any more
    assert process == 0
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    killed.set_user_attr("host", os.uname().nodename)
    killed.set_user_attr("pid", child)
    found = run(space, storage=tmp_path / "study.db", trials=2)
    assert [trial.number for trial in found.trials] == [0, 2]
    assert found.trials[1].values["lr"] == value
    assert [t.state.name for t in stored(tmp_path).trials] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_trial_of_another_machine_counts_as_running(tmp_path: Path):
    space = {"lr": Log(1e-3, 0.3)}
    run(space, storage=tmp_path / "study.db", trials=1)
    elsewhere = stored(tmp_path).ask()
    elsewhere.set_user_attr("host", "another machine")
    elsewhere.set_user_attr("pid", 1)
    found = run(space, storage=tmp_path / "study.db", trials=2)
    assert [trial.state for trial in found.trials] == ["complete", "running"]


def test_no_trace_is_left():
    os.environ.pop("PL_GLOBAL_SEED", None)
    L.seed_everything(11, verbose=False)
    kept = dict(os.environ)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    inits = {kind: kind.__init__ for kind in (EarlyStopping, ModelCheckpoint)}
    run({"lr": Log(1e-3, 0.3)}, trials=1, seed=5)
    assert dict(os.environ) == kept
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
    assert all(kind.__init__ is init for kind, init in inits.items())


def test_value_is_measured_after_the_last_update():
    space = {"lr": Choice([0.05])}
    found = study(bare_trainer, Network, make_data=plain_data, space=space, trials=1)
    L.seed_everything(0, verbose=False)
    module, trainer = Network(), bare_trainer()
    train, validation = plain_data()
    trainer.fit(module, train, validation)
    (oracle,) = trainer.validate(module, validation, verbose=False)
    assert found.best_loss == oracle["val_loss"]
    assert max(step for step, _ in found.trials[0].curve) < 22


# ---------------------------------------------------------------------------------------- paths


def recorded(found: list[Any]) -> Any:
    """Returns a function that makes a Trainer whose callbacks are kept in ``found``."""

    class Keeps(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            found.append((trainer, pl_module))

    def make() -> L.Trainer:
        return make_trainer(Keeps(), EarlyStopping("val_loss", min_delta=0.01, patience=9))

    return make


@pytest.mark.parametrize(
    ("path", "value", "read"),
    [
        ("schedule.decay", "30%", lambda t, m: str(t.callbacks[0].schedule.decay)),
        ("callbacks.0.schedule.decay", "30%", lambda t, m: str(t.callbacks[0].schedule.decay)),
        ("decay", "30%", lambda t, m: str(t.callbacks[0].schedule.decay)),
        ("schedule.min_lr", 0.001, lambda t, m: t.callbacks[0].min_lr),
        ("clip.max_norm", 0.5, lambda t, m: callback(t, GradientClipping).rule.max_norm),
        ("max_norm", 0.5, lambda t, m: callback(t, GradientClipping).rule.max_norm),
        ("clip.scope", "all", lambda t, m: callback(t, GradientClipping).scope),
        ("global_batch_size", 16, lambda t, m: policy(t).size),
        ("batch.size", 16, lambda t, m: policy(t).size),
        ("EarlyStopping.patience", 7, lambda t, m: callback(t, EarlyStopping).patience),
        ("patience", 7, lambda t, m: callback(t, EarlyStopping).patience),
        ("callbacks.0.schedule.end", 0.1, lambda t, m: t.callbacks[0].schedule.end),
        ("model.width", 3, lambda t, m: m.net[0].out_features),
        ("width", 3, lambda t, m: m.net[0].out_features),
        ("optimizer.momentum", 0.5, lambda t, m: t.optimizers[0].param_groups[0]["momentum"]),
        ("momentum", 0.5, lambda t, m: t.optimizers[0].param_groups[0]["momentum"]),
        ("nesterov", True, lambda t, m: t.optimizers[0].param_groups[0]["nesterov"]),
    ],
)  # fmt: skip
def test_path_reaches_its_field(path: str, value: Any, read: Any):
    found: list[Any] = []
    run({path: Choice([value])}, make_trainer=recorded(found), trials=1)
    trainer, module = found[0]
    assert read(trainer, module) == value
    stopping = callback(trainer, EarlyStopping)
    assert stopping.min_delta == -0.01  # as Lightning stores it, also after it was made anew


def policy(trainer: L.Trainer) -> Any:
    return callback(trainer, BatchSizeScheduler).policy


def callback(trainer: L.Trainer, kind: type) -> Any:
    return next(c for c in trainer.callbacks if isinstance(c, kind))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("schedule.deacy", "'schedule.deacy'; did you mean 'schedule.decay'"),
        ("clip.maxnorm", "did you mean 'clip.max_norm'"),
        ("widht", "did you mean 'width'"),
        ("optimizer.momentun", "did you mean 'optimizer.momentum'"),
        ("EarlyStoping.patience", "did you mean 'EarlyStopping.patience'"),
        ("something.else", "the fields are lr, width"),
        ("every", "'every', which 2 fields have; write one of 'callbacks.5.every', 'callbacks.6"),
    ],
)
def test_unknown_path_raises_before_the_first_trial(path: str, message: str):
    def two_monitors() -> L.Trainer:
        trainer = recorded([])()
        trainer.callbacks += [OptimizationMonitor(), OptimizationMonitor(event_folder="a")]
        trainer.callbacks[:] = [c for c in trainer.callbacks if type(c).__name__ != "Keeps"]
        return trainer

    with pytest.raises(ValueError, match=message) as caught:
        run({path: Choice([1])}, make_trainer=two_monitors, storage=None)
    assert str(caught.value).startswith("space must contain paths of")


def test_ratios_between_groups_and_zeros_are_kept():
    class Groups(Network):
        def configure_optimizers(self) -> Any:
            body, head = self.net[0].parameters(), self.net[2].parameters()
            groups = [
                {"params": body, "lr": 0.04, "weight_decay": 0.0},
                {"params": head, "lr": 0.02, "weight_decay": 0.1},
            ]
            return torch.optim.AdamW(groups)

    found: list[Any] = []
    space = {
        "optimizer.lr": Choice([0.4]),
        "weight_decay": Choice([0.3]),
        "betas": Choice([(0.8, 0.9)]),
    }
    result = run(space, make_module=Groups, make_trainer=recorded(found), trials=1)
    groups = found[0][0].optimizers[0].param_groups
    assert [group["initial_lr"] for group in groups] == [0.4, 0.2]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.3]
    assert [group["betas"] for group in groups] == [(0.8, 0.9)] * 2
    assert result.best_values["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": {}}, "space must be a dictionary"),
        ({"space": {"lr": [1, 2]}}, r"got \[1, 2\] for 'lr'; write Choice\(\[1, 2\]\)"),
        ({"space": {"lr": (1, 2)}}, r"write Log\(1, 2\) or Uniform\(1, 2\)"),
        ({"trials": 0}, "trials must be a positive number of trials, got 0"),
        ({"direction": "min"}, "direction must be 'minimize' or 'maximize', got 'min'"),
        ({"sampler": "CMA"}, "sampler must be a sampler of Optuna .* 'CMA'; did you mean 'CmaEs'"),
        ({"sampler": "CmaEs"}, "got 'CmaEs', which needs cmaes; pip install cmaes"),
        ({"sampler": "Grid"}, "sampler must be an object .* got 'Grid'"),
        ({"pruner": "Threshold"}, "pruner must be an object .* got 'Threshold'"),
        ({"pruner": "medain"}, "did you mean 'Median'"),
        ({"storage": "study.txt"}, "storage must be a file .db"),
        ({"monitor": 3}, "monitor must be a str"),
        ({"seed": -1}, "seed must be"),
        ({"monitor": "val_los"}, "monitor must be the name .* did you mean 'val_loss'"),
    ],
)
def test_invalid_arguments_raise(options: dict[str, Any], message: str):
    space = options.pop("space", {"lr": Choice([0.05])})
    with pytest.raises(ValueError, match=message):
        run(space, **{"trials": 1, **options})


def test_maximize_selects_the_largest_value():
    found = run({"lr": Choice([0.001, 0.05])}, direction="maximize", trials=2, sampler="QMC")
    losses = [trial.loss for trial in found.trials]
    assert found.best_loss == max(losses)
    assert math.isfinite(found.best_loss)


# ------------------------------------------------------------------------------ mistakes of setup


def test_setup_that_is_refused_without_the_values_raises_at_the_first_trial(tmp_path: Path):
    def refused(lr: float = 0.05, width: int = 8) -> Network:
        raise ValueError("vocabulary must exist, got none")

    with pytest.raises(ValueError, match=r"^vocabulary must exist, got none"):
        run({"lr": Log(1e-3, 0.3)}, make_module=refused, storage=tmp_path / "study.db")
    assert [trial.state.name for trial in stored(tmp_path).trials] == ["FAIL"]


def test_schedule_that_is_refused_at_the_start_of_the_fit_raises_at_the_first_trial():
    def too_long() -> L.Trainer:
        trainer = make_trainer()
        trainer.callbacks[0] = LearningRateScheduler(WarmupStableDecay(warmup=30, decay=10))
        return trainer

    with pytest.raises(ValueError, match="must") as caught:
        run({"lr": Log(1e-3, 0.3)}, make_trainer=too_long)
    assert "trials" not in str(caught.value)


def test_missing_data_raises_also_after_a_trained_trial():
    calls = []

    def data() -> Any:
        calls.append(len(calls))
        if len(calls) > 1:
            raise ValueError("the folder is not mounted")
        return make_data()

    with pytest.raises(ValueError, match="the folder is not mounted"):
        study(make_trainer, Network, make_data=data, space={"lr": Log(1e-3, 0.3)}, trials=3)
    assert calls == [0, 1]


def test_trials_refused_for_one_reason_do_not_use_up_the_study(tmp_path: Path):
    def refused(lr: float) -> Network:  # without a default it cannot be called without the value
        raise ValueError("vocabulary must exist, got none")

    space, storage = {"lr": Log(1e-3, 0.3)}, tmp_path / "study.db"
    with pytest.raises(ValueError, match="vocabulary must exist") as caught:
        run(space, make_module=refused, storage=storage, trials=2)
    assert "change the ranges" not in str(caught.value)
    found = run(space, storage=storage, trials=2)
    assert [trial.state for trial in found.trials] == ["failed", "failed", "complete", "complete"]


def test_module_and_trainer_must_be_new_for_each_trial():
    kept, trainer = Network(), make_trainer()
    with pytest.raises(ValueError, match="make_module must return a new module for each trial"):
        run({"max_norm": Log(0.1, 1.0)}, make_module=lambda: kept)
    with pytest.raises(ValueError, match="make_trainer must return a new trainer for each trial"):
        run({"lr": Log(1e-3, 0.3)}, make_trainer=lambda: trainer)
    with pytest.raises(ValueError, match="make_module must be a function, got a Network"):
        run({"lr": Log(1e-3, 0.3)}, make_module=kept)


def test_interrupt_ends_the_study_as_an_interrupt_and_is_repeated(tmp_path: Path):
    class Interrupts(L.Callback):
        def on_train_batch_start(self, *arguments: Any) -> None:
            raise KeyboardInterrupt

    space, storage = {"lr": Log(1e-3, 0.3)}, tmp_path / "study.db"
    with pytest.raises(KeyboardInterrupt):
        run(space, make_trainer=lambda: make_trainer(Interrupts()), storage=storage)
    assert [trial.state.name for trial in stored(tmp_path).trials] == ["FAIL", "WAITING"]


class AnyArguments(Network):
    """Accepts any argument."""

    def __init__(self, lr: float = 0.01, **others: Any) -> None:
        super().__init__(lr=lr)


def test_path_that_only_any_arguments_take_warns() -> None:
    def closed_trainer() -> L.Trainer:
        return make_trainer()

    space = {"learning_rat": Log(1e-3, 0.3)}
    with pytest.warns(UserWarning, match=r"'learning_rat' of the space is no field .* make_module"):
        study(closed_trainer, AnyArguments, make_data=make_data, space=space, trials=1)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_data_without_validation_raises_with_the_way_out() -> None:
    def data() -> Any:
        return make_data()[0]

    message = r"make_data must return validation data for monitor='val_loss', got none; return \("
    with pytest.raises(ValueError, match=message):
        study(make_trainer, Network, make_data=data, space={"lr": Log(1e-3, 0.3)}, trials=1)
