"""Compares a run that was killed with the uninterrupted one, to the bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.faults.killed_training import Case

# Callbacks whose states contain paths and scores of files.
NOT_COMPARED = ("SavesOnPreemption",)
MEASURED_TIMES = ("time/", "throughput/", "memory/")
OF_LIGHTNING = ("loss", "epoch")


def differences(straight: Path, resumed: Path, case: Case) -> list[str]:
    """Compares a killed run with the uninterrupted one; returns what differs, as text."""
    first, second = (
        torch.load(folder / "final.ckpt", weights_only=True) for folder in (straight, resumed)
    )
    parts = ("global_step", "epoch", "state_dict", "optimizer_states", "lr_schedulers")
    found = [
        text
        for part in (*parts, "MixedPrecision", "random_states")
        for text in unequal(part, first.get(part), second.get(part))
    ]
    for key, state in first["callbacks"].items():
        if not key.startswith(NOT_COMPARED):
            states = map(comparable, (state, second["callbacks"].get(key, {})))
            found += unequal(f"callbacks: {key}", *states)
    of_process_0 = torch.load(straight / "final-0.pt", weights_only=True)["module"]
    for rank in range(case.processes):
        first, second = (
            torch.load(folder / f"final-{rank}.pt", weights_only=True)
            for folder in (straight, resumed)
        )
        # A checkpoint contains the buffers of process 0, which DDP copies to the others before a
        # forward pass. A run that resumes after its last batch ends with them.
        if not unequal("", of_process_0, second["module"]):
            first["module"] = of_process_0
        found += unequal(f"rank {rank}", first, second)
        found += unequal_records(*(f / f"records-{rank}.jsonl" for f in (straight, resumed)))
    return found + unequal_logs(straight, resumed)


def comparable(state: Any) -> Any:
    """Leaves out what depends on the parts of a run.

    These are the index of the window's first batch, because Lightning counts repeated batches
    again, and the file that was the newest checkpoint before a rejection.
    """
    if not isinstance(state, dict):
        return state
    return {
        key: value[:1] if key == "window" and value else comparable(value)
        for key, value in state.items()
        if key != "checkpoint"
    }


def unequal(name: str, first: Any, second: Any) -> list[str]:
    """Compares nested values to the bit; returns the names of those that differ."""
    if isinstance(first, Tensor):
        same = isinstance(second, Tensor) and first.shape == second.shape
        same = same and torch.equal(first.view(-1), second.view(-1))
        same = same or (isinstance(second, Tensor) and repr(first) == repr(second))  # NaN
        return [] if same else [f"{name}: {first.tolist()!r:.60} became {second!r:.60}"]
    if isinstance(first, dict) and isinstance(second, dict):
        keys = dict.fromkeys([*first, *second])
        return [t for k in keys for t in unequal(f"{name}[{k!r}]", first.get(k), second.get(k))]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            return [f"{name}: {len(first)} values became {len(second)}"]
        pairs = enumerate(zip(first, second, strict=True))
        return [text for i, (a, b) in pairs for text in unequal(f"{name}[{i}]", a, b)]
    return [] if repr(first) == repr(second) else [f"{name}: {first!r:.60} became {second!r:.60}"]


def unequal_records(straight: Path, resumed: Path) -> list[str]:
    """Compares what every update has used, also that of updates that were trained again."""
    expected = {(r["kind"], r["step"]): r["value"] for r in read_records(straight)}
    found, seen = [], set()
    for record in read_records(resumed):
        key = record["kind"], record["step"]
        seen.add(key)
        if expected.get(key) != record["value"]:
            found.append(
                f"{key[0]} of update {key[1]} in part {record['run']}: {expected.get(key)!r:.60} "
                f"became {record['value']!r:.60}"
            )
    return found + [f"{kind} of update {step} is missing" for kind, step in expected.keys() - seen]


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, path.read_text().splitlines())


def scalars(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Reads the points of every tag from TensorBoard's files as TensorBoard does."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports each purge
    events = EventAccumulator(str(folder / "log"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, repr(e.value)) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def unequal_logs(straight: Path, resumed: Path) -> list[str]:
    """Compares the points of every tag; the values of times differ."""
    first, second = scalars(straight), scalars(resumed)
    # Lightning logs the metrics of the module after the hooks in which checkpoints are saved, so
    # that a kill between them loses those of one update.
    saved = [*(resumed / "checkpoints").glob("*.ckpt"), *resumed.glob("hpc_ckpt_*.ckpt")]
    boundaries = {torch.load(path, weights_only=True)["global_step"] - 1 for path in saved}
    found = []
    for tag in dict.fromkeys([*first, *second]):
        points, others = first.get(tag, []), second.get(tag, [])
        lost = boundaries if tag in OF_LIGHTNING else set()
        steps, other_steps = [step for step, _ in points], [step for step, _ in others]
        gaps = set(steps) - set(other_steps) - lost
        if gaps:
            found.append(f"TensorBoard {tag}: gaps at {sorted(gaps)}"[:150])
        if len(set(other_steps)) < len(other_steps):
            found.append(f"TensorBoard {tag}: several points for a step")
        if set(other_steps) - set(steps):
            found.append(f"TensorBoard {tag}: steps {sorted(set(other_steps) - set(steps))}"[:150])
        wrong = dict(points).items() ^ dict(others).items()
        steps_of_wrong = {s for s, _ in wrong} & set(steps) & set(other_steps)
        if steps_of_wrong and not tag.startswith(MEASURED_TIMES):
            found.append(f"TensorBoard {tag}: values at {sorted(steps_of_wrong)} differ"[:150])
    return found
