"""Fixtures of the tests of callbacks."""

from __future__ import annotations

import logging

import pytest
from lightning_utilities.core import rank_zero


@pytest.fixture
def info_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Captures what Lightning and the callbacks log at the level INFO."""
    caplog.set_level(logging.INFO, logger=rank_zero.log.name)
    return caplog
