"""An optimizer with two modes, and a capability that switches it, using only the protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Fit
from tests.engine.fake_averaging import copies


class ModalSGD(Optimizer):
    """SGD that trains one sequence of weights and evaluates their mean, like schedule-free SGD.

    ``eval()`` puts the mean into the parameters and ``train()`` the training weights; both are
    exact. A step in evaluation mode raises.
    """

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "train_mode": True, "k": 0})

    def train(self) -> None:
        self._exchange("training", train_mode=True)

    def eval(self) -> None:
        self._exchange("mean", train_mode=False)

    @torch.no_grad()
    def _exchange(self, wanted: str, *, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train_mode:
                for parameter in group["params"]:
                    if self.state[parameter]:
                        parameter.copy_(self.state[parameter][wanted])
            group["train_mode"] = train_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("the optimizer is in evaluation mode")
            group["k"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.sub_(parameter.grad, alpha=group["lr"])
                state = self.state[parameter]
                state["training"] = parameter.clone()
                state.setdefault("mean", torch.zeros_like(parameter))
                state["mean"].lerp_(parameter, 1 / group["k"])
        return loss


class FakeOptimizerModes(Capability):
    """Keeps an optimizer in training mode for its steps, and in evaluation mode otherwise.

    A checkpoint holds the weights of evaluation mode; the optimizer's state holds the others.
    """

    owns, rank = "fake optimizer modes", 70

    def start(self, fit: Fit) -> None:
        for optimizer in modal(fit.trainer):
            for group in optimizer.param_groups:
                group["train_mode"] = False  # a checkpoint holds the weights of evaluation mode
            optimizer.train()

    def end(self, fit: Fit) -> None:
        for optimizer in modal(fit.trainer):
            optimizer.eval()

    def begin_evaluation(self, trainer: Any, module: Any) -> None:
        for optimizer in modal(trainer):
            optimizer.eval()

    def end_evaluation(self, trainer: Any, module: Any) -> None:
        for optimizer in modal(trainer) if self.fit is not None else ():
            optimizer.train()

    def saved_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        assert self.fit is not None
        trainer, module = self.fit.trainer, self.fit.module
        modes = [optimizer.param_groups[0]["train_mode"] for optimizer in modal(trainer)]
        for optimizer in modal(trainer):
            optimizer.eval()
        weights: dict[str, Tensor] = copies(module)
        for optimizer, train_mode in zip(modal(trainer), modes, strict=True):
            if train_mode:
                optimizer.train()
        return {**state_dict, **weights}


def modal(trainer: Any) -> list[ModalSGD]:
    return [one for one in trainer.optimizers if isinstance(one, ModalSGD)]
