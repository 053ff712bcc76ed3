"""Finds the capabilities that override each stage, so that the engine skips the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from lightning_bigopt.engine.saved_state import SavedState

__all__ = ["overriding"]

CapabilityT = TypeVar("CapabilityT", bound=SavedState)


def overriding(
    capabilities: Sequence[CapabilityT], protocol: type[CapabilityT]
) -> dict[str, list[CapabilityT]]:
    """Returns the capabilities that override each stage, in their order.

    Args:
        capabilities: The capabilities.
        protocol: The class with all stages, Stages.
    """
    methods = {**vars(protocol), **vars(SavedState)}
    stages = [name for name, value in methods.items() if callable(value) and name[0] != "_"]
    return {
        stage: [c for c in capabilities if getattr(type(c), stage) is not getattr(protocol, stage)]
        for stage in stages
    }
