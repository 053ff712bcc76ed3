"""The communication hook of DDP, which several users share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from lightning_bigopt.gradients.local_gradient_norm import LocalGradientNorm

__all__ = ["CommunicationHook", "Reduce"]

Reduce: TypeAlias = Callable[[Any], Future[Tensor]]
"""Averages a ``GradBucket`` of DDP over the processes."""


class CommunicationHook:
    """Measures each bucket of DDP before it is averaged, and averages it once.

    DDP takes one hook and has no way to remove it: this one serves all users, and only averages
    when they have stopped.

    Attributes:
        owner: Name of what averages the buckets; empty for the default, an all-reduce.

    Example:
        >>> hook = CommunicationHook()
        >>> hook.reduce_by(lambda bucket: bucket, owner="mine")
        >>> hook.run([1.0]), hook.owner
        ([1.0], 'mine')
    """

    def __init__(self) -> None:
        self.owner = ""
        self._norms: list[LocalGradientNorm] = []
        self._reduce: Reduce | None = None

    def measure(self, norm: LocalGradientNorm) -> None:
        """Adds a measurement of each bucket before it is averaged."""
        self._norms.append(norm)

    def reduce_by(self, reduce: Reduce, *, owner: str) -> None:
        """Averages the buckets by a function.

        Raises:
            ValueError: If another function does.
        """
        if self._reduce is not None:
            raise ValueError(
                "DDP must have one communication hook that averages the gradients, got "
                f"{self.owner} and {owner}; remove one of them"
            )
        self._reduce, self.owner = reduce, owner

    def release(self, owner: str) -> None:
        """Averages by an all-reduce again, if ``owner`` does the averaging."""
        if self.owner == owner:
            self._reduce, self.owner = None, ""

    def run(self, bucket: Any) -> Future[Tensor]:
        """Runs as the communication hook.

        Args:
            bucket: DDP's ``GradBucket``.

        Returns:
            The averaged bucket, of the same shape.
        """
        for norm in self._norms:
            norm.add(bucket.buffer())
        if self._reduce is not None:
            return self._reduce(bucket)
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None: the default group
