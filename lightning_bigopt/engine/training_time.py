"""The time of training, measured on process 0, for budgets such as ``"2 hours"``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lightning_bigopt.trainer_access import loop

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["TrainingTime"]


class TrainingTime:
    """Measures the seconds of training; all processes read the same value.

    Lightning's Timer is not read: its elapsed time is wrong in the second fit of a Trainer, and
    before its own ``on_train_start``.

    Attributes:
        seconds: The value of the last :meth:`read`.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._before = 0.0  # seconds before the measurement started
        self._started: float | None = None

    def start_fit(self, trainer: Trainer, restored: dict[str, Any] | None, *, keep: bool) -> None:
        """Starts the measurement.

        Args:
            trainer: The Trainer.
            restored: The state of the clock in a checkpoint; None if there is none.
            keep: Whether the time of an earlier fit of this Trainer counts, as for a ``budget``.
                Lightning's ``max_time`` allows each fit its whole duration.
        """
        if restored is not None and "seconds" in restored:
            self._before = float(restored["seconds"])
        elif trainer.ckpt_path is not None:  # of a run without this package, or another budget
            self._before = loop.timer_seconds(trainer)
        elif not keep:
            self._before = 0.0
        self.seconds, self._started = self._before, time.monotonic()

    def stop(self) -> None:
        """Stops the measurement; the time is kept."""
        self._before, self._started = self.now(), None

    def now(self) -> float:
        """Returns the time on this process."""
        return self._before + (0.0 if self._started is None else time.monotonic() - self._started)

    def read(self, trainer: Trainer) -> None:
        """Sets :attr:`seconds` to the time on process 0. A collective operation."""
        # Processes that read their own clocks would train with different learning rates.
        self.seconds = float(trainer.strategy.broadcast(self.now()))

    def __getstate__(self) -> dict[str, float | None]:
        # A monotonic time has no meaning in another process.
        return {"seconds": self.seconds, "_before": self.now(), "_started": None}
