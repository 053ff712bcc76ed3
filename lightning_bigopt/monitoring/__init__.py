"""Logging while training: tags, metric buffer, per-layer values, step times, TensorBoard."""

from lightning_bigopt.monitoring.tags import TAGS, Tag, find_tag

__all__ = ["TAGS", "Tag", "find_tag"]
