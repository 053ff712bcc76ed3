"""A run as its log files tell it, whether it ended well or was killed."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TypeAlias

__all__ = ["Curve", "Run", "holds_logs", "read_run"]

Curve: TypeAlias = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The scalars of one run.

    Args:
        name: What to call it.
        curves: By tag, pairs of step and value in ascending order, one for each step.
        texts: By tag, what was logged last as text.
        refusals: Why updates were refused, as far as it was logged.

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
        """What our curves are drawn over: ``"update"``, ``"samples"`` or ``"tokens"``."""
        for unit in ("samples", "tokens"):
            counted = self.curves.get(f"progress/{unit}", [])
            if counted and all(math.isclose(x, y, rel_tol=1e-6) for x, y in counted):
                return unit
        return "update"

    def select(self, *prefixes: str) -> dict[str, Curve]:
        """The curves whose tags begin with one of some prefixes."""
        return {tag: curve for tag, curve in self.curves.items() if tag.startswith(prefixes)}

    def last(self, tag: str) -> float | None:
        """The last value of a curve; None where there is none."""
        curve = self.curves.get(tag)
        return curve[-1][1] if curve else None


def read_run(folder: str | PathLike[str]) -> Run:
    """Reads the TensorBoard events in a folder, or the ``metrics.csv`` of a CSVLogger.

    Where a run was resumed, what its killed predecessor logged beyond the checkpoint gives way, as
    in TensorBoard. A file that ends in mid-record is read up to there.

    Args:
        folder: The logger's folder of one run, or one above that holds a single run.

    Raises:
        ValueError: If it is no folder, if there are no logs in it, or those of several runs.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "a file" if root.exists() else "nothing there"
        raise ValueError(f"logdir must be a folder, got {str(root)!r}, {what}; pass the logger's")
    found = sorted({path.parent for path in root.rglob("*") if _is_log(path)})
    found = [path for path in found if path == root or path.name != "hyperparameters"]
    if not found:
        raise ValueError(
            f"logdir must hold TensorBoard events or a metrics.csv, got none in {str(root)!r}; "
            "pass the folder of the logger"
        )
    if len(found) > 1 and root not in found:
        names = ", ".join(str(path.relative_to(root)) for path in found[:5])
        raise ValueError(
            f"logdir must hold one run, got {len(found)} in {str(root)!r}; pass one of {names}"
        )
    home = root if root in found else found[0]
    events = any(path.name.startswith("events.out.") for path in home.iterdir())
    curves, texts = _from_events(home) if events else (_from_csv(home / "metrics.csv"), {})
    prefix = _prefix_of(curves)
    curves = {tag.removeprefix(prefix): curve for tag, curve in curves.items()}
    curves.pop("epoch", None)  # Lightning's own, which is an axis
    texts = {tag.removeprefix(prefix): text for tag, text in texts.items()}
    return Run(
        name=_name(home),
        curves=curves,
        texts={tag: written[-1] for tag, written in texts.items()},
        refusals=texts.get("guard/rejected", ()),
    )


def holds_logs(folder: str | Path) -> bool:
    """Whether :func:`read_run` would find anything in a folder."""
    return any(_is_log(path) for path in Path(folder).glob("*"))


def _is_log(path: Path) -> bool:
    return path.name == "metrics.csv" or path.name.startswith("events.out.tfevents")


def _name(home: Path) -> str:
    return home.name if not home.name.startswith("version_") else f"{home.parent.name}/{home.name}"


def _prefix_of(tags: Iterable[str]) -> str:
    """What the logger put before every tag; the monitor logs a total norm in any case."""
    found = [match for tag in tags if (match := re.match(r"(.*-)?grad_norm/total", tag))]
    return min((match[1] or "" for match in found), default="")


def _from_events(home: Path) -> tuple[dict[str, Curve], dict[str, list[str]]]:
    from tensorboard.backend.event_processing.event_accumulator import (
        SCALARS,
        TENSORS,
        EventAccumulator,
    )

    events = EventAccumulator(str(home), size_guidance={SCALARS: 0, TENSORS: 1000})
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
    """Points in the order they were logged; one that goes back makes way for what it repeats."""
    curve: Curve = []
    for step, value in points:
        while curve and curve[-1][0] >= step:
            curve.pop()
        curve.append((step, value))
    return curve
