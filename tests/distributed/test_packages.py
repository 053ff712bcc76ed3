"""``pytorch_lightning`` on two processes gives the bits of ``lightning``, with DDP and FSDP2."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.conftest import launch
from tests.distributed.package_scenarios import NAMES_OF_SCENARIOS

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Returns the results of both processes, by package and run."""
    found = launch(tmp_path_factory.mktemp("packages"), NAMES_OF_SCENARIOS)
    return [result["packages"] for result in found]


@pytest.mark.parametrize("case", ["ddp", "fsdp2", "range test", "finder", "refused"])
def test_both_packages_train_to_the_same_bits(processes: list[Any], case: str) -> None:
    for result in processes:
        assert result["pytorch_lightning"][case] == result["lightning.pytorch"][case]


def test_the_runs_need_to_know_their_strategy(processes: list[Any]) -> None:
    first, second = (result["pytorch_lightning"] for result in processes)
    for case in ("ddp", "fsdp2", "range test", "finder"):
        assert first[case]["weights"] == second[case]["weights"]
        assert len(first[case]["rates"]) == 12
    # Without accumulation only DDP's hook gives the gradient of one process: the first six updates.
    assert first["ddp"]["states"]["GradientNoiseScale"]["estimator"]["updates"] == 12
    # Samples are counted over both processes: 6 updates of 4 samples, then 6 of 8.
    for case in ("ddp", "fsdp2"):
        assert first[case]["logged"]["progress/samples"][-1][1] == 72
    assert len(first["range test"]["states"]["LearningRateRangeTest"]["losses"]) == 20
    assert first["finder"]["micro"] == 4  # a share of one process of 8 samples
    assert "strategy must keep the whole model" in first["refused"]
