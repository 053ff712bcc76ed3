"""Records the constructor arguments of callbacks of Lightning and of the user."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_bigopt.arguments import record_arguments
from lightning_bigopt.trainer_access.packages import classes

__all__ = ["constructors_recorded"]


@contextmanager
def constructors_recorded() -> Iterator[None]:
    """Records the constructor arguments of all callbacks that are made in the block.

    Classes that are defined in the block are not recorded.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> from lightning_bigopt.arguments import recorded_arguments
        >>> with constructors_recorded():
        ...     callback = EarlyStopping("val_loss", min_delta=0.1)
        >>> recorded_arguments(callback), recorded_arguments(EarlyStopping("val_loss"))
        ((('val_loss',), {'min_delta': 0.1}), None)
    """
    kinds = {kind for base in classes("Callback") for kind in _subclasses(base)}
    replaced = {kind: vars(kind)["__init__"] for kind in kinds if "__init__" in vars(kind)}
    for kind, init in replaced.items():
        kind.__init__ = _recording(init)
    try:
        yield
    finally:
        for kind, init in replaced.items():
            kind.__init__ = init


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def record_and_init(self: Any, *args: Any, **kwargs: Any) -> None:
        record_arguments(self, args, kwargs)  # those of the subclass are stored first
        init(self, *args, **kwargs)

    return record_and_init


def _subclasses(kind: type[Any]) -> set[type[Any]]:
    below = kind.__subclasses__()
    return {*below, *(inner for each in below for inner in _subclasses(each))}
