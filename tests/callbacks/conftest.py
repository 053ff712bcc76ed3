"""Fixtures of the tests of callbacks."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture
def info_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Captures what Lightning and the callbacks log at the level INFO."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    return caplog
