"""Reports of rejected updates: parameters, log lines and files."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_bigopt import NonFinite, NormSpike, StepGuard
from tests.bad_batches import BadBatchModule, fit


def test_rejection_names_the_largest_and_the_non_finite_parameters(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class BadGradientInOneLayer(BadBatchModule):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 3:
                self.net[2].bias.grad[1] = math.inf
            if self.trainer.global_step == 6:
                self.net[0].weight.grad.mul_(1e5)

    module = BadGradientInOneLayer({})
    guard = StepGuard([NonFinite(), NormSpike(armed=3)])
    with caplog.at_level(logging.INFO):
        fit(module, guard, size=16)
    broken, large = guard.rejections
    assert (broken.nonfinite, [name for name, _ in broken.parameters]) == (1, ["net.2.bias"])
    assert (large.nonfinite, large.parameters[0][0]) == (0, "net.0.weight")
    assert broken.rank is None
    assert math.isfinite(broken.loss)
    assert "Update 3 (epoch 0, batch 3) rejected" in caplog.text
    assert "not finite in 1 parameter: net.2.bias" in caplog.text


def test_at_most_twenty_files_are_written(tmp_path: Path) -> None:
    module = BadBatchModule(dict.fromkeys(range(30), math.nan))
    fit(module, StepGuard(forensics=str(tmp_path), max_consecutive=99), size=64)
    assert len(list(tmp_path.iterdir())) == 20


def test_batches_are_kept_only_with_forensics(tmp_path: Path) -> None:
    class RecordsKeptBatch(BadBatchModule):
        kept: Any = None

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            super().on_before_optimizer_step(optimizer)
            self.kept = guard._window._data

    for folder, expected in ((None, True), (str(tmp_path), False)):
        guard = StepGuard(forensics=folder)
        module = RecordsKeptBatch({})
        fit(module, guard, size=4)
        assert (module.kept is None) is expected
        assert guard._window._data is None
