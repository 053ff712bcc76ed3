"""How fast the run is: samples, tokens and steps by the clock, and the GPU's memory."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

from lightning_bigopt.controllers.collected import Collected

__all__ = ["StepTimer"]

_GIB = 2.0**30


class StepTimer:
    """Times updates by the host's clock, and by the device's where that is a GPU.

    Args:
        capacity: Updates that the percentiles look back on; nothing else is kept.

    Example:
        >>> timer = StepTimer()
        >>> timer.start(torch.device("cpu"), samples=0, tokens=0)
        >>> timer.step()
        >>> values = Collected()
        >>> timer.report(samples=32, tokens=0, into=values)
        >>> sorted(values.fetch())
        ['throughput/samples_per_second', 'time/step_median', 'time/step_p95']
    """

    def __init__(self, capacity: int = 128) -> None:
        self._times: deque[float] = deque(maxlen=capacity)
        self._marks: deque[Any] = deque(maxlen=capacity + 1)  # torch.cuda.Event is untyped
        self._device = torch.device("cpu")
        self._samples = self._tokens = 0
        self._last = self._reported = perf_counter()
        self._paused: float | None = None

    def start(self, device: torch.device, *, samples: int, tokens: int) -> None:
        """Begins anew."""
        self._times.clear()
        self._marks.clear()
        self._device = device
        self._samples, self._tokens = samples, tokens
        self._last = self._reported = perf_counter()
        self._paused = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def step(self) -> None:
        """An update has ended. Does not synchronize."""
        if self._device.type == "cuda":
            mark: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
            self._marks.append(mark)
            return
        now = perf_counter()
        self._times.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """Validation begins, which is no part of a step."""
        self._paused = perf_counter()

    def resume(self) -> None:
        """Validation is over."""
        if self._paused is None:
            return
        away, self._paused = perf_counter() - self._paused, None
        self._last += away
        self._reported += away
        self._marks.clear()

    def report(self, *, samples: int, tokens: int, into: Collected) -> None:
        """What was reached since the last report; on a GPU after everything was fetched."""
        now = perf_counter()
        seconds, self._reported = max(now - self._reported, 1e-9), now
        into.add("throughput/samples_per_second", (samples - self._samples) / seconds)
        if tokens:
            into.add("throughput/tokens_per_second", (tokens - self._tokens) / seconds)
        self._samples, self._tokens = samples, tokens
        times = sorted(self._step_times())
        if times:
            into.add("time/step_median", times[len(times) // 2])
            into.add("time/step_p95", times[min(len(times) - 1, int(0.95 * len(times)))])
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            reserved = torch.cuda.max_memory_reserved(self._device)
            into.add("memory/allocated_peak", allocated / _GIB)
            into.add("memory/reserved_peak", reserved / _GIB)
            torch.cuda.reset_peak_memory_stats(self._device)

    def _step_times(self) -> list[float]:
        if self._device.type != "cuda":
            return list(self._times)
        marks = [mark for mark in self._marks if mark.query()]
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
