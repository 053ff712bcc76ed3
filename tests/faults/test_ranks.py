"""A few of the faults on one of two processes; benchmarks/faults.py runs all of them."""

from __future__ import annotations

import pytest

from tests.faults.rank_faults import NUMBERS, SETTINGS_THAT_DIFFER, STOPS
from tests.faults.ranks import run_case

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

SLOW = {"a slow process", "SIGTERM", "SIGTERM to the first process"}  # these wait for a timeout
ON_DDP = [name for name in {**NUMBERS, **STOPS} if name not in SLOW]
ON_FSDP2 = [
    "NaN in the inputs",
    "loss times 1e4",
    "training_step raises",
    "SIGINT",
    "max_norm 1.0 and 2.0",
    "no callback at all",
]


RUNS = [
    *((name, False) for name in (*ON_DDP, *SETTINGS_THAT_DIFFER)),
    *((name, True) for name in ON_FSDP2),
]


@pytest.mark.parametrize(("name", "sharded"), RUNS)
def test_processes_decide_alike_or_both_end(name: str, sharded: bool) -> None:
    assert run_case(name, sharded=sharded).problems() == []
