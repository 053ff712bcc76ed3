"""Checks of the arguments of ModelAveraging."""

from __future__ import annotations

import re
from typing import Any, TypeAlias

import torch

from lightning_bigopt.averaging.average import Average
from lightning_bigopt.checks import check_choice, shown
from lightning_bigopt.type_checks import check_instance

__all__ = ["TRAINING", "AnyAverages", "checked_device", "checked_dtype", "named_averages", "used"]

AnyAverages: TypeAlias = Average | dict[str, Average]

TRAINING = "training"
"""The value of ``use`` for the training weights."""

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_HINT = "try EMA(half_life='1%')"


def named_averages(averages: Any) -> dict[str, Average]:
    """Returns averages by name; a single one has the name of its class in lowercase.

    Raises:
        ValueError: If there is none, a name is reserved or no word, or a value is no average.

    Example:
        >>> from lightning_bigopt import TailMean
        >>> named_averages(TailMean(over="10%"))
        {'tail_mean': TailMean(over='10%')}
    """
    if isinstance(averages, Average):
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(averages).__name__).lower()
        return {name: averages}
    check_instance("averages", averages, (Average, dict), hint=_HINT)
    if not averages:
        raise ValueError(f"averages must contain an average, got {shown(averages)}; {_HINT}")
    for name, average in averages.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name == TRAINING:
            raise ValueError(
                "the names of averages must consist of letters, digits, '_', '-' and '.', and not "
                f"be {TRAINING!r}, got {shown(name)}; write {{'ema': EMA(half_life='1%')}}"
            )
        check_instance(f"averages[{name!r}]", average, Average, hint=_HINT)
    return dict(averages)


def used(use: str | None, averages: dict[str, Average]) -> str:
    """Returns the name of the average that is the model.

    Raises:
        ValueError: If it is unknown, or not given for several averages.
    """
    if use is None and len(averages) == 1:
        return next(iter(averages))
    check_choice("use", use, [*averages, TRAINING], hint=f"write use={next(iter(averages))!r}")
    assert use is not None  # checked
    return use


def checked_device(device: str | None) -> torch.device | None:
    """Returns a device; raises a ValueError for an unknown one."""
    if device is None:
        return None
    try:
        check_instance("device", device, (str, torch.device), hint="write 'cpu'")
        return torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device must be a device of torch or None, got {shown(device)}; write 'cpu'"
        ) from None


def checked_dtype(dtype: str | None) -> torch.dtype | None:
    """Returns a floating-point data type by its name; raises a ValueError for others."""
    if dtype is None:
        return None
    is_name = isinstance(dtype, str | torch.dtype)
    name: Any = str(dtype).removeprefix("torch.") if is_name else dtype
    check_choice("dtype", name, _DTYPES, hint="write 'float32', or None")
    found: torch.dtype = getattr(torch, name)
    return found
