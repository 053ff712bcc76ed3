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
from lightning_bigopt.optimizers.stored_training import StoredTraining, localized, sharded_like
from lightning_bigopt.optimizers.training_snapshot import TrainingSnapshot
from lightning_bigopt.trainer_access import loaders, loop_counters, precision, schedulers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Snapshot", "Snapshotted"]


class Snapshotted(Protocol):
    """The attributes of a capability that a snapshot uses."""

    owns: str

    def snapshot(self) -> dict[str, Any]:
        """Returns the state that :meth:`restore` needs."""

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Restores the state at the time of :meth:`snapshot`."""


class Snapshot:
    """Copies of weights, buffers, optimizers, GradScaler, random states, clock and loaders.

    The states of the module's own schedulers and of all capabilities are included. Tensors are
    copied on their devices, DTensors as their local shards. Weights and buffers are restored in
    place, except lazy ones that had no values at the time of the snapshot; parameters that were
    replaced since then are put back. Parameter groups added since then stay, with empty optimizer
    states: Lightning's fine-tuning callbacks add a group only once. The base values are restored,
    too. A snapshot may be restored several times. Gradients are not included: take and restore a
    snapshot between accumulation windows, and in the same hook, because Lightning advances its
    counters between the hooks of a batch.

    A portable snapshot is on the CPU; those of tensors on a GPU are copied while training
    continues. Another process can restore its :meth:`state_dict`, on the same number of processes.

    Args:
        trainer: The Trainer, while it fits.
        module: The module that is trained.
        clock: The clock of the engine.
        groups: The schedule of the parameter groups.
        capabilities: The capabilities of the fit.
        rewound: Called after clock, counters and loaders were restored.
        portable: Whether the snapshot is portable.
        with_loaders: Whether the states of the loaders are included; restore with ``replay=False``
            without them.
        state: The :meth:`state_dict` of a portable snapshot, to restore instead of a new one. Its
            ``random`` may be None, to keep the random states.
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
        portable: bool = False,
        with_loaders: bool = True,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._trainer, self._clock, self._groups = trainer, clock, groups
        self._rewound = rewound
        self._capabilities = list(capabilities)
        self._optimizers = [*map(unwrapped, trainer.optimizers)]
        self._device = trainer.strategy.root_device
        self._is_stored, self._event = state is not None, None
        self._training: TrainingSnapshot | StoredTraining
        if state is not None:
            self._training = StoredTraining(module, self._optimizers, state["training"])
            self._rest = {name: part for name, part in state.items() if name != "training"}
            return
        self._training = TrainingSnapshot(module, self._optimizers, portable=portable)
        self._rest = self._take("cpu" if portable else None, with_loaders=with_loaders)
        if portable and self._device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def _take(self, device: str | None, *, with_loaders: bool) -> dict[str, Any]:
        """Returns everything but weights and optimizers."""
        trainer, scaler = self._trainer, precision.gradient_scaler(self._trainer)
        stateful = _stateful(trainer) if with_loaders else []
        return {
            "bases": self._groups.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": random_state(self._device),
            "capabilities": {
                c.owns: copied(c.snapshot(), device, asynchronous=device is not None)
                for c in self._capabilities
            },
            "clock": self._clock.state_dict(),
            "counters": loop_counters.counters(trainer),
            "schedulers": schedulers.scheduler_states(trainer),
            "loaders": [copied(loader.state_dict()) for loader in stateful],
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns a portable snapshot as tensors in plain containers, which it shares.

        Waits for the copies from a GPU. DTensors are local shards: each process has its own state.
        """
        if self._event is not None:
            self._event.synchronize()
        rest = self._rest
        return {
            **rest,
            "training": self._training.state_dict(),
            "capabilities": localized(rest["capabilities"]),
        }

    @torch.no_grad()
    def restore(self, *, rewind: bool = True, replay: bool = True) -> None:
        """Restores the state at the time of the snapshot.

        Args:
            rewind: Whether to restore the clock and the counts of the run, too. With False training
                continues with the next data.
            replay: Whether a rewind restores the loaders and the position in the epoch. Within an
                epoch this needs loaders with a ``state_dict``, such as GlobalBatchLoader; others
                continue with the next data, and restart with the next epoch. With False training
                continues with the next data, and the data since the snapshot is left out.

        Raises:
            ValueError: If weights or optimizers cannot be restored exactly, because an optimizer
                was replaced, a parameter removed, or its shape changed. Nothing is changed then.
        """
        trainer, rest = self._trainer, self._rest
        optimizers = [*map(unwrapped, trainer.optimizers)]
        if [*map(id, optimizers)] != [*map(id, self._optimizers)]:
            raise ValueError(
                "a snapshot must be restored into the optimizers it was taken of, got others; take "
                "a new one after the optimizers were replaced"
            )
        staying = self._stay(rewind=rewind, replay=replay)
        rates = [
            (group, copied(group["lr"]))
            for optimizer in optimizers
            if id(optimizer) in staying
            for group in optimizer.param_groups
            if "lr" in group
        ]
        self._training.restore()
        for group, rate in rates:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].copy_(torch.as_tensor(rate))
            else:
                group["lr"] = rate
        schedulers.load_scheduler_states(trainer, rest["schedulers"], unless=staying)
        self._groups.rewind(rest["bases"])
        scaler = precision.gradient_scaler(trainer)
        if scaler is not None and rest["scaler"] is not None:
            scaler.load_state_dict(rest["scaler"])
        if rewind:  # first, because capabilities may read the clock
            self._clock.rewind(rest["clock"])
            loop_counters.restore_counters(trainer, rest["counters"], position=replay)
        # Copies of the copies, because a snapshot may be restored again: training after the restore
        # would otherwise change its containers and tensors.
        for capability in self._capabilities:
            state = rest["capabilities"].get(capability.owns)
            if state is not None:
                live = capability.snapshot() if self._is_stored else None
                capability.restore(sharded_like(copied(state), live))
        if rewind:
            self._rewind_loaders(replay=replay)
        # Last, because a loader that begins anew draws random numbers.
        if rest["random"] is not None:
            set_random_state(rest["random"], self._device)

    def _stay(self, *, rewind: bool, replay: bool) -> set[int]:
        """Returns the ids of optimizers whose own schedulers, and rates, do not go back.

        Those of schedulers that are stepped after epochs or validations, which are not undone
        unless the position in the epoch goes back.
        """
        if rewind and replay:
            return set()
        return schedulers.scheduled_optimizers(self._trainer, by_epoch=rewind)

    def _rewind_loaders(self, *, replay: bool) -> None:
        trainer = self._trainer
        if replay:
            found = _stateful(trainer)
            for loader, position in zip(found, self._rest["loaders"], strict=False):
                loader.load_state_dict(copied(position))
            if len(found) == len(loaders.train_loaders(trainer)):
                loaders.restart_epoch(trainer)
            self._rewound()
            return
        exact = loaders.exact_loader(trainer)
        # Its batch sizes may depend on the clock. Behind its last sample the epoch ends first.
        if exact is not None and exact.position < exact.samples:
            loaders.restart_epoch(trainer)
            self._rewound()


def _stateful(trainer: Trainer) -> list[Any]:
    """Returns the training loaders that have a state."""
    return [
        loader
        for loader in loaders.train_loaders(trainer)
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    ]
