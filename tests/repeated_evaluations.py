"""A module whose optimizer evaluates the closure several times per step, with bad evaluations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.gradients.step_problems import ClosureSam
from tests.helpers import Probe, ResumableLoader, full

OPTIMIZERS: dict[str, Any] = {
    "SAM": {"optimizer": ClosureSam, "lr": 0.05},
    "LBFGS": {"optimizer": torch.optim.LBFGS, "lr": 0.05, "max_iter": 3},
}


class Evaluated(Probe):
    """Multiplies the loss of chosen evaluations, given as (batch, evaluation); both from 0.

    Only on one process, if a rank is given.
    """

    def __init__(
        self,
        bad: dict[tuple[int, int], float] | None = None,
        *,
        rank: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.bad, self.bad_rank, self.evaluation = bad or {}, rank, 0
        self.first_norms: list[float] = []
        self.ratios: list[float] = []
        self.before: Tensor | None = None

    def vector(self) -> Tensor:
        return torch.cat([full(p.detach()).flatten() for p in self.parameters()])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        self.evaluation, self.before = 0, self.vector()
        return None

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.before is not None
        self.ratios.append(float((self.vector() - self.before).norm() / self.before.norm()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, index = batch
        loss = self.loss(x, y / (index + 1).unsqueeze(1))
        factor = self.bad.get((batch_idx, self.evaluation), 1.0)
        self.evaluation += 1
        return loss * factor if self.bad_rank in (None, self.global_rank) else loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.evaluation == 1:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            self.first_norms.append(float(full(torch.nn.utils.get_total_norm(grads))))

    def state(self) -> Any:
        return self.vector(), self.trainer.optimizers[0].state_dict()


def without(size: int, omitted: set[int]) -> DataLoader[Any]:
    """Returns the batches of a loader except some."""
    batches = enumerate(ResumableLoader(size, 2))
    kept: Any = [batch for index, batch in batches if index not in omitted]
    return DataLoader(kept, batch_size=None)
