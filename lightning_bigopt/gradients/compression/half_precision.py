"""FP16 and BF16: send gradients in half precision, by torch's communication hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.futures import Future

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.gradients.compression.compressor import HookCompressor

__all__ = ["BF16", "FP16"]


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class FP16(HookCompressor):
    """Sends gradients as float16, half the bytes of float32. Has no error feedback and no state.

    Elements beyond 65504 become infinite; ``StepGuard([NonFinite()])`` rejects the update. Each
    process divides its elements by the number of processes before the sum: quotients below 3e-8
    become zero, and those below 6e-5 lose precision. Under 16-mixed the gradients carry the factor
    of the GradScaler, which then settles at a lower value.

    Args:
        start: Duration of training before the first compressed update.

    Raises:
        ValueError: If ``start`` is not a duration.

    Example:
        >>> FP16()
        FP16(start=0)

    References:
        ``fp16_compress_hook`` of torch.
    """

    bytes_per_element: ClassVar[int] = 2

    start: DurationLike = 0

    def __post_init__(self) -> None:
        Duration.parse(self.start, name="start")

    def reduce(self, group: Any, bucket: Any) -> Future[Tensor]:
        """Averages a bucket of DDP as float16."""
        return fp16_compress_hook(group, bucket)


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class BF16(HookCompressor):
    """Sends gradients as bfloat16, half the bytes of float32. Has no error feedback and no state.

    It has the range of float32 and 8 bits of precision; sums over processes are rounded, too.

    Args:
        start: Duration of training before the first compressed update.

    Raises:
        ValueError: If ``start`` is not a duration.

    Example:
        >>> BF16(start="5%")
        BF16(start='5%')

    References:
        ``bf16_compress_hook`` of torch.
    """

    bytes_per_element: ClassVar[int] = 2

    start: DurationLike = 0

    def __post_init__(self) -> None:
        Duration.parse(self.start, name="start")

    def reduce(self, group: Any, bucket: Any) -> Future[Tensor]:
        """Averages a bucket of DDP as bfloat16."""
        return bf16_compress_hook(group, bucket)
