"""Detects steps of an optimizer for which Lightning has not called its hook before the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_bigopt.optimizers.names import unwrapped

__all__ = ["StepDetector"]


class StepDetector:
    """Detects steps that were not announced, by a post-step hook of torch.

    Lightning calls ``on_before_optimizer_step`` in ``LightningOptimizer.step``. A module that calls
    the ``step`` of the torch optimizer makes updates that are neither measured nor clipped.

    Args:
        is_watched: Returns False while steps are not those of the run.

    Attributes:
        unannounced: An optimizer that has stepped without an announcement since the last
            :meth:`clear`; None if there is none.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> detector = StepDetector()
        >>> detector.watch([optimizer])
        >>> detector.announce(optimizer)
        >>> optimizer.step()
        >>> detector.unannounced is None
        True
        >>> detector.clear()
        >>> optimizer.step()
        >>> detector.unannounced is optimizer
        True
    """

    def __init__(self, *, is_watched: Callable[[], bool] = lambda: True) -> None:
        self._is_watched = is_watched
        self.unannounced: Optimizer | None = None
        self._announced: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def watch(self, optimizers: Sequence[Optimizer]) -> None:
        """Detects the steps of these optimizers, instead of those before.

        Args:
            optimizers: The optimizers, without Lightning's wrapper.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for optimizer in optimizers:
            # An optimizer that does not call Optimizer.__init__ may have no hooks, or a plain dict.
            with suppress(AttributeError, TypeError):
                self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if id(optimizer) not in self._announced and self._is_watched():
            self.unannounced = optimizer

    def announce(self, optimizer: Optimizer) -> None:
        """Notes that an optimizer will step."""
        self._announced.add(id(unwrapped(optimizer)))

    def clear(self) -> None:
        """Forgets announcements and steps."""
        self._announced.clear()
        self.unannounced = None
