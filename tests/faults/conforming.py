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
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Iterable as AbcIterable
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
    "Iterable": AbcIterable,
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
    except Exception:  # a value that cannot be iterated or compared
        return False


def _conforms(value: Any, hint: Any) -> bool:
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        members = set(arguments)
        if {int, float, str} <= members:  # the type of a duration
            return _is_duration(value) or any(
                conforms(value, member) for member in members - {Duration, int, float, str}
            )
        return any(conforms(value, member) for member in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        origin = AbcIterable  # stored as a tuple
    if origin is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(map(_conforms, value, arguments))
        )
    if origin is list or (origin is not None and issubclass(origin, Sequence)):
        return (
            isinstance(value, Sequence)
            and not isinstance(value, str | bytes | bytearray)
            and all(_conforms(item, arguments[0]) for item in value[:10])
        )
    if origin is AbcIterable:
        return not isinstance(value, str | bytes | bytearray | Tensor | Mapping) and all(
            _conforms(item, arguments[0]) for item in islice(value, 100)
        )
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _conforms(key, arguments[0]) and _conforms(item, arguments[1])
            for key, item in value.items()
        )
    if origin is not None and origin is Callable:
        return callable(value)
    kind = origin or hint
    if kind is Dataset:  # torch's loaders take anything with a length and an index
        return (
            len(value) > 0
            and hasattr(value, "__getitem__")
            and not isinstance(value, str | bytes | bytearray | Mapping | type)
        )
    if kind is str:
        return isinstance(value, str | os.PathLike)
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
