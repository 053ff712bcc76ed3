"""An error for callbacks that are passed to Fabric, which ignores the hooks of a Trainer."""

from __future__ import annotations

from typing import Any

__all__ = ["TrainerOnly", "fabric_error"]

_IN_A_LOOP = {
    "BatchSizeScheduler": "GlobalBatchLoader(...) and its set_batch_sizes",
    "GradientClipping": "clip_gradients_(model, rule) before optimizer.step()",
    "GradientNoiseScale": "NoiseScaleEstimator of lightning_bigopt.batching",
    "HyperparameterScheduler": "group[field] = base * schedule(step / steps) at every step",
    "LearningRateScheduler": "as_lr_scheduler(schedule, optimizer, steps)",
    "OptimizationMonitor": "measure(model.named_parameters()) and fabric.log",
    "ReduceOnPlateau": "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "StepGuard": "inspect(detectors, states, readings), record and skip_update_",
}
"""What does the work of each callback in a loop without a Trainer, by the name of its class."""


class TrainerOnly:
    """Raises in Fabric: its hooks have other arguments than those of a Trainer, or other names.

    A callback that Fabric does not call would train without it, and without an error.
    ``fabric.setup`` calls :meth:`on_after_setup`; the step of an optimizer that was set up alone
    calls :meth:`on_after_optimizer_step`. A Trainer calls neither.
    """

    def on_after_setup(self, **arguments: Any) -> None:
        """Raises a ValueError that names what to call in the loop instead."""
        raise fabric_error(type(self).__name__, type(self))

    def on_after_optimizer_step(self, **arguments: Any) -> None:
        """Raises a ValueError that names what to call in the loop instead."""
        raise fabric_error(type(self).__name__, type(self))


def fabric_error(name: str, *callbacks: type) -> ValueError:
    """Returns the error for callbacks in Fabric, or for a module whose mixins add callbacks.

    Args:
        name: Name of the object that Fabric holds.
        callbacks: Classes of the callbacks.

    Example:
        >>> print(fabric_error("Mine"))
        callbacks must be passed to a Trainer, got Mine in Fabric; use lightning.Trainer
    """
    names = [base.__name__ for callback in callbacks for base in callback.__mro__]
    calls = [_IN_A_LOOP[name] for name in names if name in _IN_A_LOOP]
    advice = f"in the loop, use {' and '.join(calls)}" if calls else "use lightning.Trainer"
    return ValueError(f"callbacks must be passed to a Trainer, got {name} in Fabric; {advice}")
