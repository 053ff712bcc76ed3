"""The values written to parameter groups: bases, ratios and tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_bigopt import (
    Constant,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
)
from tests.helpers import FieldRecorder, Probe, fit, loader

DOWN = Linear(start=1.0, end=0.0)


def test_learning_rate_ratios_are_kept_and_named_groups_have_their_own_schedule() -> None:
    class Grouped(Probe):
        def configure_optimizers(self) -> Any:
            first, _, last = self.net
            return torch.optim.SGD(
                [
                    {"params": first.parameters(), "lr": 0.4, "name": "body"},
                    {"params": last.parameters(), "lr": 0.1, "name": "head"},
                ]
            )

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.seen.append(tuple(float(g["lr"]) for g in optimizer.param_groups))

    module = Grouped()
    module.seen = []
    fit(module, loader(8, 2), LearningRateScheduler(DOWN, groups={"head": Constant()}), max_steps=4)
    assert module.seen == [(0.4 * (1 - t / 4), 0.1) for t in range(4)]
    with pytest.raises(ValueError, match=r"groups must name parameter groups.*'tail'.*body"):
        fit(
            Grouped(), loader(8, 2), LearningRateScheduler(DOWN, groups={"tail": DOWN}), max_steps=4
        )


def test_learning_rate_tensor_is_filled_in_place() -> None:
    class TensorLearningRate(Probe):
        def configure_optimizers(self) -> Any:
            self.rate = torch.tensor(0.5)
            return torch.optim.Adam(self.parameters(), lr=self.rate)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            assert optimizer.param_groups[0]["lr"] is self.rate
            super().on_before_optimizer_step(optimizer)

    module = TensorLearningRate()
    fit(module, loader(8, 2), LearningRateScheduler(DOWN), max_steps=4)
    assert module.lrs == [0.5, 0.375, 0.25, 0.125]


def test_optimizer_without_a_learning_rate_raises() -> None:
    class Adafactor(Probe):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer.param_groups[0]["lr"] = None
            return optimizer

    with pytest.raises(ValueError, match=r"lr must be a number.*got None in SGD.*relative_step"):
        fit(Adafactor(), loader(16, 4), LearningRateScheduler(DOWN), max_steps=2)


@pytest.mark.parametrize("field", ["weight_decay", "betas[1]"])
def test_hyperparameter_tensor_is_filled_in_place(field: str) -> None:
    class AdamWWithoutUpdate(torch.optim.AdamW):
        def step(
            self, closure: Any = None
        ) -> Any:  # on the CPU torch rejects tensors in these fields
            return closure()

    class TensorField(FieldRecorder):
        def configure_optimizers(self) -> Any:
            optimizer = AdamWWithoutUpdate(self.parameters(), lr=0.1)
            self.tensor = torch.tensor(0.5)
            group = optimizer.param_groups[0]
            if field == "weight_decay":
                group["weight_decay"] = self.tensor
            else:
                group["betas"] = (torch.tensor(0.9), self.tensor)
            return optimizer

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            group = optimizer.param_groups[0]
            held = group["weight_decay"] if field == "weight_decay" else group["betas"][1]
            assert held is self.tensor
            super().on_before_optimizer_step(optimizer)

    module = TensorField(field)
    fit(module, loader(8, 2), HyperparameterScheduler(field, DOWN), max_steps=4)
    assert module.seen == [0.5, 0.375, 0.25, 0.125]


def test_hyperparameter_bases_are_kept_and_named_groups_have_their_own_schedule() -> None:
    class Grouped(Probe):
        seen: list[Any] = []  # noqa: RUF012

        def configure_optimizers(self) -> Any:
            first, _, last = self.net
            return torch.optim.SGD(
                [
                    {"params": first.weight, "weight_decay": 0.4, "name": "body"},
                    {"params": first.bias, "weight_decay": 0.0},
                    {"params": last.parameters(), "weight_decay": 0.1, "name": "head"},
                ],
                lr=0.1,
            )

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.seen.append(tuple(g["weight_decay"] for g in optimizer.param_groups))

    module = Grouped()
    module.seen = []
    scheduler = HyperparameterScheduler("weight_decay", DOWN, groups={"head": Constant()})
    fit(module, loader(8, 2), scheduler, max_steps=4)
    assert module.seen == [(0.4 * (1 - t / 4), 0.0, 0.1) for t in range(4)]
    unknown = HyperparameterScheduler("weight_decay", DOWN, groups={"tail": DOWN})
    with pytest.raises(ValueError, match=r"groups must name parameter groups.*'tail'.*'body'"):
        fit(Grouped(), loader(8, 2), unknown, max_steps=4)
