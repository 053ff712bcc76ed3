"""ReduceOnPlateau."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lightning_bigopt.callbacks.base import OptimizationCallback
from lightning_bigopt.controllers.plateau import PlateauController

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["ReduceOnPlateau"]


class ReduceOnPlateau(OptimizationCallback):
    """Multiplies the learning rate by ``factor`` when a metric stops improving.

    A multiplier on top of any schedule of a LearningRateScheduler, warm-up included. The metric is
    looked at after every validation, in mid-epoch too; ``check="train_epoch"`` looks at a training
    metric when an epoch ends.

    Args:
        monitor: The name of a logged metric.
        factor: What the learning rate is multiplied by each time, between 0 and 1.
        patience: Checks without improvement that are tolerated.
        mode: ``"min"`` where less is better, ``"max"`` where more is.
        threshold: How much better counts as better.
        threshold_mode: ``"rel"`` to the best value, or ``"abs"``.
        cooldown: Checks after a reduction that are not counted.
        min_factor: The least product of all reductions.
        check: ``"validation"`` or ``"train_epoch"``.

    Raises:
        ValueError: At fit start without a LearningRateScheduler; at the first check where nothing
            logs ``monitor``.

    State:
        ``clock``; ``factor``, ``best``, ``bad_checks``, ``cooldown``.

    Example:
        >>> from lightning_bigopt import ReduceOnPlateau
        >>> ReduceOnPlateau("val_loss", factor=0.5, patience=3).controller.factor
        1.0

    References:
        ``torch.optim.lr_scheduler.ReduceLROnPlateau``, which does the counting.
    """

    controller: PlateauController

    def __init__(
        self,
        monitor: str,
        *,
        factor: float = 0.1,
        patience: int = 10,
        mode: Literal["min", "max"] = "min",
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_factor: float = 0.0,
        check: Literal["validation", "train_epoch"] = "validation",
    ) -> None:
        if check not in ("validation", "train_epoch"):
            raise ValueError(f"check must be 'validation' or 'train_epoch', got {check!r}")
        self.check = check
        super().__init__(
            PlateauController(
                monitor,
                factor=factor,
                patience=patience,
                mode=mode,
                threshold=threshold,
                threshold_mode=threshold_mode,
                cooldown=cooldown,
                min_factor=min_factor,
            )
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation has just logged its metrics."""
        if self.check == "validation" and not trainer.sanity_checking:
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch has ended."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.check == "train_epoch":
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        if self._pipeline is not None and self._pipeline.fitting:
            self.controller.check(self._pipeline)
