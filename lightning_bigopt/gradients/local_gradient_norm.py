"""Measures the gradient of this process before DDP averages it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bigopt.gradients.norm_kernels import accumulation_dtype, stored_values

__all__ = ["LocalGradientNorm"]


class LocalGradientNorm:
    """Measures the squared norm of the gradient of this process, summed over DDP's buckets.

    Costs one norm per bucket and does not synchronize with the host.

    Example:
        >>> local_norm = LocalGradientNorm()
        >>> local_norm.add(torch.tensor([3.0, 4.0]))
        >>> local_norm.take()
        tensor(25., dtype=torch.float64)
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._is_active = True

    def add(self, gradient: Tensor) -> None:
        """Adds a bucket before it is averaged over the processes.

        Args:
            gradient: The bucket, of shape ``(elements,)`` and any floating dtype, or a sparse
                gradient, which has a bucket of its own.
        """
        if not self._is_active:
            return
        norm = torch.linalg.vector_norm(stored_values(gradient), dtype=torch.float32)
        square = norm.to(accumulation_dtype(norm.device)) ** 2
        self._sum = square if self._sum is None else self._sum + square

    def take(self) -> Tensor:
        """Returns the squared norm since the last reset, and resets it.

        Returns:
            The squared norm, of shape ``()``, float64 (float32 on mps); zero if DDP reduced
            nothing.
        """
        squared_norm = torch.zeros(()) if self._sum is None else self._sum
        self.clear()
        return squared_norm

    def clear(self) -> None:
        """Resets the sum."""
        self._sum = None

    def stop(self) -> None:
        """Stops measuring: DDP cannot remove the hook that calls :meth:`add`."""
        self._is_active = False
        self.clear()
