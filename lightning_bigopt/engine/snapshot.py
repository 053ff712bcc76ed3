"""A snapshot of everything that training changes, which can be restored within the same fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lightning_bigopt.batching.randomness import random_state, set_random_state
from lightning_bigopt.engine.clock import Clock
from lightning_bigopt.optimizers.group_schedule import GroupSchedule
from lightning_bigopt.optimizers.names import unwrapped
from lightning_bigopt.optimizers.object_snapshot import copied
from lightning_bigopt.optimizers.training_snapshot import TrainingSnapshot
from lightning_bigopt.trainer_access import loaders, loop, precision

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Snapshot", "Snapshotted"]


class Snapshotted(Protocol):
    """The methods of a capability that a snapshot uses."""

    def snapshot(self) -> dict[str, Any]:
        """Returns the state that :meth:`restore` needs."""

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Restores the state at the time of :meth:`snapshot`."""


class Snapshot:
    """Copies of weights, buffers, optimizers, GradScaler, random states, clock and loaders.

    The states of all capabilities are included. Tensors are copied on their devices, DTensors as
    their local shards. Weights and buffers are restored in place, except lazy ones that had no
    values at the time of the snapshot; parameters that were replaced since then are put back.
    Parameter groups added since then stay, with empty optimizer states: Lightning's fine-tuning
    callbacks add a group only once. The base values are restored, too. A snapshot may be restored
    several times. Gradients are not included: take and restore a snapshot between accumulation
    windows, and in the same hook, because Lightning advances its counters between the hooks of a
    batch.

    Args:
        trainer: The Trainer, while it fits.
        module: The module that is trained.
        clock: The clock of the engine.
        groups: The schedule of the parameter groups.
        capabilities: The capabilities of the fit.
        rewound: Called after clock, counters and loaders were restored.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        clock: Clock,
        groups: GroupSchedule,
        capabilities: Sequence[Snapshotted],
        *,
        rewound: Callable[[], None],
    ) -> None:
        self._trainer, self._clock, self._groups = trainer, clock, groups
        self._rewound = rewound
        self._optimizers = [*map(unwrapped, trainer.optimizers)]
        self._training = TrainingSnapshot(module, self._optimizers)
        self._bases = groups.state_dict()
        scaler = precision.gradient_scaler(trainer)
        self._scaler = None if scaler is None else (scaler, scaler.state_dict())
        self._device = trainer.strategy.root_device
        self._random = random_state(self._device)
        self._capabilities = [(c, copied(c.snapshot())) for c in capabilities]
        self._counts = clock.state_dict()
        self._counters = loop.counters(trainer)
        self._loaders = [
            (loader, copied(loader.state_dict()))
            for loader in loaders.train_loaders(trainer)
            if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        ]

    @torch.no_grad()
    def restore(self, *, rewind: bool = True) -> None:
        """Restores the state at the time of the snapshot.

        Args:
            rewind: Whether to restore the clock, the Trainer's counters and the loaders, too. With
                False training continues with the next data. Within an epoch a rewind needs loaders
                with a ``state_dict``, such as GlobalBatchLoader; others continue with the next
                data, and restart with the next epoch.

        Raises:
            ValueError: If weights or optimizers cannot be restored exactly, because an optimizer
                was replaced, a parameter removed, or its shape changed. Nothing is changed then.
        """
        optimizers = [*map(unwrapped, self._trainer.optimizers)]
        if [*map(id, optimizers)] != [*map(id, self._optimizers)]:
            raise ValueError(
                "a snapshot must be restored into the optimizers it was taken of, got others; take "
                "a new one after the optimizers were replaced"
            )
        self._training.restore()
        self._groups.rewind(self._bases)
        if self._scaler is not None:
            scaler, scale = self._scaler
            scaler.load_state_dict(scale)
        # Copies of the copies, because a snapshot may be restored again: training after the restore
        # would otherwise change its containers and tensors.
        for capability, state in self._capabilities:
            capability.restore(copied(state))
        if rewind:
            self._rewind()
        # Last, because a loader that begins anew draws random numbers.
        set_random_state(self._random, self._device)

    def _rewind(self) -> None:
        self._clock.rewind(self._counts)
        loop.restore_counters(self._trainer, self._counters)
        for loader, position in self._loaders:
            loader.load_state_dict(copied(position))
        if len(self._loaders) == len(loaders.train_loaders(self._trainer)):
            loaders.restart_epoch(self._trainer)
        self._rewound()
