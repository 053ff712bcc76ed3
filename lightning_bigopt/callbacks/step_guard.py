"""StepGuard."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bigopt.callbacks.base import OptimizationCallback
from lightning_bigopt.controllers.forensics import RejectedUpdate
from lightning_bigopt.controllers.guard import StepGuardController
from lightning_bigopt.gradients import Action, Detector

__all__ = ["StepGuard"]


class StepGuard(OptimizationCallback):
    """Refuses updates that would do harm, before they are made and on every process alike.

    A skipped update leaves parameters, moments, step counters and weight decay as they are, to
    the bit. ``global_step``, the learning-rate schedule and the clock go on: its data is consumed.
    Under 16-mixed a GradScaler's overflow is its ordinary work: it skips the update and lowers its
    scale, and the guard neither counts nor remembers it.

    Costs one transfer to the host an update, which the adaptive clipping rules share, and with
    several processes one all-reduce of four numbers at most.

    Args:
        detectors: What an update is rejected for; None for ``[NonFinite(), NormSpike()]``.
        actions: What is done then; None for ``[Skip()]``. Where there is no
            :class:`~lightning_bigopt.gradients.ClipToMedian`, the update is skipped in any case.
        max_consecutive: After so many rejections in a row the run ends, before the update, with
            an error that names the checkpoint written last before the first of them.
        forensics: A folder to which every process writes the batches and the random state of a
            rejected update, of 20 at most, for :func:`~lightning_bigopt.replay`; None to write
            nothing. The micro-batches of a window stay in memory until its update then.

    Logs:
        With an OptimizationMonitor ``guard/skipped``, ``guard/rejected/<detector>``, and to
        TensorBoard as text why each update was rejected.

    Raises:
        ValueError: At fit start with DeepSpeed, with LBFGS, with an optimizer of Opacus, and for
            a :class:`~lightning_bigopt.gradients.Backoff` without a LearningRateScheduler.
        RuntimeError: After ``max_consecutive`` rejections in a row.

    State:
        ``clock``: what has been consumed; ``guarded``: for each optimizer what its detectors have
        seen, rejections in all, by detector and in a row; ``backoffs``: the factors on the
        learning rate.

    Example:
        >>> from lightning_bigopt import LossSpike, NonFinite, NormSpike, StepGuard
        >>> StepGuard()
        StepGuard([NonFinite(), NormSpike(...)])
        >>> guard = StepGuard([NonFinite(), LossSpike(threshold=10.0)], max_consecutive=5)
        >>> list(guard.rejections)
        []
    """

    controller: StepGuardController

    def __init__(
        self,
        detectors: Sequence[Detector] | None = None,
        *,
        actions: Sequence[Action] | None = None,
        max_consecutive: int = 10,
        forensics: str | None = None,
    ) -> None:
        super().__init__(
            StepGuardController(
                detectors, actions=actions, max_consecutive=max_consecutive, forensics=forensics
            )
        )

    @property
    def rejections(self) -> tuple[RejectedUpdate, ...]:
        """The last rejected updates, 100 at most, oldest first."""
        return tuple(self.controller.rejections)

    def __repr__(self) -> str:
        names = [
            type(d).__name__ + ("(...)" if getattr(d, "__dataclass_fields__", {}) else "()")
            for d in self.controller.detectors
        ]
        return f"StepGuard([{', '.join(names)}])"
