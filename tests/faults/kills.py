"""Kills training processes at random moments, resumes them, and compares the run to the bit.

The processes are forked from one that has imported everything, so that a run takes a second.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from notebooks.run import free_port
from tests.faults.killed_training import LOADERS, PRECISIONS, Case, train
from tests.faults.run_differences import differences

ROOT = Path(__file__).parents[2]
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
# How a single process is killed; the last one also leaves half of the newest checkpoint.
WAYS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGKILL, truncated checkpoint")
# The same for two processes, with the ranks that get the signal.
WAYS_OF_TWO = (
    ("SIGKILL", (0,)),
    ("SIGKILL", (1,)),
    ("SIGKILL", (0, 1)),
    ("SIGTERM", (0, 1)),
    ("SIGKILL, truncated checkpoint", (1,)),
    ("SIGINT", (0, 1)),
)
INTRODUCTION = """\
A process that trains is killed at random moments, resumed from its newest readable checkpoint, and
killed again, until it finishes. The whole run is compared with the uninterrupted one, to the bit:

- weights, buffers, the states of optimizer, GradScaler and callbacks, and the random state at the
  end (the network has dropout, and the test's module saves the random state);
- samples, learning rate, norm, clip coefficient and rejection of every update, also where it was
  trained again after a resume;
- the points of every tag, as TensorBoard reads them.

Checkpoints are written by `ModelCheckpoint(every_n_train_steps=3)`, after SIGTERM, and after every
fifth micro-batch, most of these inside an accumulation window of 2 to 7 micro-batches. The batch
grows in half of the runs. Three updates have gradients of 1e4 times the usual size, one is NaN in
the runs with StepGuard, and the GradScaler overflows. A loader that saves its own position loses a
window (see [limits](../limits.md)); therefore these runs resume from the newest checkpoint between
windows.
"""

OVERDUE = """\
A SIGINT between two instructions of TensorBoard's queue leaves its writer thread asleep. The
process ends when that thread wakes up, after two minutes at most. Two processes that get SIGTERM
may wait for each other without end, because Lightning's handler of the signal starts a collective
operation. A launcher kills such processes after a while.
"""

# Seconds until a launcher would kill the processes that are left.
PATIENCE = 10.0


@dataclass
class Result:
    """What happened to a run that was killed.

    Args:
        case: The configuration.
        kills: Number of kills inside training, by way.
        starts: Number of times that a process group was started.
        from_scratch: Starts after a kill without a readable checkpoint.
        inside_windows: Resumes from a checkpoint inside an accumulation window.
        unreadable: Checkpoints that were skipped because they could not be read.
        overdue: Kills after which a process did not end within PATIENCE seconds, by way.
        waits: Seconds from each kill to the end of all processes.
        differences: Differences from the uninterrupted run, as text.
    """

    case: Case
    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    from_scratch: int = 0
    inside_windows: int = 0
    unreadable: int = 0
    overdue: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def forks() -> Any:
    """Returns the context whose processes are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.killed_training"])
    return context


# -------------------------------------------------------------------------- starting and killing


def start(folder: Path, case: Case, *, run: int, ckpt: Path | None) -> list[Any]:
    """Starts the processes of one part of a run."""
    port = free_port() if case.processes > 1 else 0
    name = None if ckpt is None else str(ckpt)
    processes = []
    for rank in range(case.processes):
        options = {"run": run, "ckpt": name, "rank": rank, "port": port}
        processes.append(forks().Process(target=train, args=(str(folder), case), kwargs=options))
        processes[-1].start()
    return processes


def wait_for(processes: list[Any], seconds: float) -> bool:
    """Waits until all processes have ended, and kills those that have not after some time."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(timeout=max(0.0, end - time.monotonic()))
    ended = all(process.exitcode is not None for process in processes)
    for process in processes:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.2)
            process.kill()
            process.join()
    return ended


def has_ended(folder: Path, case: Case, run: int) -> bool:
    """Returns whether training has ended on any process of a part."""
    return any((folder / f"run-{run}-{rank}.ended").exists() for rank in range(case.processes))


def uninterrupted(folder: Path, case: Case) -> float:
    """Trains without a kill; returns the seconds between the first batch and the last.

    Raises:
        RuntimeError: If a process ends with an error.
    """
    folder.mkdir(parents=True)
    processes = start(folder, case, run=0, ckpt=None)
    wait_for(processes, 300.0)
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{case} has failed:\n{output_of(folder, 0)}")
    order_events(folder, 0)
    first, last = ((folder / f"run-0-0.{n}").stat().st_mtime for n in ("started", "ended"))
    return last - first


def output_of(folder: Path, run: int) -> str:
    """Returns the last lines that the processes of a part have printed."""
    return "\n".join(p.read_text()[-2500:] for p in sorted(folder.glob(f"output-{run}-*.txt")))


def killed(
    folder: Path, case: Case, *, kills: int, duration: float, draw: random.Random, way: int = 0
) -> Result:
    """Trains to the end with kills at random moments.

    Args:
        folder: A new folder.
        case: The configuration.
        kills: Number of kills, fewer if the run ends earlier.
        duration: Seconds of the uninterrupted training.
        draw: Draws the moments.
        way: Index of the way of the first kill; the others follow in order.
    """
    folder.mkdir(parents=True)
    result, ckpt = Result(case), None
    for run in itertools.count():
        processes = start(folder, case, run=run, ckpt=ckpt)
        result.starts += 1
        has_landed = False
        if sum(result.kills.values()) < kills and wait_for_start(folder, case, run, processes):
            time.sleep(draw.uniform(0.0, 1.5 * duration / kills))
            name, ranks = way_of(case, way + sum(result.kills.values()))
            has_landed = kill(folder, run, processes, result, name=name, ranks=ranks)
            if has_landed and "truncated" in name:
                truncate(folder, draw)
        is_finished = wait_for(processes, 300.0) and not any(p.exitcode for p in processes)
        order_events(folder, run)
        if is_finished and not has_landed:
            return result
        if not has_landed and not has_ended(folder, case, run):
            result.differences.append(f"fails after a resume: {output_of(folder, run)}")
            return result
        ckpt = checkpoint_of(folder, result)
    raise AssertionError  # the loop is endless


def kill(
    folder: Path, run: int, processes: list[Any], result: Result, *, name: str, ranks: Sequence[int]
) -> bool:
    """Sends a signal and waits for the end; returns whether it came before training ended."""
    if has_ended(folder, result.case, run) or not all(p.is_alive() for p in processes):
        return False
    for rank in ranks:
        os.kill(processes[rank].pid, SIGNALS[name.partition(",")[0]])
    began = time.monotonic()
    is_in_time = wait_for(processes, PATIENCE)
    if has_ended(folder, result.case, run):
        return False
    text = name
    if len(processes) > 1:
        text += " to both processes" if len(ranks) > 1 else f" to process {ranks[0]}"
    result.kills[text] += 1
    if is_in_time:
        result.waits.append(time.monotonic() - began)
    else:
        result.overdue[text] += 1
    return True


def way_of(case: Case, index: int) -> tuple[str, tuple[int, ...]]:
    """Returns the name of a way to kill, and the ranks that get the signal."""
    if case.processes == 1:
        return WAYS[index % len(WAYS)], (0,)
    return WAYS_OF_TWO[index % len(WAYS_OF_TWO)]


def wait_for_start(folder: Path, case: Case, run: int, processes: list[Any]) -> bool:
    """Waits for the first batch on all processes; returns whether it has started on all."""
    while not all(
        (folder / f"run-{run}-{rank}.started").exists() for rank in range(len(processes))
    ):
        if not all(process.is_alive() for process in processes):
            return False
        time.sleep(0.002)
    return True


def truncate(folder: Path, draw: random.Random) -> None:
    """Leaves a part of the newest checkpoint, as a disk that lost the rest does."""
    found = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    if found:
        content = found[-1].read_bytes()
        found[-1].write_bytes(content[: draw.randrange(len(content))])


def checkpoint_of(folder: Path, result: Result) -> Path | None:
    """Returns the newest checkpoint to resume from, and deletes newer files.

    Files that cannot be read are skipped. So are those inside an accumulation window for a
    loader with a position of its own, because the gradients of that window are lost
    (docs/limits.md). Lightning's ModelCheckpoint writes such a file after a resume: that of the
    same update again, after the first micro-batch.
    """
    found = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    for path in reversed(found):
        try:
            is_inside = torch.load(path, weights_only=True)["inside_window"]
        except (RuntimeError, EOFError, OSError, ValueError, UnpicklingError):
            result.unreadable += 1
        else:
            if result.case.repeats_windows or not is_inside:
                result.inside_windows += is_inside
                return path
        path.unlink()
    result.from_scratch += 1
    return None


def order_events(folder: Path, run: int) -> None:
    """Names the event files so that readers read them in the order of the parts.

    Their names contain the time in seconds and the process id, which do not order the parts of a
    run if several start within a second.
    """
    for path in (folder / "log").glob("events.out.tfevents.*"):
        if not path.name.endswith(".part"):
            path.rename(path.with_name(f"events.out.tfevents.{run:010d}.{path.name[21:]}.part"))


# ------------------------------------------------------------------------------------------ report


def cells() -> Iterator[Case]:
    """Yields all combinations of loader, precision, normalization and guard."""
    product = itertools.product(LOADERS, PRECISIONS, ("BatchNorm", "LayerNorm"), (True, False))
    for index, (loader, precision, norm, guard) in enumerate(product):
        # Neither ramp nor rule nor logging changes in step with one of the four.
        yield Case(loader, precision, norm, guard, index + index // 2 + index // 4)


def cells_of_two() -> Iterator[Case]:
    """Yields some combinations for two processes."""
    yield Case("exact", "32-true", "BatchNorm", guard=True, number=0, processes=2)
    yield Case("exact", "bf16-mixed", "LayerNorm", guard=False, number=3, processes=2)
    yield Case("exact, 2 workers", "16-mixed", "BatchNorm", guard=False, number=4, processes=2)
    yield Case("exact", "16-mixed", "BatchNorm", guard=True, number=7, processes=2)
    yield Case("exact", "bf16-mixed", "BatchNorm", guard=True, number=8, processes=2)


def killed_and_compared(case: Case, folder: Path, *, kills: int, seed: int, way: int = 0) -> Result:
    """Trains without and with kills, and compares."""
    duration = uninterrupted(folder / "straight", case)
    draw = random.Random(seed)
    result = killed(folder / "killed", case, kills=kills, duration=duration, draw=draw, way=way)
    if not result.differences:
        result.differences = differences(folder / "straight", folder / "killed", case)
    return result


def forked_and_fresh(case: Case, folder: Path) -> list[str]:
    """Compares a forked process with one that has imported everything itself."""
    uninterrupted(folder / "forked", case)
    fresh = folder / "fresh"
    fresh.mkdir()
    code = (
        f"from tests.faults.killed_training import Case, train; train({str(fresh)!r}, {case!r}, "
        "run=0, ckpt=None)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)
    order_events(fresh, 0)
    return differences(folder / "forked", fresh, case)


def measure(*, kills: int = 5, kills_of_two: int = 6) -> str:
    """Runs all combinations, and returns the results as Markdown.

    Args:
        kills: Kills of each run of a single process.
        kills_of_two: Kills of each run of two processes.
    """
    began, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        runs = [(case, kills) for case in cells()]
        runs += [(case, kills_of_two) for case in cells_of_two()]
        for seed, (case, number) in enumerate(runs):
            folder = Path(name) / str(seed)
            folder.mkdir()
            results.append(killed_and_compared(case, folder, kills=number, seed=seed, way=seed))
            shutil.rmtree(folder)
        forked = forked_and_fresh(runs[0][0], Path(name))
    return report(results, forked, seconds=time.monotonic() - began)


def report(results: list[Result], forked: list[str], *, seconds: float) -> str:
    """Formats the results as Markdown."""
    alone = [result for result in results if result.case.processes == 1]
    pairs = [result for result in results if result.case.processes == 2]
    lines = [
        INTRODUCTION,
        table(alone),
        "",
        totals("One process", alone),
        "",
        totals("Two processes (DDP, gloo)", pairs),
        "",
        *([OVERDUE] if any(result.overdue for result in results) else []),
        *failures(results),
        "Forked processes "
        + ("train exactly like a new process." if not forked else f"differ: {forked[:3]}"),
        "",
        f"It took {seconds / 60:.0f} minutes on {os.cpu_count()} CPU cores.",
    ]
    return "\n".join(lines)


def table(results: list[Result]) -> str:
    """Formats the kills of each combination, marked where a run differs."""
    lines = [
        "Kills of each combination; a run that differs is marked with ✗:",
        "",
        "| loader | precision | BatchNorm, guard | BatchNorm | LayerNorm, guard | LayerNorm |",
        "|---|---|---|---|---|---|",
    ]
    names = {
        "stateful": "saves its position",
        "exact": "GlobalBatchLoader",
        "exact, 2 workers": "GlobalBatchLoader, 2 workers",
    }
    for index in range(0, len(results), 4):
        four = results[index : index + 4]
        case = four[0].case
        counts = [f"{sum(r.kills.values())}{' ✗' if r.differences else ''}" for r in four]
        lines.append(f"| {names[case.loader]} | {case.precision} | {' | '.join(counts)} |")
    return "\n".join(lines)


def totals(title: str, results: list[Result]) -> str:
    """Formats the sums over several runs."""
    kills, overdue, waits = Counter[str](), Counter[str](), [0.0]
    for result in results:
        kills += result.kills
        overdue += result.overdue
        waits += result.waits
    wrong = sum(bool(result.differences) for result in results)
    by_way = ", ".join(f"{way}: {count}" for way, count in sorted(kills.items()))
    text = (
        f"{title}: **{sum(kills.values())} kills inside training** in {len(results)} runs "
        f"({by_way}); **{wrong} runs differ**. "
        f"{sum(r.inside_windows for r in results)} resumes from a checkpoint inside a window, "
        f"{sum(r.unreadable for r in results)} unreadable checkpoints skipped, "
        f"{sum(r.from_scratch for r in results)} starts without a checkpoint. All processes had "
        f"ended {statistics.median(waits):.2f} s (median) and {max(waits):.1f} s (longest) after "
        "the signal"
    )
    if overdue:
        late = ", ".join(f"{way}: {count}" for way, count in sorted(overdue.items()))
        text += f", except {sum(overdue.values())} that were killed after {PATIENCE:.0f} s ({late})"
    return text + "."


def failures(results: list[Result]) -> list[str]:
    """Lists the first differences of each run that differs."""
    found = [result for result in results if result.differences]
    lines = [
        f"- {result.case}: {len(result.differences)} differences, such as "
        + "; ".join(f"`{text[:120]}`" for text in result.differences[:3])
        for result in found
    ]
    return ["Runs that differ:", "", *lines, ""] if found else []
