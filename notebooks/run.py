"""Executes the notebooks and stores their outputs.

    python notebooks/run.py                  # all, two at a time
    python notebooks/run.py 02 04            # those whose names start with 02 or 04
    python notebooks/run.py --into folder    # writes executed copies to a folder instead

Every notebook runs in its own kernel, on one thread and in its own temporary folder, so that the
outputs depend only on the code. Metadata about time and machine is removed. The kernel is reached
through files instead of network ports, and processes that a notebook starts meet at a port of its
own, so that notebooks that run side by side do not meet each other.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

NOTEBOOKS = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def free_port() -> int:
    """Returns a port that is not in use, and that no process is given unless it asks for it.

    Linux gives ports from 32768 on to outgoing connections and to servers that accept any port, so
    one of those that is free now may be in use when the processes of a run connect to it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", port)) != 0:
                return port


def execute(notebook: nbformat.NotebookNode, *, timeout: int = 800) -> nbformat.NotebookNode:
    """Executes a notebook in its own kernel.

    Args:
        notebook: The notebook; it is not changed.
        timeout: Seconds that a single cell may take.

    Returns:
        A copy with the outputs, cleaned.

    Raises:
        CellExecutionError: If a cell raises.
        CellTimeoutError: If a cell takes longer.
    """
    notebook = nbformat.from_dict(notebook)  # a deep copy
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    with (
        tempfile.TemporaryDirectory(prefix="notebook-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory(prefix="kernel-", ignore_cleanup_errors=True) as sockets,
    ):
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            coalesce_streams=True,
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        kernel = client.create_kernel_manager()
        kernel.transport, kernel.ip = "ipc", f"{sockets}/socket"
        client.execute(env=env)
    return clean(notebook)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Removes everything that changes from one execution to the next, in place.

    The id of a cell is a hash of its source, so a change of one cell does not change the other ids.
    A cell tagged ``hide-input`` is folded: the site reads the tag, editors read the metadata.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    named: set[str] = set()
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        metadata: dict[str, object] = {"tags": tags} if tags else {}
        if "hide-input" in (tags or ()):
            metadata["jupyter"] = {"source_hidden": True}
        cell.metadata = nbformat.from_dict(metadata)
        digest = sha256(cell.source.encode()).hexdigest()
        cell.id = next(
            name for start in range(56) if (name := digest[start : start + 8]) not in named
        )
        named.add(cell.id)
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not _is_of_torchao(output)]
    return notebook


def _is_of_torchao(output: nbformat.NotebookNode) -> bool:
    """Returns whether an output is what the import of torchao prints, with paths and times.

    transformers imports torchao where it is installed.
    """
    if output.output_type != "stream" or output.name != "stderr":
        return False
    lines = output.text.splitlines()
    return all("torchao" in line or "torch/utils/_pytree.py" in line for line in lines)


def find(prefixes: Sequence[str]) -> list[Path]:
    """Returns the notebooks whose names start with one of the prefixes; all without prefixes."""
    stored = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    for prefix in prefixes:
        if not any(path.name.startswith(prefix) for path in stored):
            names = ", ".join(path.stem for path in stored)
            raise ValueError(f"notebook must be the beginning of one of {names}, got {prefix!r}")
    return [path for path in stored if not prefixes or path.name.startswith(tuple(prefixes))]


def run(path: Path, target: Path) -> str | None:
    """Executes one notebook and stores it; returns an error message or None."""
    began = time.monotonic()
    try:
        notebook = execute(nbformat.read(path, as_version=4))
    except (CellExecutionError, CellTimeoutError) as error:
        return f"{path.name}: {error}"
    nbformat.write(notebook, target)
    print(f"{path.name}: {time.monotonic() - began:.0f} s, {target.stat().st_size / 1024:.0f} KiB")
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(description="Executes notebooks and stores their outputs.")
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 02; default: all")
    parser.add_argument("--into", type=Path, help="write executed copies to this folder instead")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time (default: 2)")
    options = parser.parse_args(arguments)
    try:
        paths = find(options.names)
    except ValueError as error:
        parser.error(str(error))
    folder = options.into or NOTEBOOKS
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        failures = [
            failure
            for failure in pool.map(run, paths, [folder / path.name for path in paths])
            if failure is not None
        ]
    print(*failures, sep="\n", end="", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
