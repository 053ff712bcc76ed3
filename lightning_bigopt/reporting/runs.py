"""Reads the logged scalars and texts of a run from TensorBoard events or CSV files."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["Curve", "Run", "holds_logs", "read_run"]

Curve: TypeAlias = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The logged scalars and texts of one run.

    Args:
        name: Name of the run in reports.
        curves: For each tag, pairs of step and value; steps are unique and ascend.
        texts: For each tag, the text logged last.
        refusals: The logged reasons for rejected updates, one text for each update.

    Example:
        >>> run = Run(name="a", curves={"loss": [(0, 2.0), (1, 1.0)]})
        >>> run.last("loss"), run.select("lo")
        (1.0, {'loss': [(0, 2.0), (1, 1.0)]})
    """

    name: str
    curves: Mapping[str, Curve]
    texts: Mapping[str, str] = field(default_factory=dict)
    refusals: Sequence[str] = ()

    @property
    def axis(self) -> str:
        """The unit of the steps of known tags: ``"update"``, ``"samples"`` or ``"tokens"``."""
        for unit in ("samples", "tokens"):
            counted = self.curves.get(f"progress/{unit}", [])
            if counted and all(math.isclose(x, y, rel_tol=1e-6) for x, y in counted):
                return unit
        return "update"

    def select(self, *prefixes: str) -> dict[str, Curve]:
        """Returns the curves whose tags begin with one of the prefixes."""
        return {tag: curve for tag, curve in self.curves.items() if tag.startswith(prefixes)}

    def last(self, tag: str) -> float | None:
        """Returns the last value of a curve; None if the tag was not logged."""
        curve = self.curves.get(tag)
        return curve[-1][1] if curve else None


def read_run(folder: str | PathLike[str]) -> Run:
    """Reads the TensorBoard events in a folder, or the ``metrics.csv`` of a CSVLogger.

    If a run was resumed, its values replace those that the interrupted run logged after the
    checkpoint, as in TensorBoard. A file whose last record is incomplete is read up to that record.

    Args:
        folder: The log folder of one run, or a folder above it that holds no other run.

    Returns:
        The run; the prefix of its logger is removed from all tags.

    Raises:
        ValueError: If the path is not a folder, or the folder holds no logs or several runs.
    """
    root = Path(folder)
    if not root.is_dir():
        found = "which is a file" if root.exists() else "which does not exist"
        raise ValueError(
            f"logdir must be a folder, got {str(root)!r}, {found}; pass the logger's folder"
        )
    folders = sorted({path.parent for path in root.rglob("*") if _is_log(path)})
    # TensorBoard's HParams tab needs a separate event file, in a folder beside the run's.
    folders = [path for path in folders if path == root or path.name != "hyperparameters"]
    if not folders:
        raise ValueError(
            f"logdir must contain TensorBoard events or a metrics.csv, got none in {str(root)!r}; "
            "pass the folder of a TensorBoardLogger, of a CSVLogger or of "
            "OptimizationMonitor(event_folder=)"
        )
    if len(folders) > 1 and root not in folders:
        names = ", ".join(str(path.relative_to(root)) for path in folders[:5])
        raise ValueError(
            f"logdir must contain one run, got {len(folders)} in {str(root)!r}; pass one of {names}"
        )
    home = root if root in folders else folders[0]
    events = any(path.name.startswith("events.out.") for path in home.iterdir())
    curves, texts = _from_events(home) if events else (_from_csv(home / "metrics.csv"), {})
    prefix = _prefix_of(curves)
    curves = {tag.removeprefix(prefix): curve for tag, curve in curves.items()}
    curves.pop("epoch", None)  # Lightning logs it as an x axis, not as a result
    texts = {tag.removeprefix(prefix): text for tag, text in texts.items()}
    return Run(
        name=_name(home),
        curves=curves,
        texts={tag: logged[-1] for tag, logged in texts.items()},
        refusals=texts.get("guard/rejected", ()),
    )


def holds_logs(folder: str | Path) -> bool:
    """Returns whether a folder itself, without subfolders, holds logs of a run."""
    return any(_is_log(path) for path in Path(folder).glob("*"))


def _is_log(path: Path) -> bool:
    return path.name == "metrics.csv" or path.name.startswith("events.out.tfevents")


def _name(home: Path) -> str:
    home = home.resolve()  # the folder "." has no name
    return home.name if not home.name.startswith("version_") else f"{home.parent.name}/{home.name}"


def _prefix_of(tags: Iterable[str]) -> str:
    """Returns the prefix that the logger added to every tag."""
    # Any tag that is always logged would do; OptimizationMonitor always logs a total norm.
    found = [match for tag in tags if (match := re.match(r"(.*-)?grad_norm/total", tag))]
    return min((match[1] or "" for match in found), default="")


def _from_events(home: Path) -> tuple[dict[str, Curve], dict[str, list[str]]]:
    from tensorboard.backend.event_processing.event_accumulator import (
        SCALARS,
        TENSORS,
        EventAccumulator,
    )

    class Events(EventAccumulator):  # type: ignore[misc]  # untyped
        """Discards the texts, too, that an earlier start of a run has logged."""

        def _Purge(self, event: Any, by_tags: bool) -> None:  # noqa: FBT001, N802
            super()._Purge(event, by_tags)
            if not by_tags:
                self.tensors.FilterItems(lambda logged: logged.step < event.step)

    events = Events(str(home), size_guidance={SCALARS: 0, TENSORS: 1000})
    events.Reload()
    tags = events.Tags()
    curves = {
        tag: _in_order((event.step, event.value) for event in events.Scalars(tag))
        for tag in tags["scalars"]
    }
    texts = {}
    for tag in tags["tensors"]:
        if tag.endswith("/text_summary"):
            texts[tag.removesuffix("/text_summary")] = [
                b"".join(event.tensor_proto.string_val[:1]).decode()
                for event in events.Tensors(tag)
            ]
    return curves, texts


def _from_csv(path: Path) -> dict[str, Curve]:
    points: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for tag, value in row.items():
                if tag not in (None, "step") and value:
                    points.setdefault(tag, []).append((int(row["step"]), float(value)))
    return {tag: _in_order(curve) for tag, curve in points.items()}


def _in_order(points: Iterable[tuple[int, float]]) -> Curve:
    """Returns points in ascending order of their steps.

    A point whose step is not larger than the previous one, as after a resume, replaces all points
    from its step on.
    """
    curve: Curve = []
    for step, value in points:
        while curve and curve[-1][0] >= step:
            curve.pop()
        curve.append((step, value))
    return curve
