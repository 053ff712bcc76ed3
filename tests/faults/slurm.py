"""Sends SLURM's signal to training processes at random moments, and compares to the bit.

Lightning's handler saves a checkpoint and calls ``scontrol requeue``. A program in its place
records the call; then the processes are killed, as SLURM does, and started again.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.faults.killed_training import Case
from tests.faults.kills import (
    Result,
    failures,
    has_ended,
    order_events,
    output_of,
    start,
    uninterrupted,
    wait_for,
    wait_for_start,
)
from tests.faults.run_differences import differences

SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGTERM")
INTRODUCTION = """\
A process that trains under the variables of SLURM gets the signal of
`SLURMEnvironment(auto_requeue=True, requeue_signal=...)` at random moments. There is no SLURM here:
a program named `scontrol` records the call of `scontrol requeue`. After it the process is killed
within 50 ms, while it trains on, and started again. Lightning resumes from the newest
`hpc_ckpt_N.ckpt` in `default_root_dir`. Two processes (DDP, gloo) get their signals up to 30 ms
apart. The runs validate after every seventh batch, also inside accumulation windows, and those with
a loader that saves its position ("stateful") after every second window. They are compared with an
uninterrupted one as above, to the bit. A value that the module logs with `self.log` may be missing
for the update after which the checkpoint was saved, because Lightning logs it later.
"""


def requeued(
    folder: Path, case: Case, *, signals: int, duration: float, draw: random.Random
) -> Result:
    """Trains to the end with signals at random moments.

    Args:
        folder: A new folder.
        case: The configuration.
        signals: Number of signals, fewer if the run ends earlier.
        duration: Seconds of the uninterrupted training.
        draw: Draws the moments.
    """
    folder.mkdir(parents=True)
    result = Result(case)
    for run in itertools.count():
        processes = start(folder, case, run=run, ckpt=None)
        result.starts += 1
        was_requeued = False
        if sum(result.kills.values()) < signals and wait_for_start(folder, case, run, processes):
            time.sleep(draw.uniform(0.0, 1.5 * duration / signals))
            was_requeued = requeue(folder, run, processes, result, draw)
        if not was_requeued:
            is_finished = wait_for(processes, 300.0) and not any(p.exitcode for p in processes)
            order_events(folder, run)
            if not is_finished:
                result.differences.append(f"fails: {output_of(folder, run)}")
            return result
        order_events(folder, run)
        time.sleep(0.05)
    raise AssertionError  # the loop is endless


def requeue(
    folder: Path, run: int, processes: list[Any], result: Result, draw: random.Random
) -> bool:
    """Sends the signal, waits for the call of ``scontrol``, and kills; returns whether it came."""
    case = result.case
    calls = number_of_calls(folder)
    if has_ended(folder, case, run) or not all(p.is_alive() for p in processes):
        return False
    began = time.monotonic()
    for process in draw.sample(processes, len(processes)):
        os.kill(process.pid, signal.Signals[case.requeue_signal])
        if len(processes) > 1:
            time.sleep(draw.choice([0.0, draw.uniform(0.0, 0.03)]))
    while number_of_calls(folder) == calls and all(p.is_alive() for p in processes):
        time.sleep(0.002)
        if time.monotonic() - began > 20.0:
            break
    if number_of_calls(folder) > calls:
        result.waits.append(time.monotonic() - began)
        time.sleep(draw.uniform(0.0, 0.05))
        if has_ended(folder, case, run):
            return False  # the signal came in the last update, and training ends before the kill
        result.kills[case.requeue_signal] += 1
    elif not has_ended(folder, case, run):
        result.differences.append(f"a signal without a requeue: {output_of(folder, run)}")
    else:
        return False
    for process in processes:
        process.kill()
        process.join()
    return True


def number_of_calls(folder: Path) -> int:
    """Returns how often ``scontrol requeue`` was called."""
    path = folder / "scontrol.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    assert all(line == "requeue 4711" for line in lines)
    return len(lines)


def places(folder: Path) -> Counter[str]:
    """Returns what the processes did when signals arrived, with numbers."""
    path = folder / "signals.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(json.loads(line)["value"] for line in lines)


def cells() -> Iterator[tuple[Case, int]]:
    """Yields configurations of one process, with the number of signals."""
    product = itertools.product(("stateful", "exact", "exact, 2 workers"), SIGNALS)
    for index, (loader, name) in enumerate(product):
        precision = ("32-true", "16-mixed", "bf16-mixed")[(index + index // 3) % 3]
        # A ramp makes windows of many lengths, also around a validation.
        number = 2 * index + 1 if loader == "stateful" else index
        yield Case(loader, precision, "BatchNorm", True, number, requeue_signal=name, pause=0.0), 9


def cells_of_two() -> Iterator[tuple[Case, int]]:
    """Yields configurations of two processes."""
    case = Case("exact", "32-true", "BatchNorm", True, 0, 2, requeue_signal="SIGUSR1", pause=0.0)
    yield case, 8
    yield replace(case, precision="16-mixed", number=7, requeue_signal="SIGUSR2"), 8
    yield replace(case, loader="stateful", number=3, guard=False), 8
    yield replace(case, loader="stateful", number=5, requeue_signal="SIGTERM"), 8
    yield replace(case, number=6, requeue_signal="SIGTERM"), 8
    yield replace(case, loader="exact, 2 workers", number=4, norm="LayerNorm"), 8


def requeued_and_compared(
    case: Case, folder: Path, *, signals: int, seed: int
) -> tuple[Result, Counter[str]]:
    """Trains without and with signals, and compares; returns also where they arrived."""
    duration = uninterrupted(folder / "straight", case)
    draw = random.Random(seed)
    result = requeued(folder / "requeued", case, signals=signals, duration=duration, draw=draw)
    if not result.differences:
        result.differences = differences(folder / "straight", folder / "requeued", case)
    return result, places(folder / "requeued")


def measure() -> str:
    """Runs all configurations, and returns the results as Markdown."""
    began, results, arrived = time.monotonic(), [], Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        for seed, (case, signals) in enumerate([*cells(), *cells_of_two()]):
            folder = Path(name) / str(seed)
            result, found = requeued_and_compared(case, folder, signals=signals, seed=seed)
            results.append(result)
            arrived += found
            shutil.rmtree(folder)
    minutes = (time.monotonic() - began) / 60
    lines = [INTRODUCTION, "| run | requeued | differs |", "|---|---:|---|"]
    for result in results:
        processes = "two processes, " if result.case.processes > 1 else ""
        differs = "yes" if result.differences else "no"
        lines.append(f"| {processes}{result.case} | {sum(result.kills.values())} | {differs} |")
    totals = [sum(sum(r.kills.values()) for r in results if r.case.processes == n) for n in (1, 2)]
    waits = sorted(wait for result in results for wait in result.waits)
    lines += [
        "",
        f"One process was requeued {totals[0]} times, two processes {totals[1]} times; "
        f"**{sum(bool(r.differences) for r in results)} runs differ**. `scontrol` was "
        f"called {waits[len(waits) // 2]:.2f} s (median) and {waits[-1]:.2f} s (longest) after the "
        "signal. "
        "The signals arrived in: "
        + ", ".join(f"{k} ({n})" for k, n in arrived.most_common())
        + ".",
        "",
        *failures(results),
        f"It took {minutes:.0f} minutes on {os.cpu_count()} CPU cores.",
    ]
    return "\n".join(lines)
