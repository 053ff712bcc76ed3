"""A capability that averages the weights, using only the protocol, and a module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.engine.update import Update
from tests.helpers import Probe, loader

STAGES = ["validate", "test", "predict"]


class FakeAveraging(Capability):
    """Averages the weights after every update, evaluates the average, and saves it as the model.

    Its own state contains the training weights while a checkpoint contains the average.

    Args:
        decay: Weight of the old average in an update.
    """

    owns, rank = "fake averaging", 70

    def __init__(self, decay: float = 0.5) -> None:
        self.decay = decay
        self.reset()

    def reset(self) -> None:
        self.updates: float | Tensor = 0
        self.average: dict[str, Tensor] = {}
        self._training: dict[str, Tensor] | None = None  # kept while the average is in the model

    def start(self, fit: Fit) -> None:
        if self._training is not None:  # restored
            self._write(fit.module, self._training)
            self._training = None
        if not self.average:
            self.average = copies(fit.module)

    def end(self, fit: Fit) -> None:
        rank_zero_info(f"averaged {self.updates} updates")

    @torch.no_grad()
    def after_step(self, update: Update) -> None:
        is_made: float | Tensor = 1.0
        if update.found_inf is not None:  # a fused kernel decides it: known on the device alone
            is_made = 1.0 - update.found_inf
        self.updates = self.updates + is_made
        for name, parameter in update.parameters:
            self.average[name].lerp_(parameter, (1 - self.decay) * is_made)

    def begin_evaluation(self, trainer: Any, module: Any) -> None:
        if self.average:
            self._training = copies(module)
            self._write(module, self.average)

    def end_evaluation(self, trainer: Any, module: Any) -> None:
        if self._training is not None:
            self._write(module, self._training)
            self._training = None

    def saved_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, **{name: value.clone() for name, value in self.average.items()}}

    def saved_state(self) -> dict[str, Any]:
        training = self._training
        if training is None and self.fit is not None:
            training = copies(self.fit.module)
        return {
            "updates": self.updates,
            "average": {name: value.clone() for name, value in self.average.items()},
            "training": training,
        }

    def load_saved_state(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.average = {name: value.clone() for name, value in state["average"].items()}
        self._training = state["training"]

    def snapshot(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}  # the engine keeps the weights

    def restore(self, snapshot: dict[str, Any]) -> None:
        self.updates = snapshot["updates"]
        self._put(self.average, snapshot["average"])

    @torch.no_grad()
    def _write(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._put(dict(module.named_parameters()), weights)

    @torch.no_grad()
    def _put(self, into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            into[name].copy_(value)


def copies(module: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the parameters by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class Looked(Probe):
    """Records the weights in several hooks, and can make chosen updates non-finite."""

    def __init__(self, bad: tuple[int, ...] = (), **options: Any) -> None:
        super().__init__(**{"lr": 0.05, "optimizer": torch.optim.AdamW, **options})
        self.bad = bad
        self.trained: list[dict[str, Tensor]] = []
        self.evaluated: list[dict[str, Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (math.inf if self.trainer.global_step in self.bad else 1.0)

    def on_before_optimizer_step(self, optimizer: Any) -> None: ...

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.trained.append(copies(self))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(copies(self))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.evaluated.append(copies(self))
        return torch.zeros(1)


def evaluate(trainer: Any, stage: str, module: Any, **options: Any) -> None:
    """Runs one of ``STAGES`` without a table of its results."""
    silent = {} if stage == "predict" else {"verbose": False}
    getattr(trainer, stage)(module, loader(2, 2), **silent, **options)
