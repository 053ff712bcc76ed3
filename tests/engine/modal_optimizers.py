"""Optimizers with two modes as a user might write them, and the plain loop that uses such ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.engine.fake_averaging import Looked, copies


class MeanSGD(Optimizer):
    """SGD that trains one sequence of weights and evaluates their mean.

    ``eval()`` copies the mean into the parameters and ``train()`` the training weights. The mode is
    an attribute, as in the wrappers of schedulefree, and is not in the ``state_dict``.
    """

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "k": 0})
        self.train_mode = True

    def train(self) -> None:
        self._exchange(train_mode=True)

    def eval(self) -> None:
        self._exchange(train_mode=False)

    @torch.no_grad()
    def _exchange(self, *, train_mode: bool) -> None:
        if self.train_mode is not train_mode:
            for state, parameter in self._states():
                parameter.copy_(state["training" if train_mode else "mean"])
        self.train_mode = train_mode

    def _states(self) -> list[tuple[dict[str, Tensor], Tensor]]:
        parameters = [p for group in self.param_groups for p in group["params"]]
        return [(self.state[p], p) for p in parameters if self.state[p]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not self.train_mode:
            raise RuntimeError("the optimizer is in evaluation mode")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        parameter.sub_(parameter.grad, alpha=group["lr"])
        state = self.state[parameter]
        state["training"] = parameter.clone()
        state.setdefault("mean", torch.zeros_like(parameter))
        state["mean"].lerp_(parameter, 1 / group["k"])


class StrictSGD(MeanSGD):
    """The same with the mode in ``param_groups``; ``eval()`` needs a state, as that of SPlus."""

    @property
    def train_mode(self) -> bool:
        return bool(self.param_groups[0]["train_mode"])

    @train_mode.setter
    def train_mode(self, value: bool) -> None:
        for group in self.param_groups:
            group["train_mode"] = value

    def eval(self) -> None:
        if self.train_mode and not all(self.state[p] for p in self.param_groups[0]["params"]):
            raise KeyError("mean")
        super().eval()


class SwappingSGD(MeanSGD):
    """The same, but ``train()`` and ``eval()`` exchange the weights with those in the state."""

    @torch.no_grad()
    def _exchange(self, *, train_mode: bool) -> None:
        if self.train_mode is not train_mode:
            for state, parameter in self._states():
                parameter_before = parameter.clone()
                parameter.copy_(state["other"])
                state["other"].copy_(parameter_before)
        self.train_mode = train_mode

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        parameter.sub_(parameter.grad, alpha=group["lr"])
        state = self.state[parameter]
        state.setdefault("other", torch.zeros_like(parameter))
        state["other"].lerp_(parameter, 1 / group["k"])

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.train_mode = False  # as its weights in a checkpoint


class Free(Looked):
    """Records the weights after every batch, and in every evaluation.

    Args:
        optimizer: Class of the optimizer.
        options: Its arguments.
    """

    def __init__(self, optimizer: Any, **options: Any) -> None:
        super().__init__(optimizer=optimizer, **options)


def plain_loop(
    optimizer: Any,
    batches: Iterable[Any],
    *,
    evaluate_after: Iterable[int] = (),
    switch_after: Iterable[int] = (),
    **options: Any,
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], Free]:
    """Trains without Lightning.

    Args:
        optimizer: Class of the optimizer.
        batches: The batches.
        evaluate_after: Updates after which ``eval()`` gives the weights of an evaluation, and those
            before it are copied back.
        switch_after: Updates after which ``eval()`` and ``train()`` are called, which rounds.
        options: Arguments of the optimizer.

    Returns:
        The weights after every update, those of every evaluation, and the module after a last
        ``eval()``.
    """
    module = Free(optimizer, **options)
    one = module.configure_optimizers()
    trained, evaluated = [], []
    one.train()
    for number, (x, y, _) in enumerate(batches, 1):
        one.zero_grad()
        nn.functional.mse_loss(module.net(x), y).backward()
        one.step()
        trained.append(copies(module))
        if number in evaluate_after:
            one.eval()
            evaluated.append(copies(module))
            one.train()
            module.load_state_dict(trained[-1])
        if number in switch_after:
            one.eval()
            evaluated.append(copies(module))
            one.train()
    one.eval()
    return trained, evaluated, module
