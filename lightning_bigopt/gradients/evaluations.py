"""Evaluates the closure of a step, and undoes a step that is skipped in a repeated evaluation."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_bigopt.optimizers.object_snapshot import ObjectSnapshot

__all__ = ["Evaluations", "StepStopped", "has_gradients"]

_version = attrgetter("_version")


class StepStopped(BaseException):
    """Leaves a step that was skipped in an evaluation of its closure, and has been undone.

    Not an ``Exception``, so that a handler in the optimizer does not stop it.
    """


class Evaluations:
    """The evaluations of the closure in the current step of one optimizer.

    The first evaluation precedes the step, and :attr:`replay` returns its result to the optimizer.
    Optimizers such as SAM and LBFGS evaluate the closure again, at other weights. If the step is
    skipped in such an evaluation, or the evaluation raises, everything is restored that the
    optimizer has changed by then. This needs a copy of weights and optimizer state, which is made
    in the first step, and from the first repeated evaluation on in every step.

    An optimizer that changes the weights before its first evaluation is detected in its first step.
    From then on it makes all evaluations itself.

    Args:
        optimizer: The optimizer.
        is_skipped: Returns whether the current step is skipped.

    Attributes:
        number: Number of evaluations that have begun in the current step; 0 outside a step.
        are_undone: Whether steps can be undone; False saves the copies.
        repeat: Whether the optimizer has evaluated a closure several times in one step; None before
            the first step.
        start_weights: Copies of the weights at the beginning of the current step, by parameter, if
            the optimizer changes them before its first evaluation; else empty.
        replay: The closure for the optimizer.
    """

    def __init__(self, optimizer: Optimizer, is_skipped: Callable[[], bool]) -> None:
        self._optimizer, self._is_skipped = optimizer, is_skipped
        self.number = 0
        self.are_undone = True
        # A compiled step cannot contain the closure, and would be compiled again in every step.
        self.replay: Callable[[], Any] = torch.compiler.disable(self._replay)  # type: ignore[no-untyped-call]
        self._makes_first = True
        self.start_weights = WeakTensorKeyDictionary()
        self.repeat: bool | None = None
        self._closure: Callable[[], Any] | None = None
        self._first: list[Any] = []  # the result of the first evaluation, until it is replayed
        self._had_gradients = False
        self._versions: list[int] = []
        self._snapshot: ObjectSnapshot | None = None

    def state_dict(self) -> dict[str, bool | None]:
        """Returns what was detected in the steps so far, so that a resumed run does the same."""
        return {"repeat": self.repeat, "makes_first": self._makes_first}

    def load_state_dict(self, state: Any) -> None:
        """Restores :meth:`state_dict`, or the value of ``repeat`` alone of an earlier release."""
        if isinstance(state, dict):
            self.repeat, self._makes_first = state["repeat"], state["makes_first"]
        else:
            self.repeat = state

    def begin(self, closure: Callable[[], Any], *, before_step: bool) -> Any:
        """Begins a step, and returns the result of the first evaluation, or None without one.

        Args:
            closure: The user's closure.
            before_step: Whether to evaluate it now, even for an optimizer that evaluates it itself.
        """
        self._closure = closure
        return self._evaluate() if self._makes_first or before_step else None

    def run(self, step: Callable[[], Any], result: Any) -> Any:
        """Runs the optimizer's step, which receives :attr:`replay`.

        Args:
            step: The original step.
            result: The result of :meth:`begin`.

        Raises:
            StepStopped: If the step was skipped in an evaluation, and was undone.
        """
        if self.number:
            self._first = [result]
            self._versions = self._current_versions()
            self._had_gradients = has_gradients(self._optimizer)
        if self.are_undone and self.repeat is not False:
            # An optimizer that evaluates late may use the gradients from before the step.
            self._snapshot = ObjectSnapshot(self._optimizer, gradients=not self._makes_first)
        if not self._makes_first:
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    self.start_weights[parameter] = parameter.detach().clone()
        stepped = step()
        self.repeat = bool(self.repeat)
        return stepped

    def end(self) -> None:
        """Ends the step, also after an error."""
        self.number = 0
        self._closure = self._snapshot = None
        self._first, self._versions = [], []
        self.start_weights.clear()

    def _evaluate(self) -> Any:
        assert self._closure is not None  # only called within a step
        self.number += 1
        with torch.enable_grad():
            return self._closure()

    def _replay(self) -> Any:
        if self._first:
            first = self._first.pop()
            is_unchanged = self._versions == self._current_versions()
            if is_unchanged and has_gradients(self._optimizer) == self._had_gradients:
                return first
            self._makes_first = False
        self.repeat = True
        try:
            result = self._evaluate()
        except BaseException:
            if self._snapshot is not None:
                self._snapshot.restore()
            raise
        if not self._is_skipped():
            return result
        if self._snapshot is None:
            name = type(self._optimizer).__name__
            raise RuntimeError(
                f"a step of {name} that is skipped in a repeated evaluation of its closure must "
                "follow another step with repeated evaluations, so that there is a copy of the "
                "weights, got the first one; resume from the last checkpoint"
            )
        self._snapshot.restore()
        raise StepStopped

    def _current_versions(self) -> list[int]:
        groups = self._optimizer.param_groups
        return [_version(parameter) for group in groups for parameter in group["params"]]


def has_gradients(optimizer: Optimizer) -> bool:
    """Returns whether any parameter of an optimizer has a gradient."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
