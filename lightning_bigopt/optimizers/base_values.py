"""Base values of scheduled fields, kept on an optimizer that outlives a fit."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

__all__ = ["base_values", "remember_bases"]

_ATTRIBUTE = "_bigopt_bases"


def remember_bases(
    optimizer: Optimizer, name: str, *, values: Sequence[float], bases: Sequence[float]
) -> None:
    """Stores the base values of a field at the end of a fit, as an attribute of the optimizer.

    The attribute is no part of the optimizer's ``state_dict``.

    Args:
        optimizer: The optimizer.
        name: Name of the field.
        values: The value that each parameter group has now.
        bases: The base value of each parameter group.
    """
    stored = vars(optimizer).setdefault(_ATTRIBUTE, {})
    stored[name] = list(zip(values, bases, strict=False))


def base_values(optimizer: Optimizer, name: str, values: Sequence[float]) -> list[float]:
    """Returns the base values of a field when a fit begins, one for each parameter group.

    A base value is the current value. If an earlier fit scheduled the field, and the value has not
    changed since, it is the base value of that fit.

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
    stored: list[tuple[float, float]] = vars(optimizer).get(_ATTRIBUTE, {}).get(name, [])
    found = list(values)
    for index, (written, base) in enumerate(stored[: len(found)]):
        if found[index] == written:
            found[index] = base
    return found
