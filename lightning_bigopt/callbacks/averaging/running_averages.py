"""The averages of a run with their states, on their own device and in their own data type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_bigopt.averaging.average import Average, AverageState
from lightning_bigopt.averaging.weights import Weights
from lightning_bigopt.callbacks.averaging.host_copies import HostCopies
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.durations.progress import Progress

__all__ = ["RunningAverages"]


class RunningAverages:
    """Updates averages with the weights of a run.

    Args:
        averages: The averages by name.
        device: Device of the averages; None for that of the weights.
        dtype: Data type of the averages; None for float32, or that of the weight if it is wider.

    Attributes:
        states: The state of each average.
        kinds: Class and unit of each average.
    """

    def __init__(
        self,
        averages: Mapping[str, Average],
        *,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._averages, self._device, self._dtype = averages, device, dtype
        self.states = {name: a.initial_state() for name, a in averages.items()}
        # The state of one kind is of no use for another one.
        self.kinds = {n: f"{type(a).__name__} in {a.duration.unit}" for n, a in averages.items()}
        self._horizon: Horizon | None = None
        self._copies = HostCopies()

    def place(self, weight: Tensor) -> torch.device:
        """Returns the device of the average of a weight."""
        device = self._device
        if device is None or (device.type == weight.device.type and device.index is None):
            return weight.device
        return device

    def convert(self, weights: Mapping[str, Tensor]) -> Weights:
        """Returns weights with device and data type of the averages; uncopied if they have them."""
        converted: Weights = {}
        targets: dict[tuple[torch.device, torch.dtype], tuple[torch.device, torch.dtype]] = {}
        for name, weight in weights.items():
            kind = weight.device, weight.dtype
            if kind not in targets:
                targets[kind] = self.place(weight), self._type(weight)
            converted[name] = weight if targets[kind] == kind else weight.to(*targets[kind])
        return converted

    def _type(self, weight: Tensor) -> torch.dtype:
        if self._dtype is None or weight.is_complex():
            return torch.promote_types(weight.dtype, torch.float32)
        return self._dtype

    def add(self, weights: Weights, progress: Progress, horizon: Horizon | None) -> None:
        """Adds the weights after an update.

        Weights on another device are copied while training continues, and added with the next ones
        or by :meth:`settle`.
        """
        self.settle()
        self._horizon = horizon
        placed = {weight.device: weight for weight in weights.values()}
        if any(device != self.place(weight) for device, weight in placed.items()):
            self._copies.begin(weights, progress)
        else:
            self._update(weights, progress)

    def settle(self) -> None:
        """Adds weights that were copied from another device."""
        if (copied := self._copies.take()) is not None:
            self._update(*copied)

    def _update(self, weights: Weights, progress: Progress) -> None:
        current = self.convert(weights)
        for name, average in self._averages.items():
            average.update(self.states[name], current, progress, self._horizon)

    def value(
        self, name: str, weights: Mapping[str, Tensor], progress: Progress
    ) -> Mapping[str, Tensor] | None:
        """Returns an average; None if it equals the training weights."""
        self.settle()
        return self._averages[name].value(self.states[name], weights, progress)

    def match(self, weights: Weights) -> None:
        """Gives all copies the names of the weights: further ones have been constant until now."""
        self.settle()
        current = self.convert(weights)
        for state in self.states.values():
            state.copies = [
                {
                    name: copy[name] if name in copy else value.clone()
                    for name, value in current.items()
                }
                for copy in state.copies
            ]

    def count_from(self, progress: Progress, *, another_budget: bool) -> None:
        """Counts new averages from ``progress`` on, and with another budget all averages."""
        for name, average in self._averages.items():
            if another_budget or not self.states[name].numbers:
                average.count_from(self.states[name], progress)

    def snapshot(self) -> dict[str, Any]:
        """Returns the states, uncopied."""
        self.settle()
        return {n: {"copies": s.copies, "numbers": s.numbers} for n, s in self.states.items()}

    def restore(self, states: Mapping[str, Any]) -> None:
        """Restores the states of :meth:`snapshot`."""
        self._copies = HostCopies()
        self.states = {name: AverageState(**state) for name, state in states.items()}

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {**vars(self), "_copies": HostCopies(), "_horizon": None}
