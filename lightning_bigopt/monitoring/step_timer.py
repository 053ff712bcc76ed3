"""Measures step times, samples and tokens per second, and peak GPU memory."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

from lightning_bigopt.monitoring.metric_buffer import MetricBuffer

__all__ = ["StepTimer"]

_GIB = 2.0**30


class StepTimer:
    """Times updates by the clock of the host, or by CUDA events on a GPU.

    Args:
        capacity: Number of recent updates over which the percentiles are computed.

    Example:
        >>> timer = StepTimer()
        >>> timer.start(torch.device("cpu"), samples=0, tokens=0)
        >>> timer.step()
        >>> values = MetricBuffer()
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
        """Starts the timer.

        Args:
            device: Device of the model.
            samples: Samples consumed so far, over all processes.
            tokens: Tokens consumed so far, over all processes; 0 if they are not counted.
        """
        self._times.clear()
        self._marks.clear()
        self._device = device
        self._samples, self._tokens = samples, tokens
        self._last = self._reported = perf_counter()
        self._paused = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def step(self) -> None:
        """Marks the end of an update. Does not synchronize."""
        if self._device.type == "cuda":
            # The host runs ahead of the GPU: only events on the stream record when an update ends.
            mark: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
            self._marks.append(mark)
            return
        now = perf_counter()
        self._times.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """Pauses the timer, so that validation does not count as part of a step."""
        self._paused = perf_counter()

    def resume(self) -> None:
        """Continues after :meth:`pause`."""
        if self._paused is None:
            return
        paused, self._paused = perf_counter() - self._paused, None
        self._last += paused
        self._reported += paused
        self._marks.clear()  # the time between events before and after the pause includes it

    def rewind(self, *, samples: int, tokens: int) -> None:
        """Follows counts that were set back by these amounts: the work for them was done."""
        self._samples -= samples
        self._tokens -= tokens

    def report(self, *, samples: int | None, tokens: int, into: MetricBuffer) -> None:
        """Adds rates and times since the last report to a buffer.

        On a GPU call it after a transfer from the device: the events of earlier updates have then
        completed.

        Args:
            samples: Samples consumed so far, over all processes; None if they are not counted.
            tokens: Tokens consumed so far, over all processes; 0 if they are not counted.
            into: Buffer that receives the values.
        """
        now = perf_counter()
        seconds, self._reported = max(now - self._reported, 1e-9), now
        if samples is not None:
            into.add("throughput/samples_per_second", (samples - self._samples) / seconds)
            self._samples = samples
        if tokens:
            into.add("throughput/tokens_per_second", (tokens - self._tokens) / seconds)
        self._tokens = tokens
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
        marks = [mark for mark in self._marks if mark.query()]  # query() does not synchronize
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
