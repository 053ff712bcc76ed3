"""A long run needs no more memory, objects and files from step to step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.long_run import grown, long_run


@pytest.mark.slow
def test_objects_files_and_checkpoints_do_not_grow(tmp_path: Path) -> None:
    first, *_, last = long_run(tmp_path, steps=3000, every=1000)
    assert (first.step, last.step) == (1000, 3000)
    assert last.objects.total() - first.objects.total() < 40, grown(first, last)
    assert last.open_files == first.open_files
    # GradientClipping keeps up to 512 norms of 9 bytes, and drops half of them when they are full.
    assert last.checkpoint <= first.checkpoint + 256 * 9
    # The plan and the first dashboard are written at the start.
    assert last.events < 3 * first.events
