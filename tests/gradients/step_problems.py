"""Optimizers of many kinds on a small problem, for the tests of the step control."""

from __future__ import annotations

import copy

import schedulefree
import torch
from torch import nn

from tests.helpers import full


class Counting(torch.optim.SGD):
    """Counts its steps in an attribute, in its groups and in its state, and calls its parent."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.steps = 0

    def step(self, closure=None):
        loss = super().step(closure)
        self.steps += 1
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
        self.state["all"] = {"steps": self.steps}
        return loss


class ZeroFilling(torch.optim.Optimizer):
    """Replaces missing gradients by zeros, as the reference implementation of Muon does."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 0.1)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(buffer, alpha=-group["lr"])
        return loss


class Sam(torch.optim.SGD):
    """Takes the gradient of its second evaluation, away from the weights."""

    @torch.no_grad()
    def step(self, closure):
        parameters = [p for group in self.param_groups for p in group["params"]]
        away = [0.05 * p.grad / p.grad.norm() for p in parameters]
        torch._foreach_add_(parameters, away)
        for p in parameters:
            p.grad = None
        with torch.enable_grad():
            loss = closure()
        torch._foreach_sub_(parameters, away)
        super().step()
        return loss


class ClosureSam(torch.optim.SGD):
    """SAM (Foret et al., ICLR 2021): both gradients are those of the closure.

    It keeps the weights of the first evaluation in its state, and counts in its groups and in an
    attribute between the evaluations.
    """

    def __init__(self, params, lr=0.05, rho=0.05, momentum=0.9, fused=None):
        super().__init__(params, lr, momentum=momentum, fused=fused)
        self.rho, self.perturbed = rho, 0

    @torch.no_grad()
    def step(self, closure):
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([full(p.grad.norm()) for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=self.rho / (norm + 1e-12).item())
        self.perturbed += 1
        for group in self.param_groups:
            group["perturbed"] = group.get("perturbed", 0) + 1
        evaluate()
        for p in parameters:
            p.copy_(self.state[p]["old"])
        super().step()
        return loss


class SometimesTwice(ClosureSam):
    """Evaluates once in its first step, and twice afterwards."""

    steps = 0

    def step(self, closure):
        self.steps += 1
        return torch.optim.SGD.step(self, closure) if self.steps == 1 else super().step(closure)


class FailsWithoutGradients(torch.optim.SGD):
    """Reads all gradients, as some optimizers do after their first step."""

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        assert all((p.grad * 1).isfinite().all() for g in self.param_groups for p in g["params"])
        super().step()
        return loss


class OwnSchedule(torch.optim.SGD):
    """Keeps a schedule in its groups and a tensor in an attribute."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.seen = torch.zeros(2)

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] *= 0.9
            group["history"] = [*group.get("history", []), group["lr"]]
        self.seen += 1
        return super().step(closure)


class Wrapper(torch.optim.Optimizer):
    """Wraps an optimizer, counts its steps, and does not call ``Optimizer.__init__``."""

    def __init__(self, params):
        self.optimizer = torch.optim.AdamW(params, lr=0.1)
        self.defaults, self.steps = self.optimizer.defaults, 0

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def state_dict(self):
        return self.optimizer.state_dict()

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        self.steps += 1
        loss = self.optimizer.step(closure)
        for group in self.param_groups:
            torch._foreach_mul_([p.data for p in group["params"]], 0.99)
        return loss


class PlainDict(torch.optim.SGD):
    """Copies and pickles its whole ``__dict__``."""

    def __getstate__(self):
        return self.__dict__.copy()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    "schedulefree": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.1, warmup_steps=3),
    "counting": Counting,
    "zero-filling": ZeroFilling,
    "fails without gradients": FailsWithoutGradients,
    "own schedule": OwnSchedule,
    "wrapper": Wrapper,
    "SAM": ClosureSam,
}
SEVERAL = ["LBFGS", "SAM"]
ONCE = [kind for kind in OPTIMIZERS if kind not in SEVERAL]


class Problem:
    """A quadratic of two parameters with one optimizer, and a closure that counts."""

    def __init__(self, make=OPTIMIZERS["SGD"]):
        generator = torch.Generator().manual_seed(0)
        self.parameters = [
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (3,))
        ]
        self.optimizer = make(self.parameters)
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.evaluations = 0

    def backward(self):
        self.optimizer.zero_grad()
        loss = sum(((p - 1.0) ** 2).sum() for p in self.parameters)
        loss.backward()
        return loss

    def closure(self):
        self.evaluations += 1
        return self.backward()

    def everything(self):
        attributes = {
            name: value
            for name, value in vars(self.optimizer).items()
            if name not in {"param_groups", "state", "step", "optimizer"} and name[0] != "_"
        }
        return copy.deepcopy(
            ([p.detach() for p in self.parameters], self.optimizer.state_dict(), attributes)
        )


def assert_same_bits(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
