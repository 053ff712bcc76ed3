"""The script of the page searches with Optuna: every trial is the run that its values describe."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState
from optuna_integration import PyTorchLightningPruningCallback
from torch.utils.data import DataLoader

from lightning_bigopt import GlobalBatchLoader
from tests.helpers import QUIET

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes" / "hyperparameter_search.md").read_text(encoding="utf-8")
SAMPLES, EPOCHS = 256, 6
DIVERGES = {"lr": 1e30}


class Records(L.Callback):
    """Records the learning rate of every update, by fit."""

    def __init__(self) -> None:
        self.fits: list[list[float]] = []

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.fits.append([])
        trainer.optimizers[0].register_step_pre_hook(self.record)

    def record(self, optimizer: Any, *_: Any) -> None:
        self.fits[-1].append(optimizer.param_groups[0]["lr"])


TWO_PROCESSES = """
import json
import sys

import lightning as L
import optuna
import torch
from optuna_integration import PyTorchLightningPruningCallback
from torch.utils.data import DataLoader

import search

VALUES = {"warmup": 0.1, "max_norm": 1.0, "global_batch": 16}


def objective(trial):
    L.seed_everything(0, verbose=False)
    module = search.Regression(lr=trial.suggest_float("lr", 1e-4, 1.0, log=True))
    pruning = PyTorchLightningPruningCallback(trial, "val_loss")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        max_epochs=6,
        callbacks=[*search.callbacks(trial), pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train_loader = search.GlobalBatchLoader(search.data(256, seed=0), micro_batch_size=16)
    try:
        trainer.fit(module, train_loader, DataLoader(search.data(128, seed=1), batch_size=64))
    except torch.multiprocessing.ProcessRaisedException as error:
        if "TooManyRejectionsError" not in str(error):
            raise
        raise optuna.TrialPruned("StepGuard has rejected too many updates in a row") from error
    pruning.check_pruned()
    return trainer.callback_metrics["val_loss"].item()


study = optuna.create_study(
    storage="sqlite:///two.db",
    pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0),
)
for lr in (0.05, 1e-4, 1e30):
    study.enqueue_trial({"lr": lr, **VALUES})
study.optimize(objective, n_trials=3)
found = [[t.state.name, t.value, len(t.intermediate_values)] for t in study.trials]
alone = search.objective(optuna.trial.FixedTrial({"lr": 0.05, **VALUES}))
print(json.dumps({"trials": found, "alone": alone}))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_complete_prune_and_end_a_diverging_trial(tmp_path: Path) -> None:
    (tmp_path / "search.py").write_text(script_of_the_page())
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "two.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (complete, value, epochs), pruned, diverged = found["trials"]
    assert (complete, epochs) == ("COMPLETE", EPOCHS)
    assert value == pytest.approx(found["alone"], rel=1e-5)
    assert pruned[0] == "PRUNED"
    assert 0 < pruned[2] < EPOCHS
    assert diverged == ["PRUNED", None, 0]


def script_of_the_page() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return code


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Any, Records]:
    """Runs the script with one trial more, which diverges; returns script, study and records."""
    folder = tmp_path_factory.mktemp("search")
    code = script_of_the_page()
    path = folder / "search.py"
    path.write_text(code.replace("sqlite:///search.db", f"sqlite:///{folder}/search.db"))
    spec = importlib.util.spec_from_file_location("search", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    records, callbacks = Records(), script.callbacks
    script.callbacks = lambda trial: [*callbacks(trial), records]
    study = script.search(n_trials=8)
    study.enqueue_trial(DIVERGES)
    with pytest.warns(UserWarning, match="out of range"):
        study.optimize(script.objective, n_trials=1)
    script.callbacks = callbacks
    return script, study, records


def planned_rates(trial: FrozenTrial) -> list[float]:
    """Computes the learning rates by hand: warm-up from 0, constant, 1-sqrt over the last 30 %."""
    updates = SAMPLES * EPOCHS // trial.params["global_batch"]
    rates = []
    for update in range(updates):
        done = update / updates
        warmup = min(done / trial.params["warmup"], 1.0)
        decay = 1 - max(done - 0.7, 0.0) ** 0.5 / 0.3**0.5
        rates.append(trial.params["lr"] * min(warmup, decay))
    return rates


@pytest.mark.slow
def test_study_completes_and_prunes_trials(searched: Any) -> None:
    _, study, _ = searched
    states = [trial.state for trial in study.trials]
    assert len(states) == 9
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    pruned = [t for t in study.trials[:8] if t.state is TrialState.PRUNED]
    assert len(pruned) >= 2
    assert all(0 < len(trial.intermediate_values) < EPOCHS for trial in pruned)


@pytest.mark.slow
def test_learning_rates_of_every_trial_are_those_of_its_values(searched: Any) -> None:
    _, study, records = searched
    assert len(records.fits) == len(study.trials)
    for trial, rates in zip(study.trials[:8], records.fits, strict=False):
        planned = planned_rates(trial)
        per_epoch = SAMPLES // trial.params["global_batch"]
        assert len(rates) == per_epoch * len(trial.intermediate_values)
        assert rates == pytest.approx(planned[: len(rates)], rel=1e-9, abs=1e-15)


@pytest.mark.slow
def test_diverging_trial_is_pruned_with_a_reason(searched: Any) -> None:
    _, study, records = searched
    trial = study.trials[-1]
    assert trial.state is TrialState.PRUNED
    assert trial.params["lr"] == DIVERGES["lr"]
    assert "must not be rejected 5 times in a row" in trial.user_attrs["diverged"]
    assert len(records.fits[-1]) < SAMPLES * EPOCHS // 64


@pytest.mark.slow
def test_trial_is_the_same_run_alone(searched: Any) -> None:
    """The best trial, which came after pruned ones, trains to the same loss alone."""
    script, study, _ = searched
    best = study.best_trial
    value = script.objective(optuna.trial.FixedTrial(best.params))
    assert value == best.value


def attributes_after(trainer: L.Trainer, module: L.LightningModule) -> list[set[str]]:
    """Returns the attributes of everything that a callback could have patched."""
    objects = (module, trainer, trainer.strategy, trainer.precision_plugin, trainer.fit_loop)
    return [set(vars(found)) for found in (*objects, trainer.fit_loop.epoch_loop)]


@pytest.mark.slow
def test_pruned_trial_leaves_nothing_for_the_next_fit_of_the_same_objects(searched: Any) -> None:
    """Callbacks and module of a trial that was pruned train as new ones do."""
    script, _, _ = searched
    fixed = {"lr": 0.05, "warmup": 0.1, "max_norm": 1.0, "global_batch": 64}

    def trainer_of(*callbacks: L.Callback) -> L.Trainer:
        return L.Trainer(**QUIET, max_epochs=EPOCHS, callbacks=list(callbacks))

    def fit(trainer: L.Trainer, module: L.LightningModule) -> dict[str, torch.Tensor]:
        data = GlobalBatchLoader(script.data(SAMPLES, seed=0), micro_batch_size=16)
        trainer.fit(module, data, DataLoader(script.data(128, seed=1), batch_size=64))
        return {name: value.clone() for name, value in module.state_dict().items()}

    def new() -> tuple[L.LightningModule, list[Any]]:
        L.seed_everything(0, verbose=False)
        return script.Regression(fixed["lr"]), script.callbacks(optuna.trial.FixedTrial(fixed))

    def pruning() -> L.Callback:
        return PyTorchLightningPruningCallback(PrunesAtEpoch(2), "val_loss")

    module, callbacks = new()
    expected = fit(trainer_of(*callbacks), module)

    bare, bare_module = trainer_of(pruning()), new()[0]
    with pytest.raises(optuna.TrialPruned):
        bare.fit(
            bare_module,
            DataLoader(script.data(SAMPLES, seed=0), batch_size=16),
            DataLoader(script.data(128, seed=1), batch_size=64),
        )
    module, callbacks = new()
    initial = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = trainer_of(*callbacks, pruning())
    with pytest.raises(optuna.TrialPruned, match="epoch 2"):
        fit(trainer, module)
    assert attributes_after(trainer, module) == attributes_after(bare, bare_module)
    assert not any(torch.equal(initial[n], v) for n, v in module.state_dict().items())
    module.train()  # Lightning leaves it in eval mode, because validation has raised
    module.load_state_dict(initial)
    again = fit(trainer_of(*callbacks), module)
    assert all(torch.equal(expected[name], value) for name, value in again.items())


class PrunesAtEpoch(optuna.trial.FixedTrial):
    """A trial that is pruned after an epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__({})
        self.epoch, self.reported = epoch, -1

    def report(self, value: float, step: int) -> None:
        self.reported = step

    def should_prune(self) -> bool:
        return self.reported == self.epoch
