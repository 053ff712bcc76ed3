"""Finds the capabilities that override each stage, so that the engine skips the others."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bigopt.engine.saved_state import SavedState
from lightning_bigopt.engine.stage import Stages

__all__ = ["overriding"]


def overriding(capabilities: Sequence[Stages]) -> dict[str, list[Stages]]:
    """Returns the capabilities that override each stage, in their order."""
    methods = {**vars(Stages), **vars(SavedState)}
    stages = [name for name, value in methods.items() if callable(value) and name[0] != "_"]
    return {
        stage: [c for c in capabilities if getattr(type(c), stage) is not getattr(Stages, stage)]
        for stage in stages
    }
