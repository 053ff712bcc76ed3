"""The spike score of a series: the share of values far above the values before them."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from lightning_bigopt.gradients.norm_kernels import accumulation_dtype

__all__ = ["SpikeScore"]

_HISTORY = 128
_SIGMAS = 6.0
_FIRST_JUDGED = 64  # half of the history, the current value included
_FOLD_EVERY = 64
# A constant series has a standard deviation of 0, and differs from its mean by rounding.
_LEAST_EXCESS = 1e-6


class SpikeScore:
    r"""Counts the values of a series that are spikes. Does not synchronize between two reads.

    .. math:: x_t > m_t + 6 \, \sigma_t

    with the mean :math:`m_t` and the standard deviation :math:`\sigma_t` (with :math:`n - 1` in the
    denominator) of the 128 finite values before :math:`x_t`; a spike enters this history like any
    other value. The score is the number of spikes divided by the number of values that were
    compared: those with at least 63 finite values before them. A value that is not finite, or
    less than a millionth of the mean above it, is no spike. Non-finite values never enter the
    history and are not compared.

    Example:
        >>> score = SpikeScore()
        >>> for index in range(128):
        ...     score.add(100.0 if index == 100 else 1.0 + index % 2)
        >>> round(score.value(), 4)  # 1 of the 65 values from the 64th on
        0.0154

    References:
        Team OLMo, "2 OLMo 2 Furious", 2025, Sec. 3 (the spike score: share of values far from a
        rolling mean); OLMo-core, ``optim/skip_step_optimizer.py`` (128 values, 6 standard
        deviations, from the 64th value on).
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Clears history and counts."""
        self._recent: deque[float] = deque(maxlen=_HISTORY)  # finite numbers
        self._pending: list[Tensor] = []  # on a device
        self._history: Tensor | None = None  # on the device, padded with NaN in front
        self._spikes: Tensor | int = 0
        self._compared: Tensor | int = 0

    def add(self, value: Tensor | float) -> None:
        """Adds the next value: a number, or a tensor of shape ``()``. Does not synchronize."""
        if not isinstance(value, Tensor):  # in float64, which torch would not choose
            value = torch.tensor(value, dtype=torch.float64) if self._is_on_device else value
        elif value.is_cpu and not self._is_on_device:
            value = value.item()
        if not isinstance(value, Tensor):
            self._compare(value)
            return
        self._pending.append(value)
        if len(self._pending) >= _FOLD_EVERY:
            self._fold()

    @property
    def _is_on_device(self) -> bool:
        return self._history is not None or bool(self._pending)

    def _compare(self, value: float) -> None:
        """Compares a number with those before it."""
        if not math.isfinite(value):
            return
        count = len(self._recent)
        if count >= _FIRST_JUDGED - 1:
            mean = sum(self._recent) / count
            squares = sum([(other - mean) * (other - mean) for other in self._recent])
            spread = math.sqrt(squares / (count - 1))
            self._compared += 1
            self._spikes += value - mean > max(_SIGMAS * spread, _LEAST_EXCESS * abs(mean))
        self._recent.append(value)

    def value(self) -> Tensor | float:
        """Returns the score; NaN before the first comparison. Does not synchronize.

        Returns:
            A number if it needs no synchronization, else a tensor of shape ``()``.
        """
        self._fold()
        if isinstance(self._compared, Tensor):
            return self._spikes / self._compared  # 0 / 0 is NaN
        return self._spikes / self._compared if self._compared else math.nan

    @torch.no_grad()
    def _fold(self) -> None:
        """Compares the pending values with those before them, with a fixed number of kernels."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        device = next((x.device for x in pending if not x.is_cpu), pending[0].device)
        dtype = accumulation_dtype(device)
        new = torch.stack([value.to(device, dtype).reshape(()) for value in pending])
        if self._history is None:
            padding = [math.nan] * (_HISTORY - len(self._recent))
            self._history = torch.tensor([*padding, *self._recent], dtype=dtype, device=device)
        values = torch.cat([self._history.to(new), new])
        is_new = torch.arange(len(values), device=device) >= _HISTORY
        # A stable sort moves the non-finite values to the front; the others keep their order.
        finite, order = values.isfinite().sort(stable=True)
        values, is_new = values.index_select(0, order), is_new.index_select(0, order) & finite
        # Row i holds the 128 values before value i + 128.
        before = values.unfold(0, _HISTORY, 1).narrow(0, 0, len(new))
        known = before.isfinite()
        count = known.sum(1)
        mean = before.where(known, 0.0).sum(1) / count
        spread = (before - mean.unsqueeze(1)).where(known, 0.0).square().sum(1) / (count - 1)
        excess = values.narrow(0, _HISTORY, len(new)) - mean
        compared = is_new.narrow(0, _HISTORY, len(new)) & (count >= _FIRST_JUDGED - 1)
        least = mean.abs() * _LEAST_EXCESS
        is_spike = compared & (excess > _SIGMAS * spread.sqrt()) & (excess > least)
        self._history = values.narrow(0, len(new), _HISTORY)
        self._spikes = is_spike.sum() + self._spikes
        self._compared = compared.sum() + self._compared

    def state_dict(self) -> dict[str, Any]:
        """Returns history and counts as plain numbers. Synchronizes."""
        self._fold()
        history = self._recent if self._history is None else self._history.tolist()
        return {
            "history": [value for value in history if math.isfinite(value)],
            "spikes": int(self._spikes),
            "compared": int(self._compared),
        }

    def snapshot(self) -> dict[str, Any]:
        """Returns what :meth:`restore` needs. Does not synchronize."""
        return {
            "recent": list(self._recent),
            "pending": list(self._pending),
            "history": self._history,
            "spikes": self._spikes,
            "compared": self._compared,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Restores the values at the time of :meth:`snapshot`."""
        self._recent = deque(snapshot["recent"], maxlen=_HISTORY)
        self._pending, self._history = list(snapshot["pending"]), snapshot["history"]
        self._spikes, self._compared = snapshot["spikes"], snapshot["compared"]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores history and counts."""
        self.reset()
        self._recent.extend(state["history"])
        self._spikes, self._compared = state["spikes"], state["compared"]
