"""A DDP communication hook that notes the norm of what this process contributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

__all__ = ["LocalSquares"]


class LocalSquares:
    """The squared norm of this process's own gradient, summed over DDP's buckets.

    It costs one dot product a bucket, and does not synchronize with the host.

    Example:
        >>> squares = LocalSquares()
        >>> squares.add(torch.tensor([3.0, 4.0]))
        >>> squares.take()
        tensor(25., dtype=torch.float64)
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._is_watching = True

    def add(self, gradient: Tensor) -> None:
        """Adds a bucket, before the processes are averaged."""
        if not self._is_watching:
            return
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        square = norm.to(torch.float32 if norm.device.type == "mps" else torch.float64) ** 2
        self._sum = square if self._sum is None else self._sum + square

    def reduce(self, bucket: Any) -> Future[Tensor]:
        """The communication hook's work: notes DDP's ``GradBucket``, then averages it as usual."""
        self.add(bucket.buffer())
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None: the default group

    def take(self) -> Tensor:
        """The sum since the last call of :meth:`clear`, 0-d; zero where DDP reduced nothing."""
        found = torch.zeros(()) if self._sum is None else self._sum
        self.clear()
        return found

    def clear(self) -> None:
        """Begins again."""
        self._sum = None

    def stop(self) -> None:
        """Watches no more; DDP keeps the hook for as long as it lives."""
        self._is_watching = False
        self.clear()
