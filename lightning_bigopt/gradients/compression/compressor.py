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

__all__ = ["Compressor", "FeedbackCompressor", "HookCompressor"]


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
            scale: Factor of a GradScaler on the gradients; states do not have it.
        """

    def initial_state(self, name: str, gradient: Tensor) -> ParameterState:
        """Returns the state of a parameter before its first compressed update."""
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        return {RESIDUAL: torch.zeros(gradient.shape, dtype=dtype, device=gradient.device)}

    def _state(self, name: str, gradient: Tensor, feedback: ErrorFeedback) -> ParameterState:
        """Returns the state of a parameter with all entries, as stored in ``feedback``."""
        state = feedback.states.setdefault(name, {})
        fits = {
            key: state[key].to(value.device, value.dtype)
            if key in state and state[key].shape == value.shape
            else value
            for key, value in self.initial_state(name, gradient).items()
        }
        feedback.states[name] = fits
        return fits


def with_residual(gradient: Tensor, state: ParameterState, scale: Tensor | float) -> Tensor:
    """Returns the gradient plus the residual, as a new tensor in the dtype of the residual."""
    residual = state[RESIDUAL]
    if isinstance(scale, Tensor) or scale != 1.0:
        residual = residual * scale
    return gradient + residual
