"""``split_dataset_by_node`` on two processes: samples and learning rates, resumed too."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from tests.compatibility.test_loaders import BATCHES, EPOCHS, SAMPLES, WINDOW

pytestmark = pytest.mark.distributed


@pytest.fixture
def found(two_processes: Any) -> list[Any]:
    return two_processes("split_datasets")


def samples(batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def test_every_process_trains_on_its_half(found: list[Any]) -> None:
    each = BATCHES // 2
    for epoch in range(EPOCHS):
        used = [
            samples(r["table, 3"]["straight"][epoch * each : (epoch + 1) * each]) for r in found
        ]
        assert sorted(used[0]) == list(range(SAMPLES // 2))
        assert sorted(used[1]) == list(range(SAMPLES // 2, SAMPLES))
    used = [samples(result["stream, 3"]["straight"]) for result in found]
    assert sorted(used[0] + used[1]) == list(range(SAMPLES))


def test_schedules_follow_the_epochs_of_a_half(found: list[Any]) -> None:
    updates = EPOCHS * BATCHES // 2 // WINDOW
    expected = [0.1 * (1 - update / updates) for update in range(updates)]
    for result in found:
        assert result["table, 3"]["lrs"] == pytest.approx(expected)


@pytest.mark.parametrize("case", ["table, 3", "table, 6", "table, 9", "stream, 3"])
def test_resume_between_windows_is_exact(found: list[Any], case: str) -> None:
    at = int(case.split(", ")[1])
    for result in (r[case] for r in found):
        assert result["resumed"] == result["straight"][at:]
        assert result["resumed lrs"] == result["lrs"][result["updates"] :]


def test_the_sampler_of_lightning_halves_a_table_again(found: list[Any]) -> None:
    """``use_distributed_sampler=False`` belongs to a table that is split."""
    for result in found:
        assert len(result["with a sampler"]) == BATCHES // 4
