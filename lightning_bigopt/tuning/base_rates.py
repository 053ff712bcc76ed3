"""Scales the base learning rates of all parameter groups together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine.lr_scheduler import LightningLRScheduler
from lightning_bigopt.optimizers.group_field import GroupField
from lightning_bigopt.optimizers.group_schedule import GroupSchedule
from lightning_bigopt.optimizers.names import unwrapped

__all__ = ["BaseRates"]


class BaseRates:
    """Sets the learning rates of all parameter groups and keeps their ratios.

    Args:
        trainer: The Trainer, from ``on_fit_start`` on.

    Attributes:
        reference: The first non-zero base learning rate; all rates are scaled relative to it.
    """

    def __init__(self, trainer: Trainer) -> None:
        optimizers = [unwrapped(optimizer) for optimizer in trainer.optimizers]
        self._groups = GroupSchedule([("", optimizer) for optimizer in optimizers])
        self._groups.claim("lr")
        for index, optimizer in enumerate(optimizers):
            # A torch scheduler may already have multiplied "lr" by its first factor.
            bases = [
                float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups
            ]
            self._groups.set_bases("lr", index, bases)
        bases = [base for bases in self._groups.bases("lr") for base in bases]
        self.reference = next((base for base in bases if base), 1.0)
        self._rate = self.reference
        self._groups.adjust("lr", lambda base, _: self._scaled(base), owner=self)

    def _scaled(self, base: float) -> float:
        return self._rate * (float(base) / self.reference)

    def write(self, rate: float) -> None:
        """Writes the learning rate of the reference group, and scales the others with it."""
        self._rate = rate
        self._groups.write(Progress(fraction=0.0))

    def use_in_next_fit(self, rate: float, trainer: Trainer, module: LightningModule) -> None:
        """Does :meth:`use` in a fit that ends now, and warns if the next fit will not notice it.

        The next fit makes new optimizers, from the attributes of the module.
        """
        if not self.use(rate, trainer, module):
            rank_zero_warn(
                "on_result='use' needs an attribute or hyperparameter lr or learning_rate of the "
                f"module that equals its learning rate, {self.reference:.3g}, and found none: the "
                f"learning rate is not changed. Multiply it by {rate / self.reference:.3g}."
            )

    def use(self, rate: float, trainer: Trainer, module: LightningModule) -> bool:
        """Makes ``rate`` the base learning rate of optimizers, schedulers and module.

        Args:
            rate: The new base of the reference group; other bases are scaled with it.
            trainer: The Trainer with its schedulers.
            module: Its attributes and hyperparameters ``lr`` and ``learning_rate`` are replaced if
                they equal the old base.

        Returns:
            Whether an attribute or a hyperparameter of the module was replaced.
        """
        self._rate, is_replaced = rate, False
        for _, optimizer in self._groups:
            for group in optimizer.param_groups:
                for key in ("lr", "initial_lr", "max_lr", "min_lr"):
                    if key in group:
                        GroupField(key).write(group, self._scaled(group[key]))
        for config in trainer.lr_scheduler_configs:
            _scale_bases(config.scheduler, self._scaled)
        for name in ("lr", "learning_rate"):
            if vars(module).get(name) == self.reference:
                setattr(module, name, rate)
                is_replaced = True
            if module.hparams.get(name) == self.reference:
                module.hparams[name] = rate
                is_replaced = True
        return is_replaced


def _scale_bases(scheduler: Any, scaled: Callable[[float], float]) -> None:
    if isinstance(scheduler, LightningLRScheduler):
        scheduler.set_bases([scaled(base) for base in scheduler.bases])
        return
    for name in ("base_lrs", "max_lrs"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [scaled(base) for base in getattr(scheduler, name)])
    for part in getattr(scheduler, "_schedulers", ()):  # SequentialLR and ChainedScheduler
        _scale_bases(part, scaled)
