"""Trains every optimizer on two processes with DDP, in one start, and compares with one process."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contracts.catalog import Entry, catalog, compilation
from benchmarks.contracts.checks import (
    ROUNDING,
    amplified_rounding,
    clipping,
    factor,
    schedule,
    shortened,
)
from benchmarks.contracts.training import Batches, fit

__all__ = ["compare", "start", "train_both"]

ROOT = Path(__file__).parents[2]
STEPS = 6


def train_both(entry: Entry) -> dict[str, Any]:
    """Trains with the callbacks and bare, on this process of two; returns weights or errors."""
    part = int(os.environ["RANK"]), 2
    found: dict[str, Any] = {}
    for name in ("callbacks", "bare"):
        listed = [schedule(), clipping()] if name == "callbacks" else []
        options = {"devices": 2, "strategy": "ddp", "max_steps": STEPS}
        try:
            module = fit(entry, *listed, data=Batches(part=part), **options)
            found[name] = [p.detach().clone() for p in module.net.parameters()]
        except Exception as error:  # noqa: BLE001 - the table shows it
            found[name] = shortened(error)
    return found


def compare(entry: Entry, ranks: Sequence[dict[str, Any]]) -> str:
    """Compares the weights of two processes with those of one; returns a result as a check does."""
    result = _compare(entry, [rank["callbacks"] for rank in ranks], schedule(), clipping())
    if result[0] in "y≈":
        return result
    bare = _compare(entry, [rank["bare"] for rank in ranks])
    if bare[0] in "y≈":
        return result
    if "of one process" in result and "of one process" in bare:
        return f"≈ amplifies rounding: {result[-7:]}, a bare Trainer {bare[-7:]}"
    return f"own: {bare.removeprefix('fault: ')}"


def _compare(entry: Entry, ranks: Sequence[list[Tensor] | str], *callbacks: Any) -> str:
    for weights in ranks:
        if isinstance(weights, str):
            kind, _, text = weights.partition(": ")
            return f"refused: {text}" if kind == "ValueError" else f"fault: {weights}"
    first, second = ranks
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):  # type: ignore[arg-type]
        return "fault: the processes have different weights"
    alone = fit(entry, *callbacks, max_steps=STEPS)
    size = max(
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-3))
        for a, b in zip(first, alone.net.parameters(), strict=True)  # type: ignore[arg-type]
    )
    if size == 0:
        return "y"
    if ROUNDING < size < 30 * (shifted := amplified_rounding(entry, factor=factor, steps=STEPS)):
        return f"≈ amplifies rounding: {size:.0e}, a plain loop {shifted:.0e}"
    return (
        "≈" if size < ROUNDING else f"fault: weights differ from those of one process by {size:.1e}"
    )


def start(names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Starts two processes once; returns what :func:`train_both` finds on each, by optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        workers = [
            subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "benchmarks.contracts.processes", folder, *names],
                cwd=ROOT,
                env=os.environ
                | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "LOCAL_WORLD_SIZE": "2",
                    "GROUP_RANK": "0",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "contracts",
                    "OMP_NUM_THREADS": "1",
                },
            )
            for rank in range(2)
        ]
        try:
            if any([worker.wait(timeout=1800) for worker in workers]):  # noqa: C419 - wait for both
                raise RuntimeError("a process of the two-process contract failed")
        finally:
            for worker in workers:
                worker.kill()
        ranks = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def main() -> None:
    """Trains the named optimizers on this process."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder, *names = sys.argv[1:]
    found = {}
    for entry in (entry for entry in catalog() if entry.key in names):
        with compilation(entry):
            found[entry.key] = train_both(entry)
    torch.save(found, Path(folder, f"{os.environ['RANK']}.pt"))


if __name__ == "__main__":
    main()
