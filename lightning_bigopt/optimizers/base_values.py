"""Base values of scheduled fields: where they are kept, and what other code has written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch.optim import Optimizer

__all__ = [
    "ForeignValue",
    "base_values",
    "is_loaded_state",
    "matching_groups",
    "remember_bases",
]

_ATTRIBUTE = "_bigopt_bases"


class ForeignValue(NamedTuple):
    """A value that other code has written to a scheduled field.

    Attributes:
        field: Name of the field.
        optimizer: Label of the optimizer; empty if there is only one.
        group: Name of the group; empty if there is only one.
        written: The value that the schedule had written.
        value: The value that was found; equal to ``written`` if the other code has restored it.
        used: The value that an update has used instead of ``written``; None if there is none.
    """

    field: str
    optimizer: str
    group: str
    written: float
    value: float
    used: float | None = None

    def __str__(self) -> str:
        place = " ".join(name for name in (self.optimizer, self.group) if name)
        changed = self.used if self.used is not None and self.is_temporary else self.value
        return f"{self.field}{f' of {place}' if place else ''} from {self.written:g} to {changed:g}"

    @property
    def is_temporary(self) -> bool:
        """Whether the other code has restored the value after an update had used its own."""
        return self.value == self.written


def remember_bases(
    optimizer: Optimizer, name: str, *, values: Sequence[float | None], bases: Sequence[float]
) -> None:
    """Stores the base values of a field at the end of a fit, as an attribute of the optimizer.

    The attribute is no part of the optimizer's ``state_dict``.

    Args:
        optimizer: The optimizer.
        name: Name of the field.
        values: The value that was written last to each parameter group; None for no value.
        bases: The base value of each parameter group.
    """
    stored = vars(optimizer).setdefault(_ATTRIBUTE, {})
    stored[name] = list(zip(values, bases, strict=False))


def base_values(optimizer: Optimizer, name: str, values: Sequence[float]) -> list[float]:
    """Returns the base values of a field when a fit begins, one for each parameter group.

    If an earlier fit scheduled the field, and the value has not changed since, it is the base value
    of that fit; a value that has changed is the base value itself. Without an earlier fit the base
    learning rate is ``initial_lr``, as in torch's schedulers, if the group has one. In all other
    cases it is the current value.

    Args:
        optimizer: The optimizer.
        name: Name of the field.
        values: The current value of each parameter group.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
        >>> remember_bases(optimizer, "lr", values=[0.0], bases=[0.4])
        >>> base_values(optimizer, "lr", [0.0]), base_values(optimizer, "lr", [0.1])
        ([0.4], [0.1])
    """
    stored: list[tuple[float | None, float]] = vars(optimizer).get(_ATTRIBUTE, {}).get(name, [])
    found = list(values)
    for index, group in enumerate(optimizer.param_groups):
        written, base = stored[index] if index < len(stored) else (None, found[index])
        initial = float(group.get("initial_lr", found[index])) if name == "lr" else None
        if initial is not None and (written is None or (found[index], initial) in stored):
            found[index] = initial  # also if the groups have other positions now
        elif found[index] == written:
            found[index] = base
    return found


def matching_groups(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> list[int | None]:
    """Returns the former position of each parameter group; None for a new group.

    Groups are compared by identity. If every dictionary is new, the positions are kept:
    ``load_state_dict`` of an optimizer replaces all of them.

    Example:
        >>> a, b, c = {"lr": 1}, {"lr": 2}, {"lr": 3}
        >>> matching_groups([a, b], [b, c]), matching_groups([a], [dict(a), dict(b)])
        ([1, None], [0, None])
    """
    places = [next((i for i, old in enumerate(before) if old is group), None) for group in now]
    if any(place is not None for place in places):
        return places
    return [index if index < len(before) else None for index in range(len(now))]


def is_loaded_state(
    before: Sequence[Mapping[str, Any]],
    now: Sequence[Mapping[str, Any]],
    bases: Sequence[float] | None,
) -> bool:
    """Returns whether ``load_state_dict`` has loaded an earlier state of the same run.

    Its values are those of earlier updates, not new base values.

    Args:
        before: The former groups.
        now: The groups.
        bases: The base learning rates; None if the learning rate is not scheduled.
    """
    if any(group is old for group in now for old in before):
        return False
    return bases is None or [g.get("initial_lr") for g in now] == list(bases[: len(now)])
