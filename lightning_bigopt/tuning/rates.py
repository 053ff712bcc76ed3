"""The learning rates of a fit: all groups' bases, scaled together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_bigopt.controllers.learning_rate import ScheduledLearningRate
from lightning_bigopt.optimizers import GroupField

__all__ = ["BaseRates"]

_RATE = GroupField("lr")


class BaseRates:
    """The parameter groups of a fit, their base rates and ratios."""

    def __init__(self, trainer: Trainer) -> None:
        raw = [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]
        self.groups = [group for optimizer in raw for group in optimizer.param_groups]
        # A scheduler of torch's may have lowered "lr" for its warm-up already.
        self.bases = [float(group.get("initial_lr", group["lr"])) for group in self.groups]
        self.reference = next((base for base in self.bases if base), 1.0)

    def write(self, rate: float) -> None:
        """Gives the first group ``rate`` and the others their share of it."""
        for group, base in zip(self.groups, self.bases, strict=True):
            _RATE.write(group, rate * (base / self.reference))

    def use(self, rate: float, trainer: Trainer, module: LightningModule) -> None:
        """Makes ``rate`` the base of optimizers, schedulers and module."""

        def scaled(value: float) -> float:
            return rate * (float(value) / self.reference)

        for group in self.groups:
            for key in ("lr", "initial_lr", "max_lr", "min_lr"):
                if key in group:
                    GroupField(key).write(group, scaled(group[key]))
        for config in trainer.lr_scheduler_configs:
            _rebase(config.scheduler, scaled)
        for name in ("lr", "learning_rate"):
            if vars(module).get(name) == self.reference:
                setattr(module, name, rate)
            if module.hparams.get(name) == self.reference:
                module.hparams[name] = rate


def _rebase(scheduler: Any, scaled: Callable[[float], float]) -> None:
    if isinstance(scheduler, ScheduledLearningRate):
        scheduler.bases = [scaled(base) for base in scheduler.bases]
        return
    for name in ("base_lrs", "max_lrs"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [scaled(base) for base in getattr(scheduler, name)])
    for part in getattr(scheduler, "_schedulers", ()):
        _rebase(part, scaled)
