"""Parameter groups and optimiser recipes."""

from lightning_bigopt.optimizers.fields import GroupField

__all__ = ["GroupField"]
