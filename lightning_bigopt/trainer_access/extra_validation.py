"""Validates other weights within a fit, directly after an ordinary validation."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_bigopt.batching.randomness import preserve_random_state
from lightning_bigopt.trainer_access.packages import own
from lightning_bigopt.trainer_access.separate_loop import loaders_restored
from lightning_bigopt.trainer_access.trial_runs import silent_loggers

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["log_validation", "validate_again"]


def validate_again(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Validates the current weights on the same loaders, without callbacks, loggers and bars.

    The hooks of the module run as in every validation. Progress, metrics, random states and the
    mode of the module are afterwards as they were. All processes must call it.

    Args:
        trainer: The Trainer, in ``on_validation_end`` of a validation within a fit.

    Returns:
        The metrics of the epoch by name: those for callbacks, and those for loggers.
    """
    epoch_loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    usual = epoch_loop.val_loop
    loop = own(trainer, "loops.evaluation_loop._EvaluationLoop")(
        trainer, usual._trainer_fn, usual._stage, verbose=False, inference_mode=usual.inference_mode
    )
    # A copy has its own iterator, over the same loaders.
    loop._data_source, loop._combined_loader = usual._data_source, copy(usual._combined_loader)
    loop._max_batches = usual._max_batches
    loop._last_val_dl_reload_epoch = usual._last_val_dl_reload_epoch
    # The ordinary metrics are computed and kept before metric objects of the module are reset.
    _ = trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics
    connector.reset_results()
    names = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
    kept = {name: dict(getattr(connector, name)) for name in names}
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    epoch_loop.val_loop = loop
    trainer.callbacks = []  # type: ignore[attr-defined]
    trainer.loggers = silent_loggers(trainer)
    connector._callback_metrics = {}
    data = loop._combined_loader.iterables
    try:
        with preserve_random_state(trainer.strategy.root_device), loaders_restored(trainer, data):
            results: list[dict[str, Any]] = loop.run()
        found = dict(connector._callback_metrics)
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
        epoch_loop.val_loop = usual
        for name, metrics in kept.items():
            setattr(connector, name, metrics)
    return found, {name: value for result in results for name, value in result.items()}


def log_validation(
    trainer: Trainer, for_callbacks: Mapping[str, Tensor], for_loggers: Mapping[str, Tensor]
) -> None:
    """Logs metrics as those of a validation.

    Args:
        trainer: The Trainer.
        for_callbacks: Metrics for ``monitor=`` of callbacks.
        for_loggers: Metrics for the loggers.
    """
    connector = trainer._logger_connector
    connector._callback_metrics.update(for_callbacks)
    connector.log_metrics(dict(for_loggers))
