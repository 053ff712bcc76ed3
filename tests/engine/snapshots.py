"""Copies of the state that a snapshot must restore, and a capability that acts in hooks."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Batch, Fit
from tests.helpers import Probe


class Rich(Probe):
    """A module with everything that changes in training: dropout, and three kinds of buffers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"lr": 0.05, "optimizer": torch.optim.AdamW, **options})
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.factors: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, index = batch
        self.steps_seen += 1
        self.hidden += torch.rand(3)
        factor = random.random() + np.random.rand()  # noqa: NPY002
        self.factors.append(factor)
        self.windows.append(index.tolist())
        return self.loss(self.drop(self.norm(x)), y / (index + 1).unsqueeze(1)) * factor

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.lrs.append(float(optimizer.param_groups[0]["lr"]))


class Acts(Capability):
    """Runs functions of the fit when an update has ended, by ``global_step``, and at epoch ends."""

    owns, rank = "acts", 5  # before the others, so that a later stage sees the restored state

    def __init__(
        self,
        at: dict[int, Callable[[Fit], None]] | None = None,
        *,
        epochs: list[Callable[[Fit], None]] | None = None,
    ) -> None:
        self.at, self.epochs = dict(at or {}), list(epochs or [])

    def end_batch(self, batch: Batch) -> None:
        act = self.at.get(batch.fit.trainer.global_step)
        if batch.closes_window and act is not None:
            del self.at[batch.fit.trainer.global_step]
            act(batch.fit)

    def end_epoch(self, fit: Fit) -> None:
        if self.epochs:
            self.epochs.pop(0)(fit)


def parts(fit: Fit) -> dict[str, Any]:
    """Returns copies of everything that the docstring of Snapshot lists, by name."""
    trainer: Any = fit.trainer
    loop = trainer.fit_loop.epoch_loop
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    found = {
        "weights": dict(fit.module.named_parameters()),
        "buffers": dict(fit.module.named_buffers()),
        "optimizer states": [
            [one.state.get(p, {}) for group in one.param_groups for p in group["params"]]
            for one in trainer.optimizers
        ],
        "groups": [
            {k: v for k, v in group.items() if k != "params"}
            for one in trainer.optimizers
            for group in one.param_groups
        ],
        "gradient scaler": None if scaler is None else scaler.state_dict(),
        "torch's random state": torch.get_rng_state(),
        "Python's random state": random.getstate(),
        "NumPy's random state": np.random.get_state(),  # noqa: NPY002
        "clock": fit.clock.state_dict(),
        "counters": [
            trainer.global_step,
            trainer.current_epoch,
            loop._batches_that_stepped,
            loop.batch_progress.state_dict(),
        ],
        "loaders": [
            one.state_dict()
            for one in trainer.fit_loop._combined_loader.flattened
            if hasattr(one, "state_dict")
        ],
    }
    for capability in fit.capabilities:
        if not isinstance(capability, Acts):
            state = dict(capability.saved_state())
            state.pop("window", None)  # the window that has closed: a place in the data, no state
            state.pop("axis", None)  # the x axis of the loggers goes on
            found[f"state of {type(capability).__name__}"] = state
    return copy.deepcopy(detached(found))


def detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    return [detached(item) for item in value] if isinstance(value, list) else value


def equal(one: Any, other: Any) -> bool:
    """Returns whether two states are bitwise equal, in every container."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and one.dtype == other.dtype
            and one.layout == other.layout
            and torch.equal(
                one.to_dense() if one.is_sparse else one,
                other.to_dense() if other.is_sparse else other,
            )
        )
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)
