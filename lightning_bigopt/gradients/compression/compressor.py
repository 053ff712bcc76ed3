"""The interface of compressors: frozen specifications that reduce the gradients of a bucket."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.futures import Future

from lightning_bigopt.arguments import Specification
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.gradients.compression.collectives import Collectives
from lightning_bigopt.gradients.compression.error_feedback import (
    RESIDUAL,
    ErrorFeedback,
    ParameterState,
)

__all__ = [
    "Compressor",
    "FeedbackCompressor",
    "HookCompressor",
    "with_residual",
    "without_scale",
]


class Compressor(Specification, ABC):
    """Base class of the compressors, which are specifications for ``GradientCompression``.

    Attributes:
        start: Duration of training before the first compressed update; gradients are averaged
            without compression until then.

    Example:
        >>> from lightning_bigopt.gradients.compression import FP16
        >>> isinstance(FP16(), Compressor)
        True
    """

    _used_in = "GradientCompression({})"

    start: DurationLike

    @property
    def needs_horizon(self) -> bool:
        """Whether the length of the run must be known."""
        return Duration.parse(self.start, name="start").value > 0


class HookCompressor(Compressor):
    """A compressor that runs one of torch's communication hooks and has no state.

    Attributes:
        bytes_per_element: Number of bytes that the hook sends for each element.
    """

    bytes_per_element: ClassVar[int]

    @abstractmethod
    def reduce(self, group: Any, bucket: Any) -> Future[Tensor]:
        """Averages a bucket of DDP over the processes.

        Args:
            group: The process group.
            bucket: DDP's ``GradBucket``.
        """


class FeedbackCompressor(Compressor):
    """A compressor with error feedback: what an update does not send is added to the next one."""

    @abstractmethod
    def average_(
        self,
        gradients: Mapping[str, Tensor],
        feedback: ErrorFeedback,
        collectives: Collectives,
        scale: Tensor | float = 1.0,
    ) -> None:
        """Replaces the gradients of this process by the compressed mean over all processes.

        Proposes the new state of each parameter to ``feedback``. Does not synchronize with the
        host, except for the collectives of a backend for the CPU.

        Args:
            gradients: The gradients by name of the parameter, dense and real, of one dtype and
                device; in the same order on all processes.
            feedback: The states of the parameters.
            collectives: Communicates with the other processes.
            scale: Factor on the gradients that states do not have, such as that of a GradScaler.
        """

    def state_shapes(self, gradient: Tensor) -> dict[str, torch.Size]:
        """Returns the shape of each entry of a parameter's state."""
        return {RESIDUAL: gradient.shape}

    def initial_entry(self, key: str, name: str, shape: torch.Size) -> Tensor:
        """Returns an entry of a parameter's state before its first compressed update."""
        return torch.zeros(shape)

    def _state(self, name: str, gradient: Tensor, feedback: ErrorFeedback) -> ParameterState:
        """Returns the state of a parameter with all entries, as stored in ``feedback``."""
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        stored, state = feedback.states.get(name, {}), {}
        for key, shape in self.state_shapes(gradient).items():
            value = stored.get(key)
            if value is None or value.shape != shape:
                value = self.initial_entry(key, name, shape)
            state[key] = value.to(gradient.device, dtype)
        feedback.states[name] = state
        return state


def with_residual(gradient: Tensor, state: ParameterState, scale: Tensor | float) -> Tensor:
    """Returns the gradient plus the residual, as a new tensor in the dtype of the residual."""
    residual = state[RESIDUAL]
    return gradient + (residual * scale if _is_scaled(scale) else residual)


def without_scale(tensor: Tensor, scale: Tensor | float) -> Tensor:
    """Divides by the factor on the gradients; returns the tensor itself if there is none."""
    return tensor / scale if _is_scaled(scale) else tensor


def _is_scaled(scale: Tensor | float) -> bool:
    return isinstance(scale, Tensor) or scale != 1.0
