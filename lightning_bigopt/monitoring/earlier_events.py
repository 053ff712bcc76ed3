"""Continues a TensorBoard folder that already holds events of the run from an earlier start."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from lightning.pytorch.utilities import rank_zero_warn

from lightning_bigopt.monitoring.tensorboard import file_writer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["discard_from", "has_logged_fit", "holds_earlier_training", "mark_fit"]

_SEARCHED = 1000  # events of a file; a training logs a mark with its first metrics
_IMPORTED = int(time.time())  # after the start of this process
_fitted: WeakSet[SummaryWriter] = WeakSet()  # the writers into which a fit has logged
_files_of_fits: set[str] = set()  # the files into which they had logged when the fit started


def has_logged_fit(writer: SummaryWriter) -> bool:
    """Returns whether an earlier fit of this process has logged with the same writer."""
    return writer in _fitted


def mark_fit(writer: SummaryWriter) -> None:
    """Marks a writer, and its files, as those of a fit."""
    _fitted.add(writer)
    _files_of_fits.update(_own_files(writer))


def holds_earlier_training(writer: SummaryWriter, prefix: str) -> bool:
    """Returns whether the folder of a writer holds events of a training that was not this fit.

    A training logs ``epoch`` (Lightning, with all metrics) or ``plan`` (OptimizationMonitor). Files
    without them are those of another program, or of a logger with another prefix. An evaluation
    without a training logs ``epoch`` at step 0.

    Args:
        writer: The writer of the logger.
        prefix: Prefix that the logger adds to each tag.
    """
    epoch, plan = f"{prefix}epoch", f"{prefix}plan/text_summary"
    own = set(_own_files(writer))
    return any(
        value.tag == plan or (value.tag == epoch and event.step > 0)
        for path in _event_files(writer)
        if path not in own
        for event in islice(_events(path), _SEARCHED)
        for value in event.summary.value
    )


def discard_from(writer: SummaryWriter, step: int) -> None:
    """Writes the event after which readers discard all earlier events from ``step`` on.

    These are the events that an earlier start of the run logged after the checkpoint, or all of
    its events. Those that this start has already logged, such as hyperparameters, are written
    again.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer.flush()
    kept = [
        event
        for path in _own_files(writer)
        for event in _events(path)
        if event.HasField("summary") and event.step >= step
    ]
    files = file_writer(writer)
    start = SessionLog(status=SessionLog.START)
    # Twice, because TensorBoard ignores the first one of a run (without its data server, which
    # hides values by their steps); its class EventAccumulator does not.
    for _ in range(2):
        files.add_event(Event(step=step, session_log=start), step)
    for event in kept:
        files.add_event(event, event.step, event.wall_time)


def _own_files(writer: SummaryWriter) -> list[str]:
    """Returns the files of this process in a writer's folder, without those of earlier fits."""
    own = re.escape(f".{socket.gethostname()}.{os.getpid()}.")
    found = [(re.search(rf"tfevents\.(\d+){own}", path), path) for path in _event_files(writer)]
    # A program that is started again in a container may have the same process number.
    return [
        path
        for match, path in found
        if match and int(match[1]) >= _IMPORTED and path not in _files_of_fits
    ]


def _event_files(writer: SummaryWriter) -> list[str]:
    """Returns the event files in a writer's folder in the order in which TensorBoard reads them."""
    from tensorboard.backend.event_processing import io_wrapper

    paths = io_wrapper.ListDirectoryAbsolute(file_writer(writer).get_logdir())
    return sorted(path for path in paths if io_wrapper.IsTensorFlowEventsFile(path))


def _events(path: str) -> Iterator[Any]:
    """Yields the events of a file up to an incomplete one, as the last one of a killed process."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    try:
        yield from LegacyEventFileLoader(path).Load()
    except Exception as error:  # noqa: BLE001  # TensorBoard has its own classes of errors
        rank_zero_warn(f"The earlier events in {path!r} could not be read ({error}).")
