"""The state of a combined optimizer: a view of its parts' states, and saved states by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

from torch.optim import Optimizer

from lightning_bigopt.checks import shown

__all__ = ["PartStates", "states_of_groups"]

_Group: TypeAlias = Mapping[str, Any]

_WAY_OUT = (
    "make the optimizer as in the run that saved it, or load the weights only "
    "(module.load_state_dict)"
)


class PartStates(MutableMapping[Any, Any]):
    """The states of the parameters of several optimizers, each stored in its optimizer.

    Args:
        parts: The optimizers.

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
        >>> parts = [torch.optim.SGD([weight], lr=0.1) for weight in weights]
        >>> states = PartStates(parts)
        >>> states[weights[1]] = {"step": 3}
        >>> len(states), parts[0].state[weights[0]], parts[1].state[weights[1]]
        (1, {}, {'step': 3})
    """

    def __init__(self, parts: Iterable[Optimizer]) -> None:
        self._parts = tuple(parts)

    def _owner(self, key: object) -> MutableMapping[Any, Any]:
        """Returns the states of the optimizer that has the parameter."""
        for part in self._parts:
            if key in part.state:
                return part.state
        for part in self._parts:
            if any(key is p for group in part.param_groups for p in group["params"]):
                return part.state
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return self._owner(key)[key]  # of a defaultdict: a new state for a parameter without one

    def __setitem__(self, key: Any, value: Any) -> None:
        self._owner(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._owner(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in part.state for part in self._parts)

    def get(self, key: Any, default: Any = None) -> Any:
        """Returns the state of a parameter; the default if it has none."""
        if key in self:  # without an entry in a defaultdict for a parameter without a state
            return self[key]
        return default

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(list(part.state) for part in self._parts)

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)

    def __repr__(self) -> str:
        return repr(dict(self))


def states_of_groups(
    groups: Sequence[_Group], saved: Mapping[str, Any]
) -> list[tuple[dict[str, Any], dict[Any, Any]]]:
    """Returns the saved group and the saved states of each group, matched by name.

    Args:
        groups: The groups, with ``name`` and ``param_names``.
        saved: A state dict in torch's format. Without ``param_names``, or with names instead of
            numbers in ``params``, as torch.distributed.checkpoint passes it, the parameters of a
            group have the order of this optimizer.

    Raises:
        ValueError: If a group, or a parameter of a group, is missing or unexpected.
    """
    by_name = {str(group.get("name")): group for group in saved["param_groups"]}
    own, found = [str(group["name"]) for group in groups], list(by_name)
    if set(own) != set(found) or len(saved["param_groups"]) != len(own):
        raise ValueError(
            f"state_dict must have the parameter groups {', '.join(own)}, got "
            f"{', '.join(found) or 'none'}; {_WAY_OUT}"
        )
    result = []
    for group in groups:
        other = by_name[str(group["name"])]
        order = _in_order(group, other)
        states = {key: saved["state"][key] for key in order if key in saved["state"]}
        names = list(group["param_names"])
        result.append(({**other, "params": order, "param_names": names}, states))
    return result


def _in_order(group: _Group, other: _Group) -> list[Any]:
    """Returns the keys of a saved group in the order of the parameters of a group."""
    names, keys = list(group["param_names"]), list(other["params"])
    saved_names = other.get("param_names")
    if saved_names is None or not all(isinstance(key, int) for key in keys):
        if len(keys) != len(names):
            raise ValueError(
                f"group {group['name']} of state_dict must have {len(names)} parameters, got "
                f"{len(keys)}; {_WAY_OUT}"
            )
        return keys
    by_name = dict(zip(saved_names, keys, strict=True))
    missing = [name for name in names if name not in by_name]
    unexpected = [name for name in saved_names if name not in names]
    if missing or unexpected:
        differences = [f"{name} missing" for name in missing]
        differences += [f"{name} unexpected" for name in unexpected]
        raise ValueError(
            f"group {group['name']} of state_dict must have the parameters of this optimizer, got "
            f"{shown(', '.join(differences[:5]))}; {_WAY_OUT}"
        )
    return [by_name[name] for name in names]
