"""Reads the logs of a run, and draws and reports them."""

from lightning_bigopt.monitoring.tags import TAGS, Tag
from lightning_bigopt.reporting.loss_runs import read_loss_curve, read_loss_curves

__all__ = ["TAGS", "Tag", "read_loss_curve", "read_loss_curves"]
