"""The ranges of the fields that a comparison tunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_bigopt.checks import shown
from lightning_bigopt.tuning.space import Log, Range, checked_space
from lightning_bigopt.tuning.trainings import Trainings

__all__ = ["checked_paths", "tuned_ranges"]

_FACTOR = 16  # of the default range of a learning rate, in both directions


def checked_paths(name: str, paths: Any) -> tuple[str, ...]:
    """Returns paths of fields as a tuple; an empty one for None.

    Args:
        name: Name of the argument.
        paths: A path, several, or None.

    Raises:
        ValueError: If it is something else, or contains a path twice.

    Example:
        >>> checked_paths("tune", "lr"), checked_paths("tune", None)
        (('lr',), ())
    """
    if paths is None:
        return ()
    found = (paths,) if isinstance(paths, str) else paths
    is_list = isinstance(found, Sequence) and len(found) > 0
    if not is_list or not all(isinstance(path, str) and path for path in found):
        raise ValueError(
            f"{name} must be the path of a field, a list of paths or None, got {shown(paths)}; "
            f"write {name}='lr'"
        )
    if len(set(found)) < len(found):
        raise ValueError(
            f"{name} must contain each path once, got {shown(list(found))}; remove the repeated one"
        )
    return tuple(found)


def tuned_ranges(
    trainings: Trainings, paths: Sequence[str], space: Mapping[str, Range] | None, *, name: str
) -> dict[str, Range]:
    """Returns the range of each tuned field of a side.

    A learning rate without a range gets one from a sixteenth of its value to sixteen times it.

    Args:
        trainings: The trainings of the side.
        paths: Paths of the tuned fields.
        space: Ranges by path.
        name: Name of the side, for messages.

    Raises:
        ValueError: If a field does not exist, or there is no range for it.
    """
    given = {} if space is None else checked_space(space)
    ranges: dict[str, Range] = {}
    for path in paths:
        value = trainings.value(path)
        ranges[path] = given[path] if path in given else _around(path, value, name=name)
    return ranges


def _around(path: str, value: Any, *, name: str) -> Range:
    last = path.rpartition(".")[2]
    is_rate = last.split("_")[-1] == "lr" or last.endswith("learning_rate")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    if is_rate and is_number:
        return Log(value / _FACTOR, value * _FACTOR)
    reason = f"whose value in {name} is {shown(value)}" if is_rate else "which is no learning rate"
    raise ValueError(
        f"space must contain a range for each path of tune, got none for {path!r}, {reason}; write "
        f"space={{{path!r}: Log(1e-4, 1e-1)}}, or a line of the file given as --space"
    )
