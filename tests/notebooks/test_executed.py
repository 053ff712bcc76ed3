"""The stored outputs of every notebook equal those of a new execution.

Two notebooks run at a time, each in its own process and kernel; each test waits for its own.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest

from notebooks.run import NOTEBOOKS, find
from tests.notebooks.comparison import differences, errors_and_warnings

STORED = find([])


def execute(path, folder):
    command = [sys.executable, str(NOTEBOOKS / "run.py"), path.stem, "--into", str(folder)]
    # A folder in which relative paths of the repository do not exist.
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.fixture(scope="module")
def executions(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("executed")
    asked = {
        item.callspec.params["path"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    with ThreadPoolExecutor(2) as pool:
        futures = {path: pool.submit(execute, path, folder) for path in sorted(asked)}
        yield folder, futures
        for future in futures.values():
            future.cancel()


@pytest.mark.slow
@pytest.mark.timeout(900)  # about a minute each, and several where the machine is shared
@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_outputs_equal_those_of_a_new_execution(executions, path):
    folder, futures = executions
    done = futures[path].result()
    assert done.returncode == 0, done.stderr
    fresh = nbformat.read(folder / path.name, as_version=4)
    assert not errors_and_warnings(fresh)
    assert not differences(nbformat.read(path, as_version=4), fresh)
