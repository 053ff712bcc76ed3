"""Names of optimizers and of their parameter groups, for tags and messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_bigopt.checks import shown

__all__ = [
    "check_optimizer",
    "group_names",
    "is_opacus_optimizer",
    "optimizer_label",
    "part_optimizers",
    "unwrapped",
]


# Of the wrappers of Lightning and Fabric. Their classes are also subclasses of the wrapped class.
_WRAPPERS = frozenset(
    {
        "lightning.fabric.wrappers",
        "lightning.pytorch.core.optimizer",
        "lightning_fabric.wrappers",
        "pytorch_lightning.core.optimizer",
    }
)


def unwrapped(optimizer: Any) -> Optimizer:
    """Returns the torch optimizer inside a wrapper of Lightning or Fabric.

    Other optimizers are returned unchanged, also those that wrap another one, as Lookahead does:
    their step is the step of the fit.
    """
    kind = type(optimizer)
    if issubclass(kind, Optimizer) and not any(c.__module__ in _WRAPPERS for c in kind.__mro__):
        return optimizer  # type: ignore[no-any-return]
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    check_optimizer(inner)
    return inner


def check_optimizer(optimizer: object) -> None:
    """Raises unless a value is an optimizer of torch, or a wrapper of one.

    Example:
        >>> check_optimizer(0.1)
        Traceback (most recent call last):
        ValueError: optimizer must be a torch optimizer, got 0.1; pass the optimizer that steps
    """
    if not hasattr(optimizer, "param_groups") or isinstance(optimizer, type):
        raise ValueError(
            f"optimizer must be a torch optimizer, got {shown(optimizer)}; pass the optimizer that "
            "steps"
        )


def optimizer_label(optimizers: Sequence[Any], optimizer: Optimizer) -> str:
    """Returns the label of an optimizer.

    Args:
        optimizers: All optimizers of a fit.
        optimizer: One of them, unwrapped.

    Returns:
        An empty string if there is only one optimizer; else the name of its class, with a number if
        several optimizers have the same class.

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
        >>> a, b = torch.optim.SGD(weights[:1], lr=1), torch.optim.SGD(weights[1:2], lr=1)
        >>> c = torch.optim.Adam(weights[2:])
        >>> [optimizer_label([a, b, c], one) for one in (a, b, c)], optimizer_label([a], a)
        (['SGD-0', 'SGD-1', 'Adam'], '')
    """
    if len(optimizers) <= 1:
        return ""
    name = type(optimizer).__name__
    same = [one for one in map(unwrapped, optimizers) if type(one).__name__ == name]
    if len(same) == 1:
        return name
    return f"{name}-{[id(one) for one in same].index(id(optimizer))}"


def group_names(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the names of an optimizer's groups for tags; an empty string for a single group.

    Groups with the same name share a schedule; their tags are numbered.

    Example:
        >>> group_names([{"name": "decay"}, {}]), group_names([{}])
        (['decay', 'group1'], [''])
        >>> group_names([{"name": "body"}, {"name": "body"}, {"name": "head"}])
        ['body-0', 'body-1', 'head']
    """
    several = len(groups) > 1
    names = [
        str(group.get("name") or (f"group{index}" if several else ""))
        for index, group in enumerate(groups)
    ]
    if len(set(names)) == len(names):
        return names
    return [
        f"{name}-{index}" if names.count(name) > 1 else name for index, name in enumerate(names)
    ]


def part_optimizers(optimizer: Any) -> dict[str, Optimizer]:
    """Returns the parts of a combined optimizer by name; empty for any other optimizer."""
    parts: Any = getattr(optimizer, "parts", None)
    is_combined = isinstance(parts, dict) and all(isinstance(p, Optimizer) for p in parts.values())
    return parts if is_combined else {}


def is_opacus_optimizer(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer is from Opacus: it clips per sample and adds noise."""
    return any(base.__module__.split(".")[0] == "opacus" for base in type(optimizer).__mro__)
