"""What is logged, and under which name."""

from lightning_bigopt.reporting.tags import TAGS, Tag

__all__ = ["TAGS", "Tag"]
