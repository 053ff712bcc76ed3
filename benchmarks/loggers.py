"""Prints what each logger stores of a run, read from its files, without a network.

    python benchmarks/loggers.py                # all loggers whose packages are installed
    python benchmarks/loggers.py wandb comet    # some of them

Each logger gets a run of 20 updates with schedule, clipping, guard (which rejects update 7) and
histograms, in a process of its own. A second run fails at update 15 and is resumed from its
checkpoint of update 10, as the documentation of the logger describes it. The files of every other
logger are searched for what TensorBoard stores. mlflow and comet_ml are not dependencies of the
tests: ``pip install mlflow comet_ml`` beside this package.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NAMES = {
    "tensorboard": "tensorboard",
    "csv": "lightning",
    "wandb": "wandb",
    "mlflow_files": "mlflow",
    "mlflow_database": "mlflow",
    "comet": "comet_ml",
    "event_folder": "tensorboard",
}
OFFLINE = {
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "COMET_START_ONLINE": "0",
    "MLFLOW_ALLOW_FILE_STORE": "true",
}
PLANNED = "plan/"
TIMES = ("throughput/", "time/")
Stored = dict[str, Any]

# ----------------------------------------------------------------------------------- training


def make_logger(name: str, *, run: str) -> Any:
    """Returns the logger of a run, whose second part continues with the same name."""
    from lightning.pytorch import loggers

    if name == "tensorboard":
        return loggers.TensorBoardLogger(".", name=run, version="", default_hp_metric=False)
    if name == "csv":
        return loggers.CSVLogger(".", name=run)
    if name == "wandb":
        return loggers.WandbLogger(project="p", id=run, save_dir=".", offline=True)
    if name.startswith("mlflow"):
        uri = "file:./mlruns" if name == "mlflow_files" else "sqlite:///mlflow.db"
        known = Path(f"{run}.id")
        run_id = known.read_text() if known.exists() else None
        logger = loggers.MLFlowLogger(
            "e", tracking_uri=uri, run_id=run_id, artifact_location="file:./artifacts"
        )
        known.write_text(str(logger.run_id))
        return logger
    if name == "comet":
        return loggers.CometLogger(experiment_key=f"{run:0<32}", offline_directory=".")
    return False  # event_folder, without a logger


def train(name: str, run: str, *, fails_at: int | None = None, ckpt: str | None = None) -> None:
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_bigopt as bigopt

    class Small(L.LightningModule):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(4, width)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == fails_at:
                raise ZeroDivisionError
            loss = self.layer(batch[0]).square().mean()
            self.log("train_loss", loss)
            return loss * float("nan") if batch_idx == 7 else loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.layer(batch[0]).square().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(160, 4))
    logger = make_logger(name, run=run)
    trainer = L.Trainer(
        max_steps=20,
        log_every_n_steps=1,
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            bigopt.LearningRateScheduler(bigopt.WarmupCosine(warmup=5)),
            bigopt.GradientClipping(bigopt.NormClip(max_norm=0.1)),
            bigopt.StepGuard([bigopt.NonFinite()]),
            bigopt.OptimizationMonitor(
                # Without TensorBoard the others warn that they store no histograms.
                histograms_every=5 if name in {"tensorboard", "event_folder"} else None,
                event_folder=run if name == "event_folder" else None,
            ),
            ModelCheckpoint(f"saved-{run}", every_n_train_steps=10, save_top_k=-1),
        ],
    )
    loaders = DataLoader(data, batch_size=8), DataLoader(data, batch_size=80)
    trainer.fit(Small(), *loaders, ckpt_path=ckpt)


def train_all(name: str) -> None:
    """Trains the whole run, then the run that fails, and the rest of it."""
    logging.disable(logging.WARNING)
    if name == "comet":
        import comet_ml  # noqa: F401  # asks to be imported before torch
    train(name, "straight")
    close()
    try:
        train(name, "failed", fails_at=15)
    except ZeroDivisionError:
        close()
    (checkpoint,) = Path("saved-failed").glob("*step=10*")
    time.sleep(1 - time.time() % 1)  # the names of files contain the second
    train(name, "failed", ckpt=str(checkpoint))
    close()


def close() -> None:
    """Ends the run of a logger, which W&B and Comet otherwise do at the end of the process."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    if "comet_ml" in sys.modules:
        sys.modules["comet_ml"].end()


# ------------------------------------------------------------------------------------ reading


def read_events(run: str) -> Stored:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run, size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    texts = [tag for tag in tags["tensors"] if tag.endswith("/text_summary")]
    hyperparameters = any(Path(run).glob("hyperparameters/*")) or events.summary_metadata
    return {
        "scalars": {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags["scalars"]},
        "texts": [tag.removesuffix("/text_summary") for tag in texts],
        "histograms": tags["histograms"] + [t for t in tags["tensors"] if "histograms/" in t],
        "dashboard": any("custom_scalars" in tag for tag in tags["tensors"]),
        "hyperparameters": ["width"] if hyperparameters else [],
    }


def read_csv(run: str) -> Stored:
    import csv

    scalars = defaultdict(list)
    for path in sorted(Path().glob(f"{run}/version_*/metrics.csv")):
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for tag, value in row.items():
                    if value and tag != "step":
                        scalars[tag].append((int(row["step"]), float(value)))
    settings = [path.read_text() for path in Path().glob(f"{run}/version_*/hparams.yaml")]
    return {
        "scalars": dict(scalars),
        "hyperparameters": ["width"] if settings and "width" in settings[0] else [],
    }


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yields the records of a .wandb file: a header of 7 bytes, then the log format of LevelDB."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block has no room for a header
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in {1, 4}:  # a whole record, or its last part
            yield record
            record = b""


def read_wandb(run: str) -> Stored:
    from wandb.proto.v6.wandb_internal_pb2 import Record

    scalars, hyperparameters, steps = defaultdict(list), [], []
    for path in sorted(Path("wandb").glob(f"offline-run-*-{run}/*.wandb")):
        for data in wandb_records(path):
            record = Record.FromString(data)
            hyperparameters += [update.key for update in record.config.update]
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            steps += [row["_step"]] if "_step" in row else []
            for tag, value in row.items():
                if tag[0] != "_" and not tag.startswith("trainer/"):
                    scalars[tag].append((row["trainer/global_step"], float(value)))
    return {"scalars": dict(scalars), "hyperparameters": hyperparameters, "calls": steps}


def read_mlflow(uri: str) -> Callable[[str], Stored]:
    def read(run: str) -> Stored:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(uri)
        run_id = Path(f"{run}.id").read_text()
        data = client.get_run(run_id).data
        # In the file store the second slash of a name is a point.
        return {
            "scalars": {
                tag: [(m.step, m.value) for m in client.get_metric_history(run_id, tag)]
                for tag in data.metrics
            },
            "hyperparameters": list(data.params),
        }

    return read


def read_comet(run: str) -> Stored:
    scalars, hyperparameters = defaultdict(list), []
    for path in sorted(Path().glob(f"{run}*.zip"), key=lambda p: p.stat().st_mtime):
        with zipfile.ZipFile(path) as archive:
            lines = archive.read("messages.json").decode().splitlines()
        for message in map(json.loads, lines):
            payload = message["payload"]
            if message["type"] == "metric_msg":
                metric = payload["metric"]
                if not metric["metricName"].startswith("sys."):
                    value = float(metric["metricValue"])
                    scalars[metric["metricName"]].append((metric["step"], value))
            elif message["type"] == "parameter_msg" and payload.get("param"):
                hyperparameters.append(payload["param"]["paramName"])
    return {"scalars": dict(scalars), "hyperparameters": hyperparameters}


READERS: dict[str, Callable[[str], Stored]] = {
    "tensorboard": read_events,
    "csv": read_csv,
    "wandb": read_wandb,
    "mlflow_files": read_mlflow("file:./mlruns"),
    "mlflow_database": read_mlflow("sqlite:///mlflow.db"),
    "comet": read_comet,
    "event_folder": read_events,
}

# -------------------------------------------------------------------------------------- table


def row_of(name: str, expected: dict[str, Any]) -> dict[str, str]:
    whole, resumed = READERS[name]("straight"), READERS[name]("failed")
    scalars = {tag.replace("/", "."): curve for tag, curve in whole["scalars"].items()}
    ours = [t for t in expected["scalars"] if "/" in t and not t.startswith(PLANNED)]
    module = ("train_loss", "val_loss")
    equal = [
        tag
        for tag in (*ours, *module)
        if repr(_in_float32(scalars.get(tag.replace("/", "."), ())))
        == repr(_in_float32(expected["scalars"][tag]))
        or (tag.startswith(TIMES) and tag.replace("/", ".") in scalars)
    ]
    (repeats,) = {
        Counter(step for step, _ in curve)[12]
        for tag, curve in resumed["scalars"].items()
        if tag in {"optim/lr", "optim.lr"}
    }
    texts = whole.get("texts", ())
    return {
        "values of the callbacks": f"{sum(tag in equal for tag in ours)} of {len(ours)}",
        "values of the module": f"{sum(tag in equal for tag in module)} of 2",
        "hyperparameters of the module": _yes("width" in whole["hyperparameters"]),
        "planned curves": _yes(any(tag.startswith("plan.") for tag in scalars)),
        "plan as text": _yes("plan" in texts),
        "reason of the rejected update": _yes("guard/rejected" in texts),
        "histograms": _yes(whole.get("histograms")),
        "dashboard": _yes(whole.get("dashboard")),
        "points at update 12 after the resume": str(repeats),
    }


def _in_float32(curve: Any) -> list[tuple[int, float]]:
    """Returns the points with the precision in which TensorBoard stores them."""
    return [(int(step), *struct.unpack("f", struct.pack("f", value))) for step, value in curve]


def _yes(found: object) -> str:
    return "yes" if found else "no"


def run_in_process(name: str) -> None:
    subprocess.run(  # noqa: S603
        [sys.executable, str(Path(__file__)), "--train", name],
        check=True,
        env=os.environ | OFFLINE,
        stdout=subprocess.DEVNULL,
        stderr=None if os.environ.get("SHOW") else subprocess.DEVNULL,
    )


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    os.environ.update(OFFLINE)
    rows: dict[str, dict[str, str]] = {}
    versions: dict[str, str] = {}
    expected: Stored = {}
    for name in ["tensorboard", *(n for n in names if n != "tensorboard")]:
        try:
            versions[name] = f"{NAMES[name]} {version(NAMES[name])}"
        except PackageNotFoundError:
            print(f"{name}: {NAMES[name]} is not installed", file=sys.stderr)
            continue
        before = Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            run_in_process(name)
            expected = expected or read_events("straight")
            rows[name] = row_of(name, expected)
            os.chdir(before)
    print("| | " + " | ".join(rows) + " |")
    print("|---|" + "---|" * len(rows))
    print("| version | " + " | ".join(versions[name] for name in rows) + " |")
    for title in rows["tensorboard"]:
        print(f"| {title} | " + " | ".join(row[title] for row in rows.values()) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train_all(sys.argv[2])
    else:
        main(sys.argv[1:] or list(NAMES))
