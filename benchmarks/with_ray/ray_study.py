"""The search space of a study on Ray Tune, two trials at a time.

``to_ray`` converts a space. A trial builds its training as a trial of ``study`` does: the same
paths reach the same fields.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.integration.pytorch_lightning import TuneReportCheckpointCallback

from lightning_bigopt.tuning import Choice, Integer, Log, Uniform
from lightning_bigopt.tuning.space import Range
from lightning_bigopt.tuning.trainings import MadeTrainings
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


def trainings(*more: Any) -> MadeTrainings:
    """Builds trainings for values of the space."""
    made = MadeTrainings(lambda: make_trainer(*more), Network, make_data, seed=0)
    made.prepare(SPACE)
    return made


def trial(config: dict[str, Any]) -> None:
    """Trains a trial of Tune."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(config["folder"])
    values = {path: config[path] for path in SPACE}
    report = TuneReportCheckpointCallback({"loss": "val_loss"}, save_checkpoints=False)
    training = trainings(report).build(values)
    training.fit()
    loss = repr(float(training.trainer.callback_metrics["val_loss"]))
    name = tune.get_context().get_trial_id()
    (folder / f"{name}.json").write_text(json.dumps({"values": values, "loss": loss}))


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
    """Compares every trial on Ray with the same values as a trial of ``study``, to the bit.

    Returns:
        The differences.
    """
    from lightning_bigopt.tuning import study

    results = search(folder)
    found = [f"a trial failed: {result.error}" for result in results if result.error]
    files = sorted(folder.glob("*.json"))
    if len(files) != len(results):
        found.append(f"{len(files)} trials instead of {len(results)}")
    for file in files:
        record = json.loads(file.read_text())
        fixed: dict[str, Range] = {path: Choice([v]) for path, v in record["values"].items()}
        alone = study(make_trainer, Network, make_data=make_data, space=fixed, trials=1)
        if repr(alone.best_loss) != record["loss"]:
            found.append(f"{record['loss']} instead of {alone.best_loss!r} in {file.name}")
    return found
