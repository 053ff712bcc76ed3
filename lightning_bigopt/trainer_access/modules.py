"""Lightning's class LightningModule."""

from __future__ import annotations

__all__ = ["is_lightning_module"]


def is_lightning_module(cls: type) -> bool:
    """Returns whether a class is LightningModule itself, of ``lightning`` or its older package."""
    packages = ("lightning.pytorch.", "pytorch_lightning.")
    return cls.__name__ == "LightningModule" and cls.__module__.startswith(packages)
