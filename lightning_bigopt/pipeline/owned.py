"""What an optimizer owns: its parameters with their names, and its own name."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn
from torch.optim import Optimizer

from lightning_bigopt import trainer_access
from lightning_bigopt.parameters import named_parameters, parameter_names

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Owned", "Ownership"]


class Owned(NamedTuple):
    """What is known of an optimizer.

    Attributes:
        optimizer: The optimizer.
        parameters: Names and parameters, each tensor once, in the order of its groups.
        label: Its name where there are several optimizers; ``""`` else.
    """

    optimizer: Optimizer
    parameters: list[tuple[str, nn.Parameter]]
    label: str


class Ownership:
    """Looks names up once a fit, and again where an optimizer's groups have changed."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, Owned]] = {}
        self._names: tuple[str, ...] | None = None

    def known(self, optimizer: Optimizer) -> Owned | None:
        """What an optimizer owns; None before it was looked up, and when its groups have changed.

        Asked every update.
        """
        found = self._known.get(id(optimizer))
        if found is None or found[1].optimizer is not optimizer:
            return None
        return found[1] if found[0] == _size(optimizer) else None

    def look_up(self, trainer: Trainer, optimizer: Optimizer) -> Owned:
        """What an optimizer owns now."""
        owned = Owned(
            optimizer,
            named_parameters(trainer.lightning_module, optimizer),
            trainer_access.optimizer_label(trainer, optimizer),
        )
        self._known[id(optimizer)] = _size(optimizer), owned
        return owned

    def all_names(self, trainer: Trainer) -> tuple[str, ...]:
        """The names of all the module's parameters."""
        if self._names is None:
            self._names = parameter_names(trainer.lightning_module)
        return self._names


def _size(optimizer: Optimizer) -> int:
    return sum([len(group["params"]) for group in optimizer.param_groups])  # faster than without []
