"""Parameter groups and optimizer recipes."""

from lightning_bigopt.optimizers.fields import GroupField
from lightning_bigopt.optimizers.groups import parameter_groups
from lightning_bigopt.optimizers.scheduler import ScheduleLR

__all__ = ["GroupField", "ScheduleLR", "parameter_groups"]
