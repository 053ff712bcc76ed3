"""Running statistics of normalization layers are restored after a rejected batch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt import (
    StepGuard,
)
from tests.bad_batches import finite, fit
from tests.helpers import cpu_precision


class WithBatchNorm(L.LightningModule):
    """Batch normalization updates its statistics in the forward pass, before the rejection."""

    def __init__(self, bad: dict[int, float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bad = bad
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.statistics: list[list[Tensor]] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0] * self.bad.get(self.trainer.global_step, 1.0)
        return nn.functional.mse_loss(self.net(x), batch[1])

    def on_train_batch_end(self, *args: Any) -> None:
        self.statistics.append([b.clone() for b in self.net[1].buffers()])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_rejected_batch_does_not_change_running_statistics(precision: str, accumulate: int) -> None:
    module = WithBatchNorm({4: math.nan})
    options = {"accumulate_grad_batches": accumulate, **cpu_precision(precision)}
    fit(module, StepGuard(), size=16 * accumulate, **options)
    ends = module.statistics[accumulate - 1 :: accumulate]
    changed = [
        not torch.equal(a, b)
        for before, after in itertools.pairwise(ends)
        for a, b in zip(before[:2], after[:2], strict=True)
    ]
    assert changed == [update != 4 for update in range(1, 8) for _ in range(2)]
    assert finite(module.state_dict())


def test_lazy_layer_without_statistics_is_supported() -> None:
    module = WithBatchNorm({4: math.nan})
    module.net = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(), nn.Linear(4, 3))
    fit(module, StepGuard(), size=16)
    assert module.net[1].num_batches_tracked == 7
    assert finite(module.state_dict())
