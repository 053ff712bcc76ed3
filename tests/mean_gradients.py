"""A module whose gradient does not depend on its weights, for sums over a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

MICRO = 4  # samples of a micro-batch


class Means(L.LightningModule):
    """The gradient is the mean of the samples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(20, 10))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch.mean(0)).sum()


def mean_data(size: int, *, seed: int) -> Tensor:
    """Returns samples; the micro-batches 4 and 5 have no weight."""
    data = torch.randn(size, 20, 10, generator=torch.Generator().manual_seed(seed))
    data[4 * MICRO : 6 * MICRO, 0, 0] = 0.0
    return data


def first_element(batch: Tensor) -> Tensor:
    """Returns the weight of a micro-batch."""
    return batch[0, 0, 0].abs()


def sum_of_means(data: Sequence[Tensor], *, window: int, weight: Any) -> Tensor:
    """Returns the sum over windows of the weighted means over micro-batches and processes."""
    total = torch.zeros(20, 10)
    parts = list(zip(*(one.split(MICRO) for one in data), strict=True))
    for begin in range(0, len(parts), window):
        batches = [batch for each in parts[begin : begin + window] for batch in each]
        weights = torch.tensor([float(len(b) if weight is None else weight(b)) for b in batches])
        if weights.any():
            means = torch.stack([batch.mean(0) for batch in batches])
            total += torch.einsum("i,ijk->jk", weights / weights.sum(), means)
    return total
