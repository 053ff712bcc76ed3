"""The folder of comparisons: the storage of their searches, and one record per training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import lightning
import torch

from lightning_bigopt.checks import shown
from lightning_bigopt.reporting.compared_side import SeedRun
from lightning_bigopt.trainer_access.output_paths import folder_problem
from lightning_bigopt.version import __version__

__all__ = ["ComparisonFolder", "fingerprint"]


def fingerprint(*parts: Any) -> str:
    """Returns a hash of what is trained, and of the versions that train it.

    Args:
        parts: What is trained: the config, values, the monitored value.

    Returns:
        16 hexadecimal digits.

    Example:
        >>> fingerprint("lr: 0.1") == fingerprint("lr: 0.1"), len(fingerprint("lr: 0.1"))
        (True, 16)
        >>> fingerprint("lr: 0.1") == fingerprint("lr: 0.2")
        False
    """
    versions = (__version__, torch.__version__, lightning.__version__)
    return sha256(repr((*parts, *versions)).encode()).hexdigest()[:16]


class ComparisonFolder:
    """Keeps searches and finished trainings of comparisons; process 0 makes, reads and writes it.

    The name of a record contains the fingerprint of what was trained, so that trainings of another
    config are never taken for those of this one.

    Args:
        folder: The folder, which is made if it does not exist.

    Raises:
        ValueError: If the folder cannot be used.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        if problem := folder_problem(self.folder):
            raise ValueError(
                f"folder must be one that can be written to, got {str(self.folder)!r}, {problem}; "
                "choose another folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def storage(self) -> Path:
        """The storage of the searches."""
        return self.folder / "search.db"

    def read(self, trained: str, seed: int) -> SeedRun | None:
        """Returns a finished training; None if there is none.

        Args:
            trained: Fingerprint of what is trained.
            seed: Seed of the training.

        Raises:
            ValueError: If the record cannot be read.
        """
        path = self._path(trained, seed)
        if not path.exists():
            return None
        found = _content(path).get("run")
        try:
            run = SeedRun(**found) if isinstance(found, dict) else None
        except TypeError:
            run = None
        if run is None or run.seed != seed or not isinstance(run.loss, float | int | None):
            raise _broken(path, f"whose 'run' is {shown(found)}")
        return run

    def write(self, run: SeedRun, *, name: str, values: Mapping[str, Any], trained: str) -> None:
        """Keeps a finished training.

        Args:
            run: The training.
            name: Name of the side, for a reader.
            values: The tuned values, for a reader.
            trained: Fingerprint of what was trained.
        """
        content = {
            "side": name,
            "values": {path: str(value) for path, value in values.items()},
            "run": asdict(run),
        }
        path = self._path(trained, run.seed)
        # At once: a process that is killed leaves the whole file or none.
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
        part.replace(path)

    def count_others(self, name: str, trained: str) -> int:
        """Returns the number of trainings of a side of this name with something else trained."""
        paths = [p for p in self.folder.glob("*-seed-*.json") if not p.name.startswith(trained)]
        return sum(_content(path).get("side") == name for path in paths)

    def _path(self, trained: str, seed: int) -> Path:
        return self.folder / f"{trained}-seed-{seed}.json"


def _content(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(path, f"which is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise _broken(path, f"which contains {shown(found)}")
    return found


def _broken(path: Path, what: str) -> ValueError:
    return ValueError(
        f"folder must contain records of trainings, got {str(path)!r}, {what}; delete this file"
    )
