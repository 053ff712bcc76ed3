"""Whether the hooks of a batch reach us at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["HookCheck"]


class HookCheck:
    """Refuses a fit in which an overridden hook keeps updates, or the ends of batches, from us.

    Gradients would not be clipped, and learning rates would stand still, without a word.

    Attributes:
        is_over: Whether both have been heard once, after which nothing is asked any more.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._steps_at_start = trainer.global_step
        self._update_heard = self._end_heard = False
        self.is_over = False

    def hear_update(self, trainer: Trainer) -> None:
        """``on_before_optimizer_step`` has come.

        Raises:
            RuntimeError: If it is that of a second update, and the first one's batch never ended.
        """
        self._update_heard = True
        is_automatic = trainer.lightning_module.automatic_optimization
        if not self._end_heard and is_automatic and trainer.global_step > self._steps_at_start:
            raise RuntimeError(
                "on_train_batch_end must reach the callbacks, got a second update without it: an "
                "overridden hook swallowed it; call super() in the hook"
            )
        self.is_over = self._end_heard

    def hear_end(self, trainer: Trainer) -> None:
        """``on_train_batch_end`` has come.

        Raises:
            RuntimeError: If an update was made that we never heard of.
        """
        self._end_heard = True
        if not self._update_heard and trainer.global_step > self._steps_at_start:
            raise RuntimeError(
                "on_before_optimizer_step must reach the callbacks, got an update without it: the "
                f"{type(trainer.strategy).__name__} or an overridden hook swallowed it; call "
                "super() in the hook, or remove the callbacks of lightning_bigopt"
            )
        self.is_over = self._update_heard
