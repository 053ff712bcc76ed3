"""Equal conditions for every test; on CI a skip for a missing dependency is a failure."""

from __future__ import annotations

import os
import random
from collections.abc import Generator, Iterator
from typing import TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from notebooks.run import free_port
from tests.older_lightning import accept_weights_only

# Lightning starts the processes of every test at this port instead of at any that is free. A worker
# of pytest-xdist inherits the port of the first process.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["MASTER_PORT"] = str(free_port())
os.environ.setdefault("MASTER_PORT", str(free_port()))

# No deadlines: the machine may be busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

accept_weights_only()

ReportT = TypeVar("ReportT", pytest.TestReport, pytest.CollectReport)

NO_CUDA = "needs a CUDA device"
ALLOWED_SKIPS = frozenset({NO_CUDA})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_CUDA))


def refuse_unlisted_skip(report: ReportT) -> ReportT:
    """Turns a skip into a failure on CI, unless it is for missing hardware."""
    if report.outcome != "skipped" or hasattr(report, "wasxfail") or not os.environ.get("CI"):
        return report
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if reason.removeprefix("Skipped: ") not in ALLOWED_SKIPS:
        report.outcome = "failed"
        report.longrepr = f"skipped on CI, which must run everything: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return refuse_unlisted_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return refuse_unlisted_skip((yield))


# Lightning sets them when it starts processes, and a Trainer with them starts none.
RANKS = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def _same_conditions() -> Iterator[None]:
    """Sets the same seeds and one thread before every test, and removes ranks that it has set."""
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    unset = [name for name in RANKS if name not in os.environ]
    yield
    for name in unset:
        os.environ.pop(name, None)
