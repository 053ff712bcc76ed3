"""Parameter groups, scheduled fields of parameter groups, and schedules as torch schedulers."""

from lightning_bigopt.optimizers.group_field import GroupField
from lightning_bigopt.optimizers.groups import parameter_groups
from lightning_bigopt.optimizers.lr_scheduler import ScheduleLR, as_lr_scheduler

__all__ = ["GroupField", "ScheduleLR", "as_lr_scheduler", "parameter_groups"]
