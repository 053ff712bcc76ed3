"""Base values of scheduled fields: where they are kept, and what other code has written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_bigopt.optimizers.group_field import GroupField
from lightning_bigopt.optimizers.names import part_optimizers

__all__ = [
    "BaseValues",
    "ForeignValue",
    "base_values",
    "is_loaded_state",
    "matching_groups",
    "remember_bases",
    "separate_tensors",
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


class _Remembered(NamedTuple):
    """The last value and the base value of a field of one parameter group."""

    group: dict[str, Any]
    written: float | None
    base: float


def remember_bases(
    optimizer: Optimizer, name: str, *, values: Sequence[float | None], bases: Sequence[float]
) -> None:
    """Stores the base values of a field as an attribute of the optimizer.

    The attribute is no part of the optimizer's ``state_dict``, of its copies and of its pickles.

    Args:
        optimizer: The optimizer.
        name: Name of the field.
        values: The value that was written last to each parameter group; None for no value.
        bases: The base value of each parameter group.
    """
    stored = vars(optimizer).setdefault(_ATTRIBUTE, {})
    # With the groups: load_state_dict replaces them, and then the stored values are not theirs.
    stored[name] = list(zip(optimizer.param_groups, values, bases, strict=False))


class BaseValues(NamedTuple):
    """The base values of a field when a fit begins.

    Attributes:
        values: The base value of each parameter group.
        note: A line for the log, if it is not certain that these are the configured values.
    """

    values: list[float]
    note: str = ""


def base_values(optimizer: Optimizer, field: GroupField) -> BaseValues:
    """Returns the base values of a field when a fit begins, one for each parameter group.

    If an earlier fit scheduled the field, and the value has not changed since, it is the base value
    of that fit; a value that has changed is the base value itself. Without an earlier fit the base
    learning rate is ``initial_lr``, as in torch's schedulers, if the group has one. In all other
    cases it is the current value.

    Args:
        optimizer: The optimizer.
        field: The field.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
        >>> remember_bases(optimizer, "lr", values=[0.0], bases=[0.4])
        >>> base_values(optimizer, GroupField("lr")).values
        [0.4]
        >>> optimizer.param_groups[0]["lr"] = 0.1
        >>> base_values(optimizer, GroupField("lr")).values
        [0.1]
    """
    stored = [_Remembered(*one) for one in vars(optimizer).get(_ATTRIBUTE, {}).get(field.name, [])]
    found = field.read_all(optimizer.param_groups)
    current = [0.0 if value is None else value for value in found]
    bases: list[float] = []
    changes: list[tuple[float, float]] = []  # by other code, since an earlier fit
    unknown: list[float | None] = []  # the defaults of groups with other values
    for group, value in zip(optimizer.param_groups, found, strict=True):
        if value is None:  # the group does not have the field, and its base is not used
            bases.append(0.0)
            continue
        known = next((one for one in stored if one.group is group), None)
        if known is not None and known.written is not None and value != known.written:
            bases.append(value)
            changes.append((known.written, value))
        elif field.name == "lr" and "initial_lr" in group:
            bases.append(float(group["initial_lr"]))
        else:
            bases.append(value if known is None else known.base)
            if known is None and value != (default := _default(optimizer, group, field)):
                unknown.append(default)
    of = f"{field.name} of {type(optimizer).__name__}"
    notes: list[str] = []
    if changes:
        before, after = ([change[i] for change in changes] for i in (0, 1))
        notes.append(
            f"Other code has changed {of} since the last fit, from {before} to {after}. "
            "This is the new base value, which the schedule multiplies."
        )
    elif bases != current:
        kind = "learning rates" if field.name == "lr" else f"values of {field.name}"
        notes.append(
            f"The base {kind} of {type(optimizer).__name__} are {bases}, before an earlier fit or "
            f"scheduler changed them to {current}."
        )
    # A state that was loaded from another optimizer may have values of an earlier schedule. Without
    # any state an optimizer has never stepped, except for those that keep none. Several groups
    # usually have values of their own.
    is_used = bool(getattr(optimizer, "state", None)) or len(current) == 1
    if unknown and is_used and field.name != "lr":
        notes.append(
            f"The base values of {of} are {bases}, the current values of its parameter groups, and "
            f"its default is {unknown[0]}. If an earlier fit has changed them, as "
            "in a state_dict that was loaded into another optimizer, write the configured values "
            "into the groups before the fit."
        )
    return BaseValues(bases, " ".join(notes))


def _default(optimizer: Optimizer, group: dict[str, Any], field: GroupField) -> float | None:
    """Returns the default of a field for a group without a value of its own; None for none."""
    holder = optimizer
    for part in part_optimizers(optimizer).values():
        if any(group is one for one in part.param_groups):
            holder = part
    try:
        return field.read(getattr(holder, "defaults", {}))
    except ValueError:
        return None


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


def separate_tensors(optimizers: Iterable[Optimizer]) -> None:
    """Gives each group its own tensors: a value is written in place, and would reach all groups.

    The defaults of an optimizer, which a group that is added later gets, are separated, too.
    """
    seen: set[int] = set()
    parts = [part for one in optimizers for part in part_optimizers(one).values() or (one,)]
    for optimizer in parts:
        for group in optimizer.param_groups:
            for name, value in group.items():
                if not isinstance(value, Tensor):
                    continue
                if optimizer.defaults.get(name) is value:
                    optimizer.defaults[name] = group[name].clone()
                if id(value) in seen:
                    group[name] = value.clone()
                seen.add(id(group[name]))
