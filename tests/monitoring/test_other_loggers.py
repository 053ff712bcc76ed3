"""What W&B stores of a run without a network, and the names that MLflow's file store accepts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_bigopt import Cosine, LearningRateScheduler, OptimizationMonitor
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import Probe, fit, loader

ROOT = Path(__file__).parents[2]

# ---------------------------------------------------------------------------------------- W&B

PROGRAM = """
from lightning.pytorch.loggers import CSVLogger, WandbLogger
import wandb
from tests.monitoring.test_event_folder import train

wandb_logger = WandbLogger(project="mine", save_dir=".", offline=True, id="run1")
loggers = [CSVLogger("csv"), wandb_logger]
train(loggers, monitor={"report": "report.html", "event_folder": "events"})
with open("report.html", encoding="utf-8") as page:
    wandb_logger.experiment.log({"report": wandb.Html(page)})
wandb.finish()
"""


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yields the records of a .wandb file: a header of 7 bytes, then the log format of LevelDB."""
    data, at, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block has no room for a header
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a WandbLogger and a CSVLogger, in a process of its own."""
    folder = tmp_path_factory.mktemp("wandb")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONFIG_DIR": str(folder),
        "WANDB_CACHE_DIR": str(folder),
        "WANDB_DATA_DIR": str(folder),
    }
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def stored(offline_run: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """The logged rows of the run, and the names of its hyperparameters."""
    messages = pytest.importorskip("wandb.proto.v6.wandb_internal_pb2")
    (path,) = offline_run.glob("wandb/offline-run-*-run1/*.wandb")
    records = [messages.Record.FromString(data) for data in wandb_records(path)]
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row}
        for record in records
        if (row := record.history.item)
    ]
    return rows, {update.key for record in records for update in record.config.update}


@pytest.mark.slow
def test_wandb_stores_every_value_at_its_step(stored: Any, offline_run: Path) -> None:
    rows, hyperparameters = stored
    (folder,) = offline_run.glob("csv/*/version_0")
    curves = read_run(folder).curves
    assert {"optim/lr", "clip/coefficient", "guard/rejected/NonFinite", "val_loss"} <= curves.keys()
    for tag, curve in curves.items():
        logged = [(row["trainer/global_step"], float(row[tag])) for row in rows if tag in row]
        assert repr(logged) == repr(curve), tag
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    assert "width" in hyperparameters


@pytest.mark.slow
def test_wandb_stores_scalars_only_and_the_report_that_the_user_logs(
    stored: Any, offline_run: Path
) -> None:
    rows, _ = stored
    logged = {tag for row in rows for tag in row}
    assert not [tag for tag in logged if tag.startswith(("plan", "histograms"))]
    assert "guard/rejected" not in logged
    (page,) = offline_run.glob("wandb/offline-run-*/files/media/html/report*.html")
    assert "Why updates were rejected" in page.read_text()
    assert {"plan/lr", "plan/global_size"} <= read_run(offline_run / "events").curves.keys()


# ------------------------------------------------------------------------------------- MLflow


class Files(MLFlowLogger):
    """Stores metrics in the layout of MLflow's file store, without MLflow.

    A file for each metric, named as the metric, with a line ``timestamp value step`` for each value
    (https://mlflow.org/docs/latest/self-hosting/architecture/backend-store).
    """

    def __init__(self, uri: str, folder: Path) -> None:
        Logger.__init__(self)
        self.uri, self.folder = uri, folder
        self.names: set[str] = set()

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(tracking_uri=self.uri)

    @property
    def name(self) -> str:
        return "0"

    @property
    def version(self) -> str:
        return "run"

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.names |= metrics.keys()
        for name, value in metrics.items():
            assert name.isascii()
            path = self.folder / "metrics" / name
            if self.uri.startswith("file:"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(f"0 {value} {step}\n")

    def finalize(self, status: str) -> None:
        pass


class Unfreezes(BaseFinetuning):
    """Adds a parameter group after an epoch: then the tags contain the names of the groups."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


class Frozen(Probe):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass  # the gradient that Probe expects is that of all parameters

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def train(logger: Any) -> L.Trainer:
    return fit(
        Frozen(),
        loader(16, 8),
        Unfreezes(),
        LearningRateScheduler(Cosine()),
        OptimizationMonitor(every=1, layers={"größe": "*"}),
        max_epochs=2,
        logger=logger,
        log_every_n_steps=1,
    )


def test_file_store_of_mlflow_gets_no_name_inside_another(tmp_path: Path) -> None:
    train(Files("file:./mlruns", tmp_path))
    folder = tmp_path / "metrics"
    stored = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"optim/lr", "optim/lr.group0", "optim/lr.group1", "grad_norm/total"} <= stored
    assert "layers/grad_norm.gruf6udfe" in stored  # only ASCII: the layer is called größe
    lines = (folder / "optim/lr").read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["0", "1"]


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "http://localhost:5000", "databricks"])
def test_other_stores_of_mlflow_get_the_usual_names(uri: str, tmp_path: Path) -> None:
    logger = Files(uri, tmp_path)
    train(logger)
    assert {"optim/lr", "optim/lr/group0", "optim/lr/group1"} <= logger.names
