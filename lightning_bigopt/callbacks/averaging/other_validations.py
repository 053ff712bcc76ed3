"""Validates averages that are not the model, and logs their metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_bigopt.callbacks.averaging.averaged_tensors import AveragedTensors
from lightning_bigopt.trainer_access.extra_validation import log_validation, validate_again

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["validate_others"]


def validate_others(
    trainer: Trainer, tensors: AveragedTensors, averages: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Writes each average into the module, validates it, and logs ``averages/<name>/<metric>``.

    Args:
        trainer: The Trainer, in ``on_validation_end`` of a validation within a fit.
        tensors: The averaged tensors; they have the last average afterwards.
        averages: The averages by name.
    """
    metrics: dict[str, Tensor] = {}
    for name, value in averages.items():
        tensors.write(value)
        found = validate_again(trainer)
        metrics |= {f"averages/{name}/{metric}": number for metric, number in found.items()}
    if metrics:
        log_validation(trainer, metrics)
