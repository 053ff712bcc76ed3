"""What Lightning 2.5 lacks: the argument ``weights_only``, and the faults of 2.5.0.

Tests pass ``weights_only=True`` to prove that a checkpoint holds plain data only. Lightning 2.5
loads every checkpoint with ``weights_only=False``; a variable of torch overrides it in the tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import lightning as L
import pytest


def fault_of_2_5_0(reason: str, *, strict: bool = True) -> pytest.MarkDecorator:
    """Marks a test that fails with Lightning 2.5.0 because of a fault or a lack of its own."""
    return pytest.mark.xfail(L.__version__ == "2.5.0", reason=f"Lightning: {reason}", strict=strict)


@contextmanager
def _loads_plain_data(weights_only: bool | None) -> Iterator[None]:
    before = dict(os.environ)
    if weights_only:
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
        os.environ.update(before)


def _wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, weights_only: bool | None = None, **options: Any) -> Any:
        with _loads_plain_data(weights_only):
            return method(*args, **options)

    return call


def accept_weights_only() -> None:
    """Adds the argument to the methods of Lightning that take it from 2.6 on; else does nothing."""
    if "weights_only" in signature(L.Trainer.fit).parameters:
        return
    for name in ("fit", "validate", "test", "predict"):
        setattr(L.Trainer, name, _wrapped(getattr(L.Trainer, name)))
    for owner in (L.LightningModule, L.LightningDataModule):
        descriptor = vars(owner)["load_from_checkpoint"]

        def load(cls: type, *args: Any, descriptor: Any = descriptor, **options: Any) -> Any:
            return _wrapped(descriptor.__get__(None, cls))(*args, **options)

        owner.load_from_checkpoint = classmethod(load)
