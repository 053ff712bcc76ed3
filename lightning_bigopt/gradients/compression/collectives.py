"""Sums and gathers over the processes, with a count of the bytes that a process sends."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from lightning_bigopt.gradients.norm_kernels import stored_values

__all__ = ["Collectives", "bytes_of"]

_INDEX_BYTES = 8


def bytes_of(tensor: Tensor) -> int:
    """Returns the number of bytes of the elements of a tensor; of a sparse one the stored ones.

    Example:
        >>> bytes_of(torch.ones(3)), bytes_of(torch.ones(3, dtype=torch.bfloat16))
        (12, 6)
    """
    values = stored_values(tensor)
    size = values.numel() * values.element_size()
    if tensor.is_sparse:
        size += _INDEX_BYTES * tensor.sparse_dim() * len(values)
    return size


class Collectives:
    """Sums and gathers over a process group, and counts the bytes that this process sends.

    The count is that of the ring algorithms over :math:`w` processes: a sum of :math:`n` bytes
    sends :math:`2 n (w - 1) / w`, a gather of :math:`n` bytes from each process
    :math:`n (w - 1)`. The count uses shapes only and does not synchronize.

    Args:
        group: The process group; None for a single process, for which nothing is sent.

    Attributes:
        sent: Bytes that this process has sent since :meth:`clear`.
        dense: Bytes that it would have sent without compression.

    Example:
        >>> alone = Collectives(None)
        >>> alone.sum_(torch.ones(2)), alone.size, alone.sent
        (tensor([1., 1.]), 1, 0.0)
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else group.size()
        self.clear()

    def clear(self) -> None:
        """Resets the counts."""
        self.sent = self.dense = 0.0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the processes in place."""
        if self.size > 1:
            self.sent += self.bytes_of_sum(bytes_of(tensor))
            distributed.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Returns the tensors of all processes, which have equal shapes, in their order."""
        if self.size == 1:
            return [tensor]
        self.sent += bytes_of(tensor) * (self.size - 1)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(parts, tensor, group=self.group)
        return parts

    def bytes_of_sum(self, size: float) -> float:
        """Returns the bytes that this process sends in a sum of a tensor of ``size`` bytes."""
        return 2 * size * (self.size - 1) / self.size
