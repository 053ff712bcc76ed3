"""Runs a function in processes of its own, and reads what each of them recorded.

The processes are forked from a server that has imported everything: a start takes milliseconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from notebooks.run import free_port

GROUP_TIMEOUT = 12.0  # seconds after which a collective operation raises
BOUND = 3 * GROUP_TIMEOUT  # seconds after which a process counts as one that hangs


@dataclass(frozen=True)
class Outcome:
    """What one process did.

    Args:
        records: Its records, such as one per update.
        end: ``"finished"``, the error, the signal, or ``"hangs"``.
        seconds: The time until all processes had ended.
    """

    records: tuple[dict[str, Any], ...]
    end: str
    seconds: float

    @property
    def kind(self) -> str:
        """The end without its message."""
        return self.end.partition(":")[0]


class Recording:
    """Writes the records of one process, each at once: the process may be killed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, **record: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def described(error: BaseException) -> str:
    """Returns the class of an error, and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def run_forked(
    run: Callable[..., None], *arguments: Any, processes: int = 2, bound: float = BOUND
) -> list[Outcome]:
    """Calls ``run(*arguments, rank, folder, recording)`` in each process.

    Args:
        run: A function of a module.
        arguments: Its first arguments.
        processes: Number of processes.
        bound: Seconds after which all processes are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run.__module__])
    environment = {} if processes == 1 else _group(processes)
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        workers = [
            context.Process(target=_work, args=(environment, run, arguments, folder, rank))
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        while any(w.is_alive() for w in workers) and time.monotonic() - started < bound:
            time.sleep(0.02)
        seconds = time.monotonic() - started
        is_hanging = [worker.is_alive() for worker in workers]
        for worker in workers:
            worker.kill()
            worker.join()
        return [
            _outcome(Path(folder, f"{rank}.jsonl"), worker.exitcode, seconds, hangs=hangs)
            for rank, (worker, hangs) in enumerate(zip(workers, is_hanging, strict=True))
        ]


def _group(processes: int) -> dict[str, str]:
    """Returns the environment of a group of processes, which Lightning does not start itself."""
    return {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "test",
    }


def _work(
    environment: dict[str, str],
    run: Callable[..., None],
    arguments: Sequence[Any],
    folder: str,
    rank: int,
) -> None:
    """Runs in a process, and records how that ends."""
    if environment:
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    out = Path(folder)
    log = os.open(out / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    recording = Recording(out / f"{rank}.jsonl")
    try:
        run(*arguments, rank, out, recording)
    except BaseException as error:
        recording.add(end=described(error))
        raise
    recording.add(end="finished")


def _outcome(path: Path, code: int | None, seconds: float, *, hangs: bool) -> Outcome:
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    ends = [record["end"] for record in records if "end" in record]
    if hangs:
        end = "hangs"
    elif ends:
        end = ends[0]
    else:
        end = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return Outcome(tuple(r for r in records if "end" not in r), end, seconds)
