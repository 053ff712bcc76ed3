"""The logged step duration and throughput."""

from __future__ import annotations

import itertools
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

from lightning_bigopt import (
    OptimizationMonitor,
)
from tests.helpers import fit, loader
from tests.monitoring.helpers import Blocks, curves


def test_step_duration_and_throughput_are_plausible(tmp_path: Path) -> None:
    trainer = fit(
        Blocks(),
        loader(64, 4),
        OptimizationMonitor(every=4, layers=None),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    for (_, median), (_, slow), (_, rate) in itertools.islice(
        zip(
            logged["time/step_median"],
            logged["time/step_p95"],
            logged["throughput/samples_per_second"],
            strict=True,
        ),
        1,
        None,
    ):
        assert 0 < median <= slow
        assert 4 / (20 * slow) < rate < 20 * 4 / median
