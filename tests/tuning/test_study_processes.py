"""Studies of several processes on one storage, and of a process that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from lightning_bigopt.tuning import Log, study
from tests.tuning.study_helpers import Network, make_data, make_trainer, plain_run

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT = """
import sys
import time

import lightning as L

from lightning_bigopt.tuning import Log, study
from tests.tuning.study_helpers import Network, make_data, make_trainer


class Waits(L.Callback):
    # Waits in the second trial until it is killed.

    def on_train_batch_start(self, trainer, *arguments):
        if sys.argv[2] == "wait" and started == 2 and trainer.global_step == 12:
            print("ready", flush=True)
            time.sleep(600)


started = -1  # the first Trainer is made to look up the fields, and not used


def trainer():
    global started
    started += 1
    return make_trainer(Waits())


found = study(
    trainer,
    Network,
    make_data=make_data,
    space={"lr": Log(1e-3, 0.3)},
    trials=int(sys.argv[3]),
    storage=sys.argv[1],
    pruner=None,
)
print(len([t for t in found.trials if t.state == "complete"]))
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(folder / "script.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stored(path: Path) -> list[Any]:
    storage: Any = f"sqlite:///{path}"
    return optuna.load_study(study_name="study", storage=storage).trials


def test_killed_study_goes_on_with_the_values_of_the_killed_trial(tmp_path: Path):
    path = tmp_path / "study.db"
    process = start(tmp_path, str(path), "wait", "3")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = stored(path)
    assert [trial.state.name for trial in killed] == ["COMPLETE", "RUNNING"]
    found = study(
        make_trainer,
        Network,
        make_data=make_data,
        space={"lr": Log(1e-3, 0.3)},
        trials=3,
        storage=path,
        pruner=None,
    )
    states = [trial.state.name for trial in stored(path)]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert [trial.number for trial in found.trials] == [0, 2, 3]
    assert found.trials[1].values == killed[1].params
    rates = [trial.values["lr"] for trial in found.trials]
    assert [trial.loss for trial in found.trials] == [plain_run(lr) for lr in rates]
    assert len(set(rates)) == 3


def test_two_processes_share_one_study(tmp_path: Path):
    path = tmp_path / "study.db"
    both = [start(tmp_path, str(path), "run", "24") for _ in range(2)]
    ends = [process.communicate(timeout=250) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    trials = stored(path)
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert len(trials) == len(complete)
    # Two processes may ask for the last trial at the same time.
    assert len(complete) in (24, 25)
    assert len({trial.params["lr"] for trial in complete}) == len(complete)
    assert {trial.user_attrs["pid"] for trial in complete} == {process.pid for process in both}
    first = min(complete, key=lambda trial: trial.number)
    assert first.value == plain_run(first.params["lr"])
