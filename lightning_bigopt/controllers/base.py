"""What a controller is: hooks that the pipeline calls, each at most once an event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lightning_bigopt.clock import ClockSettings
from lightning_bigopt.durations import Progress

if TYPE_CHECKING:
    from lightning_bigopt.pipeline import OptimizerStep, Pipeline

__all__ = ["Controller"]


class Controller:
    """One capability of one Trainer. Every hook is optional.

    The pipeline calls the hooks in the order of ``rank``, whatever the order of the user's
    callbacks. A controller keeps no reference to Trainer, module or pipeline: these arrive as
    arguments, so that a controller can be copied and outlives a fit.

    Attributes:
        role: What it owns; two controllers of one role in a fit raise.
        rank: Its place among the controllers, lower first.
        settings: What it asks of the Trainer's one clock.
        needs_horizon: Whether it cannot work where the length of the run is unknown.
        hears_of_batches: Whether its ``on_batch_start`` is needed on every batch, or only on the
            first of an epoch.
    """

    role: ClassVar[str]
    rank: ClassVar[int]
    settings: ClockSettings = ClockSettings()
    needs_horizon: bool = False
    hears_of_batches: bool = True

    def on_fit_start(self, pipeline: Pipeline) -> None:
        """Refuses conflicts; the horizon and restored state are not known yet."""

    def on_train_start(self, pipeline: Pipeline) -> None:
        """Everything is restored and the horizon is known."""

    def on_epoch_start(self, pipeline: Pipeline) -> None:
        """An epoch begins."""

    def on_batch_start(self, pipeline: Pipeline, batch: Any, index: int) -> None:
        """A batch is about to be trained; ``pipeline.progress`` is that of its update."""

    def on_new_parameters(self, pipeline: Pipeline) -> None:
        """An optimizer is about to make its first update, or its groups have changed."""

    def on_loss(self, pipeline: Pipeline, loss: Tensor) -> None:
        """A micro-batch's loss, 0-d, as the training step returned it; before its backward."""

    def learning_rate_factor(self, progress: Progress) -> float:
        """What it multiplies every learning rate by for the update that starts at ``progress``."""
        return 1.0

    def rescale(self, step: OptimizerStep) -> None:
        """Makes the gradient the mean over what is really in the window."""

    def wants_norms(self, step: OptimizerStep) -> bool:
        """Whether it will read ``step.norms``; the same answer on every process."""
        return False

    def decide(self, step: OptimizerStep) -> None:
        """Accepts the update or refuses it, the same on every process."""

    def on_rejection(self, pipeline: Pipeline, why: str) -> None:
        """The guard objects to the update under way; ``why`` says it in words."""

    def clip(self, step: OptimizerStep) -> None:
        """Limits the gradient of an accepted update."""

    def observe(self, step: OptimizerStep) -> None:
        """Reads what the update will use."""

    def on_batch_end(self, pipeline: Pipeline, outputs: Any, batch: Any) -> None:
        """A batch has been trained."""

    def metrics(self, pipeline: Pipeline) -> Mapping[str, float | Tensor]:
        """What it adds to a logged update, by tag (``reporting.tags.TAGS``); no host sync."""
        return {}

    def on_epoch_end(self, pipeline: Pipeline) -> None:
        """An epoch has ended."""

    def on_fit_end(self, pipeline: Pipeline) -> None:
        """The fit ended, well or not: undo every patch."""

    def reset(self) -> None:
        """Forgets a former Trainer's run."""

    def state_dict(self) -> dict[str, Any]:
        """What evolves, as plain numbers, strings and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
