"""Runs Lightning's handler of SLURM's signal at the end of an update."""

from __future__ import annotations

import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["RequeueSignal", "defer_requeue"]

_REQUEUE = "_slurm_sigusr_handler_fn"
_TERMINATE = "_sigterm_notifier_fn"


def defer_requeue(trainer: Trainer) -> RequeueSignal | None:
    """Defers Lightning's handler of SLURM's signal; returns None if there is no such handler.

    Call it in ``on_fit_start``: Lightning registers the handler after it.
    """
    # Only SLURMEnvironment and its subclasses have the attribute.
    environment: Any = trainer._accelerator_connector.cluster_environment
    if not getattr(environment, "auto_requeue", False):
        return None
    return RequeueSignal(trainer, is_sigterm=environment.requeue_signal == signal.SIGTERM)


class RequeueSignal:
    """Defers Lightning's handler of SLURM's signal, which saves a checkpoint and requeues the job.

    Python runs a handler between any two instructions. That of Lightning may save parameters of
    which only some have been updated, or counts that do not match. Several processes get the signal
    at different moments: one would run the collectives of the handler, another those of an update.

    Args:
        trainer: The Trainer, on a cluster with SLURM and ``auto_requeue=True``.
        is_sigterm: Whether the signal is SIGTERM. Lightning has a second handler for it, which ends
            the run and is deferred, too: it broadcasts.
    """

    def __init__(self, trainer: Trainer, *, is_sigterm: bool = False) -> None:
        self._trainer = trainer
        self._is_used = True
        self._number = 0
        # In the order in which Lightning calls them.
        self._handlers = (_TERMINATE, _REQUEUE) if is_sigterm else (_REQUEUE,)
        self._received = [0] * len(self._handlers)
        self._handled = list(self._received)
        for index, name in enumerate(self._handlers):
            # An instance attribute shadows the method, and deleting it undoes the change.
            vars(trainer._signal_connector)[name] = partial(self._receive, index)

    def stop(self) -> None:
        """Ends the deferral: later signals are handled at once."""
        for name in self._handlers:
            vars(self._trainer._signal_connector).pop(name, None)
        self._is_used = False

    def _receive(self, index: int, number: int, frame: Any) -> None:
        self._number = number
        self._received[index] += 1
        if not self._is_used:
            self._handle(self._received)

    def settle(self) -> None:
        """Handles signals that any process has received; a collective with several processes."""
        # A process whose own signal arrives later does not handle it again. The loop ends on all
        # processes together, also if one of them has called this method once more.
        while self._is_used and (received := self._received_anywhere()) != self._handled:
            self._handle(received)

    def settle_alone(self) -> None:
        """Handles a pending signal if there is only one process, without a collective.

        After an error or within a validation, other processes would not take part in the handler.
        """
        if self._received != self._handled and self._trainer.world_size == 1:
            self._handle(self._received)

    def _handle(self, received: list[int]) -> None:
        before, self._handled = self._handled, list(received)
        connector = self._trainer._signal_connector
        for name, now, last in zip(self._handlers, received, before, strict=True):
            if now > last:
                getattr(type(connector), name)(connector, self._number, None)

    def _received_anywhere(self) -> list[int]:
        if self._trainer.world_size == 1 or not distributed.is_initialized():
            return list(self._received)
        values = [*self._received, self._number]
        counts = torch.tensor(values, device=self._trainer.strategy.root_device)
        distributed.all_reduce(counts, op=distributed.ReduceOp.MAX)
        *received, self._number = map(int, counts.tolist())
        return received
