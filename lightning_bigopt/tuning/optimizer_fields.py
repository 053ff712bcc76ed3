"""Sets fields of the parameter groups of a trial's optimizers before it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from lightning_bigopt.trainer_access import schedulers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["OptimizerFields", "group_fields"]


class OptimizerFields(Callback):
    """Sets fields of all parameter groups when a fit starts.

    A number is the value of the first group in which the field is not zero; the other groups keep
    their ratios to it, and those with zero keep zero. Another value, such as ``betas``, is set in
    every group that has the field.

    Args:
        fields: The new values by field.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = dict(fields)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the values.

        Raises:
            ValueError: If no group has the field, or a scheduler of the module has read ``lr``.
        """
        if "lr" in self.fields and trainer.lr_scheduler_configs:
            raise ValueError(
                "lr must be an argument of make_module with a scheduler of the module, got "
                f"{schedulers.scheduler_names(trainer)}, which has read the old value; write "
                "def make_module(lr)"
            )
        groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups]
        for field, value in self.fields.items():
            _write(groups, field, value)


def group_fields(module: LightningModule) -> list[str] | None:
    """Returns the fields of the parameter groups that a module's optimizers have.

    Args:
        module: The module; its ``configure_optimizers`` is called.

    Returns:
        The fields; None if the optimizers cannot be made without a Trainer.
    """
    try:
        made: Any = module.configure_optimizers()
    except RuntimeError:  # such as "... is not attached to a Trainer"
        return None
    found: dict[str, None] = {}
    for optimizer in _optimizers(made):
        for group in optimizer.param_groups:
            found |= dict.fromkeys(name for name in group if name not in ("params", "name"))
    return list(found)


def _optimizers(made: Any) -> list[Any]:
    if isinstance(made, Mapping):
        return _optimizers(made["optimizer"])
    if isinstance(made, (list, tuple)):
        return [optimizer for each in made for optimizer in _optimizers(each)]
    return [made] if hasattr(made, "param_groups") else []


def _write(groups: list[dict[str, Any]], field: str, value: Any) -> None:
    having = [group for group in groups if field in group]
    if not having:
        known = sorted({name for group in groups for name in group if name != "params"})
        raise ValueError(
            f"space must contain fields of the parameter groups, got {'optimizer.' + field!r}; the "
            f"groups have {', '.join(known)}"
        )
    old = [group[field] for group in having]
    if isinstance(value, (int, float)) and all(isinstance(each, (int, float)) for each in old):
        reference = next((each for each in old if each), None)
        for group in having:
            if reference is None or group[field] == reference:
                group[field] = value
            else:
                group[field] = group[field] * value / reference
        return
    for group in having:
        group[field] = value
