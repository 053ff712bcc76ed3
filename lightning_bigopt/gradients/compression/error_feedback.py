"""The state of compression: what was not sent, kept until the update has been made."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["RESIDUAL", "ErrorFeedback", "ParameterState"]

RESIDUAL = "residual"
"""The entry of a parameter's state that differs between the processes."""

ParameterState: TypeAlias = dict[str, Tensor]
"""The state of one parameter by name: its residual, and what the compressor adds."""


class ErrorFeedback:
    """The states of all parameters, and their pending values of the next update.

    A compressor runs during the backward pass, before anything has decided on the update. It
    proposes new states, and :meth:`commit` applies them after the optimizer's step. A skipped
    update therefore leaves the states unchanged, and non-finite values never enter them.

    Attributes:
        states: State of each parameter, by name.

    Example:
        >>> feedback = ErrorFeedback()
        >>> feedback.states["weight"] = {"residual": torch.zeros(1)}
        >>> feedback.propose("weight", {"residual": torch.ones(1)}, torch.tensor(True))
        >>> feedback.commit(["weight"])
        >>> feedback.states["weight"]["residual"]
        tensor([1.])
    """

    def __init__(self) -> None:
        self.states: dict[str, ParameterState] = {}
        self._pending: dict[str, tuple[ParameterState, Tensor]] = {}

    def propose(self, name: str, state: ParameterState, finite: Tensor) -> None:
        """Stores the state of a parameter after the next update.

        Args:
            name: Name of the parameter.
            state: The new state, with the keys and shapes of the current one.
            finite: Whether the mean gradient is finite, a bool tensor of shape ``()``; equal on all
                processes.
        """
        self._pending[name] = (state, finite)

    def commit(self, names: Collection[str], skipped: Tensor | None = None) -> None:
        """Applies the pending states of parameters, and drops all others.

        Does not synchronize with a GPU.

        Args:
            names: The parameters that the optimizer has updated.
            skipped: Positive if the update was not made, as by the kernel of a fused optimizer.
        """
        for name, (state, finite) in self._pending.items():
            if name not in names:
                continue
            is_made = finite if skipped is None else finite & (skipped == 0).to(finite.device)
            if is_made.is_cpu:
                if is_made.item():
                    self.states[name] = state
                continue
            before = self.states[name]
            self.states[name] = {
                key: torch.where(is_made, value, before[key]) for key, value in state.items()
            }
        self._pending.clear()

    def drop(self) -> None:
        """Drops all pending states."""
        self._pending.clear()

    def clear(self) -> None:
        """Clears all states."""
        self.states.clear()
        self._pending.clear()

    def copy_of_states(self) -> dict[str, ParameterState]:
        """Returns all states; later updates replace their tensors and do not change them."""
        return {name: dict(state) for name, state in self.states.items()}

    def replace(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replaces all states."""
        self.clear()
        self.states.update({name: dict(state) for name, state in states.items()})
