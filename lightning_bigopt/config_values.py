"""Arguments that are objects of omegaconf, as Hydra passes them by default.

With ``_convert_: none``, Hydra's default, a list or dictionary of a config reaches a constructor as
a ListConfig or DictConfig, and dataclasses in it as DictConfigs that remember the class. This
package does not import omegaconf: code that passes such an object has already imported it.
"""

from __future__ import annotations

import sys
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["CONVERT", "check_convertible", "is_config", "python_value"]

CONVERT = "write _convert_: all (or object) beside _target_ in the config"
"""Advice for a value that Hydra has not converted."""

_PRIMITIVES = (int, float, str, bool, bytes, type(None))


def is_config(value: object) -> bool:
    """Returns whether a value is a DictConfig or ListConfig.

    Example:
        >>> is_config([1, 2])
        False
    """
    return type(value).__module__.partition(".")[0] == "omegaconf"


def python_value(name: str, value: Any) -> Any:
    """Returns a DictConfig or ListConfig as a dict, list or dataclass; other values unchanged.

    Args:
        name: Name of the argument.
        value: Value of the argument.

    Raises:
        ValueError: If a value is missing, or an object cannot be created again from its fields.

    Example:
        >>> python_value("sizes", [1, 2])
        [1, 2]
    """
    if not is_config(value):
        return value
    try:
        return sys.modules["omegaconf"].OmegaConf.to_object(value)
    except Exception as error:
        raise ValueError(
            f"{name} must contain Python objects, got a {type(value).__name__} that cannot be "
            f"converted ({str(error).splitlines()[0]}); {CONVERT}"
        ) from error


def check_convertible(specification: object) -> None:
    """Raises if omegaconf cannot put an object into its lists and dictionaries.

    Omegaconf raises for a field whose annotation is a union of other classes than numbers and
    strings, such as ``Duration | int | float | str``; its error does not name the way out.

    Args:
        specification: An instance of a dataclass.

    Raises:
        ValueError: If there is such a field.

    Example:
        >>> from lightning_bigopt.schedules import Cosine
        >>> check_convertible(Cosine())
    """
    cls = type(specification)
    if any(map(_is_rejected, get_type_hints(cls).values())):
        raise ValueError(
            "_convert_ must be all or object for a list or dictionary that contains "
            f"{cls.__name__}, got none; {CONVERT}"
        )


def _is_rejected(annotation: Any) -> bool:
    is_union = isinstance(annotation, types.UnionType) or get_origin(annotation) is Union
    members = [member for member in get_args(annotation) if member is not type(None)]
    return is_union and len(members) > 1 and not set(members) <= set(_PRIMITIVES)
