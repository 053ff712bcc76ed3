"""A metric that stops improving reduces the learning rate, on top of any schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.controllers.learning_rate import LearningRateController
from lightning_bigopt.durations import Progress

if TYPE_CHECKING:
    from lightning_bigopt.pipeline import Pipeline

__all__ = ["Mode", "PlateauController", "ThresholdMode"]

Mode: TypeAlias = Literal["min", "max"]
ThresholdMode: TypeAlias = Literal["rel", "abs"]


class PlateauController(Controller):
    """torch's own ReduceLROnPlateau, on a learning rate of 1 that is used as a factor."""

    role = "plateau"
    rank = 21

    def __init__(
        self,
        monitor: str,
        *,
        factor: float,
        patience: int,
        mode: Mode,
        threshold: float,
        threshold_mode: ThresholdMode,
        cooldown: int,
        min_factor: float,
    ) -> None:
        if not 0.0 < factor < 1.0:
            raise ValueError(f"factor must be between 0 and 1, got {factor!r}")
        if not 0.0 <= min_factor < 1.0:
            raise ValueError(f"min_factor must be at least 0 and below 1, got {min_factor!r}")
        for name, count in (("patience", patience), ("cooldown", cooldown)):
            if type(count) is not int or count < 0:
                raise ValueError(f"{name} must be a non-negative number of checks, got {count!r}")
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        if threshold_mode not in get_args(ThresholdMode):
            raise ValueError(f"threshold_mode must be 'rel' or 'abs', got {threshold_mode!r}")
        self.monitor = monitor
        self._options: dict[str, Any] = {
            "mode": mode,
            "factor": factor,
            "patience": patience,
            "threshold": threshold,
            "threshold_mode": threshold_mode,
            "cooldown": cooldown,
            "min_lr": min_factor,
            "eps": 0.0,
        }
        self.reset()

    def reset(self) -> None:
        """A factor of 1, and nothing seen."""
        carrier = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        self._plateau = ReduceLROnPlateau(carrier, **self._options)

    @property
    def factor(self) -> float:
        """What the learning rate is multiplied by now."""
        return float(self._plateau.optimizer.param_groups[0]["lr"])

    def on_fit_start(self, pipeline: Pipeline) -> None:
        """A factor needs something to multiply."""
        if pipeline.find(LearningRateController) is None:
            raise ValueError(
                "callbacks must hold a LearningRateScheduler with ReduceOnPlateau, got none; add "
                "LearningRateScheduler(Constant())"
            )

    def learning_rate_factor(self, progress: Progress) -> float:
        """The product of all reductions so far."""
        return self.factor

    def check(self, pipeline: Pipeline) -> None:
        """Looks at the monitored metric, which has just been computed.

        Raises:
            ValueError: If nothing logs the metric.
        """
        metrics = pipeline.trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(
                f"monitor must be a logged metric, got {self.monitor!r}; logged are "
                f"{', '.join(sorted(metrics)) or 'none'}"
            )
        # One verdict: a metric that was not reduced differs from process to process.
        found = metrics[self.monitor].detach().float()
        value = float(pipeline.trainer.strategy.reduce(found, reduce_op="mean"))
        before = self.factor
        if not math.isfinite(value):  # enters no state
            return
        self._plateau.step(value)
        if self.factor != before:
            rank_zero_info(
                f"{self.monitor} has not improved on {float(self._plateau.best):g}: the learning "
                f"rate is multiplied by {self.factor:g} from here on."
            )
            LearningRateController.rewrite(pipeline)

    def state_dict(self) -> dict[str, Any]:
        """The factor, the best value and the counters."""
        plateau = self._plateau
        return {
            "factor": self.factor,
            "best": float(plateau.best),
            "bad_checks": plateau.num_bad_epochs,
            "cooldown": plateau.cooldown_counter,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self._plateau.optimizer.param_groups[0]["lr"] = float(state["factor"])
        self._plateau.best = float(state["best"])
        self._plateau.num_bad_epochs = int(state["bad_checks"])
        self._plateau.cooldown_counter = int(state["cooldown"])
