"""Eight optimizers on two processes, compared with each other and with one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.contracts.catalog import catalog
from benchmarks.contracts.processes import compare
from tests.distributed.contract_scenarios import EIGHT

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ENTRIES = {entry.key: entry for entry in catalog() if entry.key in EIGHT}


@pytest.fixture(autouse=True)
def _without_compilation() -> Iterator[None]:
    """torchao compiles its step, which takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("key", EIGHT)
def test_two_processes_equal_each_other_and_one(key: str, two_processes: Any) -> None:
    ranks = [
        {name: [torch.tensor(weight) for weight in weights] for name, weights in rank[key].items()}
        for rank in two_processes("contracts")
    ]
    assert compare(ENTRIES[key], ranks)[0] in "y≈"
