"""Amounts of data: those of one batch, and those of a run."""

from __future__ import annotations

from operator import sub
from typing import Literal, NamedTuple, TypeAlias

__all__ = ["BatchAmounts", "NeedsSamples", "RunAmounts"]

NeedsSamples: TypeAlias = Literal["required", "optional"] | None
"""Whether the samples of every batch must be counted, are counted if possible, or not at all."""


class BatchAmounts(NamedTuple):
    """The amounts that one loader batch consumes.

    Attributes:
        samples: Samples over all processes, with those left out; 0 if they are not counted.
        tokens: Tokens over all processes; 0 if they are not counted.
        batches: Loader batches of one process.
        left_out: Samples of the epoch after the batch that are not trained.
    """

    samples: int
    tokens: int = 0
    batches: int = 1
    left_out: int = 0


class RunAmounts(NamedTuple):
    """The amounts that a run has consumed.

    Attributes:
        steps: Optimizer updates.
        batches: Loader batches of one process.
        samples: Samples over all processes, with those left out.
        tokens: Tokens over all processes.
        epochs: Epochs that have ended.
        epoch_done: Amount of the current epoch, in the unit of :class:`EpochPosition`.
        seconds: Time of training; 0 if the budget is no time.
        left_out: Samples that were left out and not trained, since the clock was created.
    """

    steps: int = 0
    batches: int = 0
    samples: int = 0
    tokens: int = 0
    epochs: int = 0
    epoch_done: int = 0
    seconds: float = 0.0
    left_out: int = 0

    @property
    def trained_samples(self) -> int:
        """Samples without those left out; for the difference of two amounts."""
        return self.samples - self.left_out

    def since(self, earlier: RunAmounts) -> RunAmounts:
        """Returns the amounts consumed after ``earlier``."""
        return RunAmounts(*map(sub, self, earlier))

    def reach_limit(self, epochs: float | None, fraction: float) -> bool:
        """Returns whether these amounts reach a limit of the run.

        Args:
            epochs: The limit in epochs; None for a limit in another unit.
            fraction: The consumed fraction of the limit.
        """
        # Whole epochs end with an epoch, whose length is known only then.
        if epochs is not None and float(epochs).is_integer():
            return self.epochs >= epochs
        return fraction >= 1.0
