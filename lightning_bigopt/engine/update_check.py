"""Checks that the updates of a fit, and their gradients, reach the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_bigopt.engine.step_detector import StepDetector
from lightning_bigopt.trainer_access import loop, strategies

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["UpdateCheck"]

# An epoch may be as long as the run. So many windows without any gradient are no coincidence.
_MANY_WINDOWS = 100


class _OnUpdates(Protocol):
    """A capability that acts on updates."""

    @property
    def needs_step_hook(self) -> bool: ...

    @property
    def rank(self) -> int: ...


class UpdateCheck:
    """Raises if an update does not call the engine's hook; warns if no gradient reaches it.

    Args:
        trainer: The Trainer, at the start of the fit.
        counts_updates: Returns whether a schedule counts the updates that Lightning counts.
    """

    def __init__(self, trainer: Trainer, *, counts_updates: Callable[[], bool]) -> None:
        self._trainer = trainer
        self._optimizers: tuple[tuple[str, Optimizer], ...] = ()
        self._counts_updates = counts_updates
        self._first_step = trainer.global_step
        self._called: set[int] = set()
        self._reached: set[int] = set()
        self._windows = 0
        self._is_over = self._has_warned = False
        self._steps = StepDetector(is_watched=loop.is_current(trainer))

    def remove(self) -> None:
        """Removes the hooks from the optimizers."""
        self._steps.watch([])

    def begin_batch(self, optimizers: tuple[tuple[str, Optimizer], ...]) -> None:
        """Forgets the steps before the batch, such as those of a learning-rate finder's trial.

        Checks the length of the first window.

        Args:
            optimizers: Label and optimizer, for each optimizer of the fit.
        """
        if optimizers is not self._optimizers:
            self._optimizers = optimizers
            self._steps.watch([optimizer for _, optimizer in optimizers])
        self._steps.clear()
        if not self._windows:
            strategies.check_first_window(self._trainer)

    def called(self, optimizer: Optimizer) -> None:
        """Records a call of ``on_before_optimizer_step``."""
        self._called.add(id(optimizer))
        self._steps.announce(optimizer)

    def reached(self, optimizer: Optimizer) -> None:
        """Records an update with a gradient."""
        self._reached.add(id(optimizer))

    def end_batch(self, capabilities: Sequence[_OnUpdates], *, closes_window: bool) -> None:
        """Checks the updates after a batch.

        Args:
            capabilities: The capabilities that act on updates.
            closes_window: Whether the batch should have made an update.

        Raises:
            RuntimeError: If an update was made without a call of the hook, and a capability or a
                schedule depends on it.
        """
        is_counted = not self._called and self._trainer.global_step > self._first_step
        if is_counted or self._steps.unannounced is not None:
            self._report_step(capabilities)
        self._windows += closes_window
        if self._windows == _MANY_WINDOWS and not self._reached:
            self.end_epoch(capabilities)

    def _report_step(self, capabilities: Sequence[_OnUpdates]) -> None:
        """Raises for a step without the hook, or warns, once, if nothing depends on it."""
        trainer, optimizer = self._trainer, self._steps.unannounced
        name = "an optimizer" if optimizer is None else type(optimizer).__name__
        cause = (
            f"got a step of {name} without it (strategy {type(trainer.strategy).__name__}); step "
            "the optimizers of self.optimizers() and not their .optimizer, and call super() in "
            "overridden hooks"
        )
        rule = "on_before_optimizer_step must be called for every update"
        for capability in capabilities:
            if capability.needs_step_hook:
                raise RuntimeError(f"{rule} with {capability!r}, {cause}, or remove the callback")
        # Lightning counts the updates of automatic optimization in any case.
        if not trainer.lightning_module.automatic_optimization and self._counts_updates():
            raise RuntimeError(
                f"{rule} with a schedule over a budget in steps such as max_steps, because "
                f"Lightning counts the update there, {cause}, or use max_epochs instead"
            )
        if capabilities and not self._has_warned:
            names = ", ".join(map(repr, capabilities))
            rank_zero_warn(f"{names} does not see every update: {rule}, {cause}.")
        self._has_warned = True

    def end_epoch(self, capabilities: Sequence[_OnUpdates]) -> None:
        """Warns, once, about optimizers that have made no update with a gradient.

        Args:
            capabilities: The capabilities that act on updates.
        """
        if self._is_over or not self._windows or not capabilities:
            return
        self._is_over = True
        by_rank = sorted(capabilities, key=lambda capability: capability.rank)
        names = ", ".join(dict.fromkeys(type(capability).__name__ for capability in by_rank))
        for label, optimizer in self._optimizers:
            if id(optimizer) in self._reached:
                continue
            name = label or type(optimizer).__name__
            if id(optimizer) in self._called and _is_frozen(optimizer):
                found = (
                    "frozen parameters only (requires_grad=False), which have no gradients; set "
                    "requires_grad=True"
                )
            elif id(optimizer) in self._called:
                found = (
                    "gradients that are None before every step; an optimizer that steps in the "
                    "hooks of the backward pass, or gradients that were cleared, leave none: step "
                    "after the backward pass"
                )
            elif self._has_warned:
                continue
            else:
                found = (
                    "no step through Lightning; call step() of self.optimizers(), not "
                    "first_step(), second_step() or the step of the optimizer inside"
                )
            rank_zero_warn(
                f"{names} must get the gradients of {name}, got {found}, or remove the "
                f"callbacks, which have had no effect on {name} so far"
            )


def _is_frozen(optimizer: Optimizer) -> bool:
    """Returns whether no parameter of an optimizer requires a gradient."""
    return not any(p.requires_grad for group in optimizer.param_groups for p in group["params"])
