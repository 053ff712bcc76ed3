"""HyperparameterScheduleMixin: a LightningModule that defines schedules of hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_bigopt.callbacks.hyperparameter import HyperparameterScheduler
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.mixins.base import OwnedCallbackMixin
from lightning_bigopt.schedules.base import Schedule

__all__ = ["HyperparameterScheduleMixin"]


class HyperparameterScheduleMixin(OwnedCallbackMixin):
    """A mixin for a LightningModule that defines schedules of its optimizer's hyperparameters.

    List it before LightningModule among the base classes. The module returns the schedules from
    :meth:`configure_hyperparameter_schedules`; the mixin adds a :class:`HyperparameterScheduler`
    for each.

    Raises:
        TypeError: If it is listed after LightningModule.
        ValueError: If the Trainer holds a HyperparameterScheduler too.

    Example:
        >>> import lightning as L
        >>> from lightning_bigopt import HyperparameterScheduleMixin, Linear
        >>> class Model(HyperparameterScheduleMixin, L.LightningModule):
        ...     def configure_hyperparameter_schedules(self):
        ...         return {"weight_decay": Linear(start=1.0, end=0.0)}
        >>> Model().configure_hyperparameter_schedules()
        {'weight_decay': Linear(start=1.0, end=0.0)}
    """

    owns = (HyperparameterScheduler, "configure_hyperparameter_schedules")

    def configure_hyperparameter_schedules(
        self,
    ) -> Mapping[str, Schedule] | Sequence[HyperparameterScheduler]:
        """Returns a schedule for each field of the parameter groups, or the callbacks."""
        raise TypeError(
            f"{type(self).__name__} must define configure_hyperparameter_schedules, got "
            "HyperparameterScheduleMixin without it; return a dict such as "
            '{"weight_decay": Linear(end=0.0)}'
        )

    def _make_callbacks(self, kind: type[Any], value: Any) -> list[Capability]:
        if kind is not HyperparameterScheduler:
            return super()._make_callbacks(kind, value)
        if isinstance(value, Mapping):
            return [HyperparameterScheduler(*item) for item in value.items()]
        return [value] if isinstance(value, HyperparameterScheduler) else list(value)
