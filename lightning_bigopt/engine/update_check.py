"""Checks that the updates of a fit, and their gradients, reach the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["UpdateCheck"]

# An epoch may be as long as the run. So many windows without any gradient are no coincidence.
_MANY_WINDOWS = 100


class UpdateCheck:
    """Raises if an update does not call the engine's hook; warns if no gradient reaches it.

    Args:
        trainer: The Trainer, at the start of the fit.
        optimizers: Label and optimizer, for each optimizer.
    """

    def __init__(self, trainer: Trainer, optimizers: Sequence[tuple[str, Optimizer]]) -> None:
        self._trainer, self._optimizers = trainer, optimizers
        self._first_step = trainer.global_step
        self._called: set[int] = set()
        self._reached: set[int] = set()
        self._windows = 0
        self._is_over = False

    def called(self, optimizer: Optimizer) -> None:
        """Records a call of ``on_before_optimizer_step``."""
        self._called.add(id(optimizer))

    def reached(self, optimizer: Optimizer) -> None:
        """Records an update with a gradient."""
        self._reached.add(id(optimizer))

    def end_batch(self, names: Sequence[str], *, closes_window: bool) -> None:
        """Checks the updates after a batch.

        Args:
            names: Class names of the capabilities that act on updates.
            closes_window: Whether the batch should have made an update.

        Raises:
            RuntimeError: If ``global_step`` has increased without a call of the hook.
        """
        if not self._called and self._trainer.global_step > self._first_step:
            raise RuntimeError(
                "on_before_optimizer_step must be called for every update, got an update without "
                f"it (strategy {type(self._trainer.strategy).__name__}); call super() in "
                "overridden hooks, or remove the callbacks of lightning_bigopt"
            )
        self._windows += closes_window
        if self._windows == _MANY_WINDOWS and not self._reached:
            self.end_epoch(names)

    def end_epoch(self, names: Sequence[str]) -> None:
        """Warns, once, about optimizers that have made no update with a gradient.

        Args:
            names: Class names of the capabilities that act on updates.
        """
        if self._is_over or not self._windows:
            return
        self._is_over = True
        for label, optimizer in self._optimizers:
            if id(optimizer) in self._reached:
                continue
            name = label or type(optimizer).__name__
            if id(optimizer) in self._called:
                found = (
                    "gradients that are None before every step; an optimizer that steps in the "
                    "hooks of the backward pass, or gradients that were cleared, leave none: step "
                    "after the backward pass"
                )
            else:
                found = (
                    "no step through Lightning; call step() of self.optimizers(), not "
                    "first_step(), second_step() or the step of the optimizer inside"
                )
            rank_zero_warn(
                f"{', '.join(names)} must get the gradients of {name}, got {found}, or remove the "
                f"callbacks, which have had no effect on {name} so far"
            )
