"""Reads the logs of a run, and draws and reports them."""

from lightning_bigopt.monitoring.tags import TAGS, Tag

__all__ = ["TAGS", "Tag"]
