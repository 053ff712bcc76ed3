"""Files of trunks: checkpoints, random states and the losses of finished branches."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import Any

from lightning_bigopt.trainer_access.processes import Processes

__all__ = [
    "Progress",
    "checkpoint_path",
    "random_path",
    "read_progress",
    "trunk_folder",
    "write_progress",
]

_PROGRESS = "progress.json"


@contextmanager
def trunk_folder(
    folder: str | PathLike[str] | None, storage: Any, processes: Processes, *, is_needed: bool
) -> Iterator[Path]:
    """Provides the folder for checkpoints of trunks, and removes it if nothing is left in it.

    Args:
        folder: The folder of the user; None for one beside a storage file, or a temporary one.
        storage: The storage of the study.
        processes: The processes of the study.
        is_needed: Whether the trials have trunks.
    """
    if not is_needed:
        yield Path()
        return
    is_file = isinstance(storage, (str, PathLike)) and "://" not in str(storage)
    chosen = None if folder is None else Path(folder)
    if chosen is None and is_file:
        chosen = Path(f"{os.fspath(storage)}.trunks")
    is_temporary = chosen is None
    if chosen is None and processes.is_first:
        chosen = Path(mkdtemp(prefix="trunks"))
    elif processes.is_first:
        _check_writable(chosen)
    place = processes.share(chosen)
    assert place is not None  # process 0 has made it
    try:
        yield place
    finally:
        if processes.is_first and is_temporary:
            shutil.rmtree(place, ignore_errors=True)
        elif processes.is_first and place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _check_writable(place: Path | None) -> None:
    """Raises before the first trial if nothing can be written into a folder."""
    assert place is not None
    try:
        place.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=place):
            return
    except OSError as error:
        raise ValueError(
            f"folder must be a folder that can be written, got {str(place)!r}: {error.strerror}; "
            "pass another folder="
        ) from error


def checkpoint_path(place: Path, update: int) -> Path:
    """Returns the checkpoint of the trunk after an update."""
    return place / f"update={update}.ckpt"


def random_path(place: Path, update: int, processes: Processes) -> Path:
    """Returns the file with the random states of this process after an update of the trunk."""
    return place / f"update={update}-process={processes.rank}.pt"


@dataclass
class Progress:
    """What a trial has finished.

    Args:
        losses: Monitored value of each finished branch by budget.
        updates: Updates that were trained for it.
        conditions: What the trial was trained with: values, budgets, monitor and seed.
    """

    losses: dict[int, float] = field(default_factory=dict)
    updates: int = 0
    conditions: Mapping[str, Any] = field(default_factory=dict)


def read_progress(place: Path, conditions: Mapping[str, Any]) -> Progress:
    """Reads what an interrupted trial has finished; nothing if there is no file.

    A folder of a training under other conditions is removed.

    Args:
        place: Folder of the trial.
        conditions: Values, budgets, monitor and seed of the trial.
    """
    path = place / _PROGRESS
    if path.exists():
        read = json.loads(path.read_text(encoding="utf-8"))
        if read.get("conditions") == conditions:
            losses = {int(budget): loss for budget, loss in read["losses"].items()}
            return Progress(losses=losses, updates=read["updates"], conditions=conditions)
    if place.exists():
        shutil.rmtree(place)
    return Progress(conditions=conditions)


def write_progress(place: Path, progress: Progress) -> None:
    """Writes what a trial has finished."""
    place.mkdir(parents=True, exist_ok=True)
    temporary = place / "progress.tmp"
    temporary.write_text(json.dumps(asdict(progress)), encoding="utf-8")
    temporary.replace(place / _PROGRESS)  # a file with this name is whole
