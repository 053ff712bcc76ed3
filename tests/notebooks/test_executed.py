"""The stored outputs of every notebook are those of its code as it stands.

Two notebooks run at a time, each in a process and kernel of its own and by the command that stores
them; each test waits for its own.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest

from notebooks.run import NOTEBOOKS, find
from tests.notebooks.comparison import complaints, differences

STORED = find([])


def execute(path, folder):
    command = [sys.executable, str(NOTEBOOKS / "run.py"), path.stem, "--into", str(folder)]
    # A folder from which a relative path of the repository would lead nowhere.
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
def test_stored_outputs_are_those_of_the_code(executions, path):
    folder, futures = executions
    done = futures[path].result()
    assert done.returncode == 0, done.stderr
    fresh = nbformat.read(folder / path.name, as_version=4)
    assert not complaints(fresh)
    assert not differences(nbformat.read(path, as_version=4), fresh)
