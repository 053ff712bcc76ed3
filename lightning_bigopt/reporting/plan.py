"""The former module of ``plan``: its import raises with the new line."""

from __future__ import annotations

from typing import NoReturn

__all__: list[str] = []


def __getattr__(name: str) -> NoReturn:
    if name == "plan":
        raise ImportError(
            "plan has moved in lightning_bigopt 0.2; write from lightning_bigopt.tuning import plan"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
