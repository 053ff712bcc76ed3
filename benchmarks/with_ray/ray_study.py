"""The search space of a study on Ray Tune, two trials at a time.

``to_ray`` converts a space. A trial is a ``study`` of one trial whose values Ray Tune has chosen:
the same paths reach the same fields.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from ray import tune
from ray.tune.integration.pytorch_lightning import TuneReportCheckpointCallback

from lightning_bigopt.tuning import Choice, Integer, Log, Uniform, study
from lightning_bigopt.tuning.space import Range
from tests.tuning.study_helpers import Network, make_data, make_trainer

SPACE: dict[str, Range] = {
    "lr": Log(1e-3, 0.3),
    "schedule.decay": Choice(["10%", "40%"]),
    "clip.max_norm": Uniform(0.2, 2.0),
    "width": Integer(4, 12),
}


def to_ray(space: Mapping[str, Range]) -> dict[str, Any]:
    """Converts a space of ``study`` into ``param_space`` of Ray Tune."""
    found: dict[str, Any] = {}
    for path, values in space.items():
        match values:
            case Log(low, high):
                found[path] = tune.loguniform(low, high)
            case Uniform(low, high):
                found[path] = tune.uniform(low, high)
            case Integer(low, high, True):
                found[path] = tune.lograndint(low, high + 1)
            case Integer(low, high, False):
                found[path] = tune.randint(low, high + 1)  # without the upper end
            case Choice(options):
                found[path] = tune.choice(list(options))
    return found


def reporting_trainer() -> Trainer:
    """Returns the Trainer of a trial, which reports every validation to Ray Tune."""
    return make_trainer(TuneReportCheckpointCallback({"loss": "val_loss"}, save_checkpoints=False))


def loss_of(values: Mapping[str, Any], *, trainer: Any = make_trainer) -> float:
    """Trains with given values of the fields; returns the last loss of the validation."""
    fixed: dict[str, Range] = {path: Choice([value]) for path, value in values.items()}
    found = study(trainer, Network, make_data=make_data, space=fixed, trials=1, pruner=None)
    assert found.best_loss is not None
    return found.best_loss


def trial(config: dict[str, Any]) -> None:
    """Trains a trial of Tune."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    values = {path: config[path] for path in SPACE}
    record = {"values": values, "loss": repr(loss_of(values, trainer=reporting_trainer))}
    name = tune.get_context().get_trial_id()
    Path(config["folder"], f"{name}.json").write_text(json.dumps(record))


def search(folder: Path, *, samples: int = 4) -> tune.ResultGrid:
    """Runs a search with two trials at a time."""
    folder.mkdir(parents=True)
    return tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={"folder": str(folder), **to_ray(SPACE)},
        tune_config=tune.TuneConfig(
            metric="loss", mode="min", num_samples=samples, max_concurrent_trials=2
        ),
        run_config=tune.RunConfig(name="study", storage_path=str(folder / "storage"), verbose=0),
    ).fit()


def study_on_ray(folder: Path) -> list[str]:
    """Compares every trial on Ray with the same values trained without Ray, to the bit.

    Returns:
        The differences.
    """
    results = search(folder)
    found = [f"a trial failed: {result.error}" for result in results if result.error]
    files = sorted(folder.glob("*.json"))
    if len(files) != len(results):
        found.append(f"{len(files)} trials instead of {len(results)}")
    for file in files:
        record = json.loads(file.read_text())
        alone = loss_of(record["values"])
        if repr(alone) != record["loss"]:
            found.append(f"{record['loss']} instead of {alone!r} in {file.name}")
    return found
