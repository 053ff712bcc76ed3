"""A module with bad batches, and comparisons of the state that an update leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tests.helpers import QUIET, Probe, ResumableLoader, full

KINDS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


class BadBatchModule(Probe):
    """Multiplies the loss of chosen updates; compares parameters and state around every update.

    Args:
        bad_factors: Factor on the loss by update.
        rank: The only process whose loss is multiplied; None for all. A single process with
            ``rank=1`` computes the loss of two, whose rows follow each other in every batch.
    """

    def __init__(self, bad_factors: dict[int, float], *, rank: int | None = None, **options: Any):
        super().__init__(**options)
        self.bad_factors, self.bad_rank = bad_factors, rank
        self.changed: list[bool] = []
        self.before: Any = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        factor = self.bad_factors.get(self.trainer.global_step, 1.0)
        if self.bad_rank is None or self.global_rank == self.bad_rank:
            return self.even_loss(batch) * factor
        if self.trainer.world_size > 1:
            return self.even_loss(batch)
        # The rows of the first process, then those of the second, whose loss is multiplied.
        first, second = zip(*(part.chunk(2) for part in batch), strict=True)
        return (self.even_loss(first) + self.even_loss(second) * factor) / 2

    def even_loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Returns the loss on targets of equal size: those of Regression grow with the index."""
        x, y, index = batch
        return self.loss(x, y / (index + 1).unsqueeze(1))

    def on_train_start(self) -> None:
        optimizer = self.trainer.optimizers[0]
        if hasattr(optimizer, "train"):
            optimizer.train()

    def snapshot(self) -> dict[Any, Any]:
        """Copies parameters, optimizer state and the fields of the groups, without the lr."""
        optimizer = self.trainer.optimizers[0]
        found: dict[Any, Any] = dict(self.named_parameters())
        for index, parameter in enumerate(self.parameters()):
            found |= {(index, k): v for k, v in optimizer.state.get(parameter, {}).items()}
        for index, group in enumerate(optimizer.param_groups):
            found |= {("group", index, k): v for k, v in group.items() if k not in ("params", "lr")}
        return {
            k: full(v.detach()).clone() if isinstance(v, Tensor) else v for k, v in found.items()
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.lrs.append(float(optimizer.param_groups[0]["lr"]))
        self.norms.append(
            sum(float(full(p.grad).norm()) ** 2 for p in self.parameters() if p.grad is not None)
            ** 0.5
        )
        self.before = self.snapshot()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.before is not None:
            self.changed.append(not same(self.before, self.snapshot()))
            self.before = None


def same(first: dict[Any, Any], second: dict[Any, Any]) -> bool:
    """Whether two snapshots are equal to the bit; new state of zeros counts as equal."""
    return all(
        (torch.equal(first[k], v) if k in first else not v.any())
        if isinstance(v, Tensor)
        else first.get(k) == v
        for k, v in second.items()
    )


def finite(value: Any) -> bool:
    """Whether a state of numbers, strings, lists, dicts and tensors holds neither NaN nor inf."""
    if isinstance(value, dict):
        return all(finite(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(finite(v) for v in value)
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)


def fit(module: L.LightningModule, *callbacks: Any, size: int = 32, **options: Any) -> L.Trainer:
    """One epoch over ``size`` samples in batches of two, on this process."""
    ckpt = options.pop("ckpt_path", None)
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": list(callbacks), **options})
    trainer.fit(module, ResumableLoader(size, 2), ckpt_path=ckpt)
    return trainer
