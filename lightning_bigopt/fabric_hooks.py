"""Errors for callbacks and specifications in Fabric, which ignores the hooks of a Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["TrainerOnly", "fabric_error"]

_IN_A_LOOP = {
    "BatchSizeScheduler": "GlobalBatchLoader(...) and its set_batch_sizes",
    "GradientCompression": "module.register_comm_hook(None, bf16_compress_hook) of torch",
    "GradientClipping": "clip_gradients_(model, rule) before optimizer.step()",
    "GradientNoiseScale": "NoiseScaleEstimator of lightning_bigopt.batching",
    "HyperparameterScheduler": "group[field] = base * schedule(step / steps) at every step",
    "LearningRateScheduler": "as_lr_scheduler(schedule, optimizer, steps)",
    "ModelAveraging": "torch.optim.swa_utils.AveragedModel",
    "OptimizationMonitor": "measure(model.named_parameters()) and fabric.log",
    "ReduceOnPlateau": "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "StepGuard": "inspect(detectors, states, readings), record and skip_update_",
}
"""The code that replaces each callback in a loop without a Trainer, by the name of its class."""


class TrainerOnly:
    """Base class of callbacks that raise an error in Fabric.

    Fabric calls none of the hooks of a Trainer: without the error, the callback would have no
    effect. ``fabric.setup`` calls :meth:`on_after_setup`; the step of an optimizer that was set up
    alone calls :meth:`on_after_optimizer_step`. A Trainer calls neither.
    """

    def on_after_setup(self, **arguments: Any) -> None:
        """Raises a ValueError that names what to call in the loop instead."""
        raise fabric_error(type(self).__name__, [base.__name__ for base in type(self).__mro__])

    def on_after_optimizer_step(self, **arguments: Any) -> None:
        """Raises a ValueError that names what to call in the loop instead."""
        raise fabric_error(type(self).__name__, [base.__name__ for base in type(self).__mro__])


def fabric_error(name: str, callbacks: Iterable[str]) -> ValueError:
    """Returns the error for an object in Fabric that needs callbacks of a Trainer.

    Args:
        name: Name of the object: a callback, a specification, or a module with mixins.
        callbacks: Names of the classes of the callbacks; names of other classes are ignored.

    Example:
        >>> print(fabric_error("Mine", []))
        callbacks must be passed to a Trainer, got Mine in Fabric; use lightning.Trainer
    """
    calls = [_IN_A_LOOP[callback] for callback in callbacks if callback in _IN_A_LOOP]
    advice = f"in the loop, use {' and '.join(calls)}" if calls else "use lightning.Trainer"
    return ValueError(f"callbacks must be passed to a Trainer, got {name} in Fabric; {advice}")
