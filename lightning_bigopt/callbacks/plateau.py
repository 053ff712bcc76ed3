"""ReduceOnPlateau: reduces the learning rate when a metric stops improving."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import (
    as_code,
    check_between,
    check_choice,
    check_count,
    check_non_negative,
    shown,
)
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import LEARNING_RATE, Fit
from lightning_bigopt.type_checks import check_instance

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["ReduceOnPlateau"]

Mode: TypeAlias = Literal["min", "max"]
ThresholdMode: TypeAlias = Literal["rel", "abs"]
Check: TypeAlias = Literal["validation", "train_epoch"]


@explain_arguments
class ReduceOnPlateau(Capability):
    """Multiplies the learning rate by ``factor`` when a metric stops improving.

    The factor multiplies the schedule of the LearningRateScheduler, including its warm-up. The
    metric is checked after every validation, also within an epoch; ``check="train_epoch"`` checks a
    training metric at the end of every epoch.

    Args:
        monitor: Name of a logged metric.
        factor: Factor on the learning rate at each reduction, in (0, 1).
        patience: Number of checks without improvement before a reduction.
        mode: ``"min"`` if lower values are better, ``"max"`` if higher values are.
        threshold: Smallest change that counts as an improvement.
        threshold_mode: ``"rel"`` if the threshold is relative to the best value, or ``"abs"``.
        cooldown: Number of checks after a reduction that are not counted.
        min_factor: Lower bound of the product of all reductions, in [0, 1).
        check: ``"validation"`` or ``"train_epoch"``.

    Raises:
        ValueError: At fit start without a LearningRateScheduler; at the first check if ``monitor``
            is not logged.

    State:
        ``factor``: product of all reductions; ``best``: best value; ``bad_checks``: checks without
        improvement; ``cooldown``: remaining checks that are not counted.

    Example:
        >>> from lightning_bigopt import ReduceOnPlateau
        >>> ReduceOnPlateau("val_loss", factor=0.5, patience=3).factor
        1.0

    References:
        ``torch.optim.lr_scheduler.ReduceLROnPlateau``, which implements the checks.
    """

    owns = "plateau"
    rank = 21
    needs_samples = None

    def __init__(
        self,
        monitor: str,
        *,
        factor: float = 0.1,
        patience: int = 10,
        mode: Mode = "min",
        threshold: float = 1e-4,
        threshold_mode: ThresholdMode = "rel",
        cooldown: int = 0,
        min_factor: float = 0.0,
        check: Check = "validation",
    ) -> None:
        check_instance("monitor", monitor, str, hint="write the name of a logged metric")
        check_between("factor", factor, 0, 1)
        check_non_negative("threshold", threshold, hint="write 1e-4")
        check_between("min_factor", min_factor, 0, 1, ends="[)")
        check_count("patience", patience, minimum=0, of="checks")
        check_count("cooldown", cooldown, minimum=0, of="checks")
        check_choice("mode", mode, Mode)
        check_choice("threshold_mode", threshold_mode, ThresholdMode)
        check_choice("check", check, Check)
        self.monitor = monitor
        self.check = check
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
        """Resets the factor to 1 and clears the history of the metric."""
        # torch's scheduler reduces the learning rate 1 of an optimizer that is never stepped: this
        # learning rate is the factor, and min_lr is its lower bound.
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        self._plateau = ReduceLROnPlateau(optimizer, **self._options)
        self._checks: int | None = None  # checks in this fit; None outside a fit that can check

    @property
    def factor(self) -> float:
        """The current factor on the learning rate: the product of all reductions."""
        return float(self._plateau.optimizer.param_groups[0]["lr"])

    def check_fit(self, fit: Fit) -> None:
        """Raises if no callback schedules the learning rate."""
        if LEARNING_RATE not in fit.owners():
            raise ValueError(
                "callbacks must contain a LearningRateScheduler with ReduceOnPlateau, got none; "
                "add LearningRateScheduler(Constant())"
            )

    def start(self, fit: Fit) -> None:
        """Adds the factor to the adjustments of the learning rate."""
        fit.groups.adjust("lr", lambda value, _: value * self.factor, owner=self, is_planned=False)
        self._checks = 0
        if self.check == "validation" and not fit.trainer.enable_validation:
            self._checks = None
            rank_zero_warn(
                f"ReduceOnPlateau({self.monitor!r}) will never reduce the learning rate, because "
                "this fit has no validation; pass a validation loader and define validation_step, "
                "or pass check='train_epoch' to check a metric of the training"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if the metric was never checked."""
        if self._checks == 0:
            rank_zero_warn(
                f"ReduceOnPlateau({self.monitor!r}) has never checked its metric: this fit ended "
                "before the first check; validate more often (val_check_interval, "
                "check_val_every_n_epoch)"
            )

    def end_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        """Checks the metric after a validation."""
        if self.check == "validation" and not trainer.sanity_checking:
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the metric at the end of an epoch."""
        if self.check == "train_epoch":
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        """Reads the metric, and reduces the learning rate if it has not improved.

        Raises:
            ValueError: If the metric is not logged.
        """
        if self.fit is None:  # Trainer.validate
            return
        self._checks = (self._checks or 0) + 1
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(
                f"monitor must be a logged metric, got {shown(self.monitor)}; logged are "
                f"{', '.join(sorted(metrics)) or 'none'}"
            )
        # A metric logged without sync_dist differs between processes; the mean keeps the learning
        # rate equal on all of them.
        metric = metrics[self.monitor].detach().float()
        value = float(trainer.strategy.reduce(metric, reduce_op="mean"))
        before = self.factor
        if not math.isfinite(value):  # a NaN as the best value could never be improved on
            return
        self._plateau.step(value)
        if self.factor != before:
            rank_zero_info(
                f"{self.monitor} has not improved on {float(self._plateau.best):g}: the scheduled "
                f"learning rate is now multiplied by {self.factor:g}."
            )
            self.fit.rewrite_groups()

    def settings_as_code(self) -> dict[str, str]:
        """Returns all arguments."""
        options = {"monitor": self.monitor, "check": self.check, **self._options}
        return {name: as_code(value) for name, value in options.items()}

    def saved_state(self) -> dict[str, Any]:
        """Returns the factor, the best value and the counters."""
        plateau = self._plateau
        return {
            "factor": self.factor,
            "best": float(plateau.best),
            "bad_checks": plateau.num_bad_epochs,
            "cooldown": plateau.cooldown_counter,
        }

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the factor, the best value and the counters from a checkpoint."""
        self._plateau.optimizer.param_groups[0]["lr"] = float(state["factor"])
        self._plateau.best = float(state["best"])
        self._plateau.num_bad_epochs = int(state["bad_checks"])
        self._plateau.cooldown_counter = int(state["cooldown"])
