"""Reduces the buckets of DDP by a compressor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from lightning_bigopt.gradients.compression.collectives import Collectives, bytes_of
from lightning_bigopt.gradients.compression.compressor import (
    Compressor,
    FeedbackCompressor,
    HookCompressor,
)
from lightning_bigopt.gradients.compression.error_feedback import ErrorFeedback

__all__ = ["CompressedReduction"]


class CompressedReduction:
    """Averages the buckets of DDP by a compressor, and counts the bytes.

    Sparse and complex gradients are averaged without compression.

    Args:
        compressor: The compressor.
        names: Names of DDP's parameters by their ids.
        feedback: The states of the parameters.
        group: The process group of DDP.
        scale: Returns the factor on the gradients that states do not have.

    Attributes:
        is_active: Whether the current update is compressed.
        collectives: Communicates and counts the bytes.
    """

    def __init__(
        self,
        compressor: Compressor,
        names: Mapping[int, str],
        feedback: ErrorFeedback,
        group: ProcessGroup,
        scale: Callable[[], Tensor | float],
    ) -> None:
        self._compressor, self._names, self._feedback = compressor, names, feedback
        self._scale = scale
        self.is_active = True
        self.collectives = Collectives(group)

    def reduce(self, bucket: Any) -> Future[Tensor]:
        """Averages one bucket.

        Args:
            bucket: DDP's ``GradBucket``.

        Returns:
            The averaged bucket, of the same shape.
        """
        buffer, compressor, collectives = bucket.buffer(), self._compressor, self.collectives
        size = collectives.bytes_of_sum(bytes_of(buffer))
        collectives.dense += size
        is_dense = buffer.is_sparse or not buffer.is_floating_point()
        if is_dense or not self.is_active:
            collectives.sent += size
            return allreduce_hook(collectives.group, bucket)  # type: ignore[arg-type]
        if isinstance(compressor, HookCompressor):
            sent = buffer.numel() * compressor.bytes_per_element
            collectives.sent += collectives.bytes_of_sum(sent)
            return compressor.reduce(collectives.group, bucket)
        assert isinstance(compressor, FeedbackCompressor)  # the only other kind
        names = [self._names[id(parameter)] for parameter in bucket.parameters()]
        # Views of the buffer. The collectives are waited for here and not in callbacks of futures,
        # which gloo runs in any order: processes would then mix up the collectives of two buckets.
        gradients = dict(zip(names, bucket.gradients(), strict=True))
        compressor.average_(gradients, self._feedback, collectives, self._scale())
        result: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
        result.set_result(buffer)
        return result
