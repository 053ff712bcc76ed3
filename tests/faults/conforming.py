"""Decides by annotations alone whether an argument may have a value; an oracle without the checks.

The package checks its arguments by functions of its own. This module reads the annotations of the
signature instead: a bool is no number, a number is finite, and a string is not a sequence.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from lightning_bigopt import Duration

_NAMES = {
    **vars(typing),
    "Callable": Callable,
    "Dataset": Dataset,
    "Iterable": Iterable,
    "LightningDataModule": LightningDataModule,
    "LightningModule": LightningModule,
    "Mapping": Mapping,
    "Optimizer": Optimizer,
    "Sequence": Sequence,
    "Tensor": Tensor,
    "Trainer": Trainer,
    "nn": nn,
}
_TEXT = re.compile(r"\s*\+?(\d[\d_.]*|\.\d+)(e[+-]?\d+)?\s*[KMBT]?\s*(%|[a-z]+)?\s*", re.IGNORECASE)


def hints(call: Any) -> dict[str, Any]:
    """Returns the type of every argument of a class or function."""
    names = {**_NAMES, **vars(sys.modules[call.__module__])}
    return {
        name: eval(parameter.annotation, names)
        if isinstance(parameter.annotation, str)
        else parameter.annotation
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def conforms(value: object, hint: Any) -> bool:
    """Returns whether a value may be passed for an argument with a type annotation."""
    try:
        return _conforms(value, hint)
    except Exception:  # noqa: BLE001  # a value that cannot be iterated or compared
        return False


def _conforms(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (Union, types.UnionType):
        return _conforms_to_any(value, set(arguments))
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if arguments:
        return _conforms_to_container(value, origin, arguments)
    return _conforms_to_class(value, origin or hint)


def _conforms_to_any(value: Any, members: set[Any]) -> bool:
    if {int, float, str} <= members:  # the type of a duration
        members = members - {Duration, int, float, str}
        return _is_duration(value) or any(conforms(value, member) for member in members)
    return any(conforms(value, member) for member in members)


def _conforms_to_container(value: Any, origin: Any, arguments: tuple[Any, ...]) -> bool:
    if origin is Callable:
        return callable(value)
    if isinstance(value, str | bytes | bytearray):
        return False
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _conforms(key, arguments[0]) and _conforms(item, arguments[1])
            for key, item in value.items()
        )
    if origin is tuple and arguments[-1] is not Ellipsis:
        return len(value) == len(arguments) and all(map(_conforms, value, arguments))
    if origin is Dataset:
        return _conforms_to_class(value, Dataset)
    # A tuple is made of any iterable.
    kind = Iterable if origin in (tuple, Iterable) else Sequence
    return (
        isinstance(value, kind)
        and not isinstance(value, Tensor | Mapping)
        and all(_conforms(item, arguments[0]) for item in islice(value, 100))
    )


def _conforms_to_class(value: Any, kind: Any) -> bool:
    if kind in (None, type(None)):
        return value is None
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str | os.PathLike)
    if kind is Dataset:  # torch's loaders take anything with a length and an index
        is_other = isinstance(value, str | bytes | bytearray | Mapping | type)
        return len(value) > 0 and hasattr(value, "__getitem__") and not is_other
    return isinstance(value, kind)


def _is_duration(value: Any) -> bool:
    """Returns whether a value has one of the forms of a duration; its unit may be unknown."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return False
    if isinstance(value, Duration):
        return True
    if isinstance(value, int):
        return 0 <= value < sys.float_info.max
    if isinstance(value, float):
        return 0 <= value <= 1
    return isinstance(value, str) and bool(_TEXT.fullmatch(value))
