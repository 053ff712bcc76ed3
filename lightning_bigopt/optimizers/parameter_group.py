"""ParameterGroup: parameters by pattern, with a learning-rate factor and a weight decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_bigopt.arguments import Specification, explain_arguments
from lightning_bigopt.checks import check_non_negative, check_positive, shown
from lightning_bigopt.config_values import python_value
from lightning_bigopt.parameters import (
    as_patterns,
    check_all_match,
    first_match,
    plain_name,
    tied_names,
)
from lightning_bigopt.type_checks import check_instance, checked_tuple

__all__ = [
    "ParameterGroup",
    "checked_groups",
    "match",
    "match_groups",
    "trainable_parameters",
]


@explain_arguments
@dataclass(frozen=True)
class ParameterGroup(Specification):
    """Parameters by pattern, with a learning-rate factor and a weight decay of their own.

    For ``groups=`` of :func:`parameter_groups`, :class:`CombinedOptimizer` and
    :class:`MuonAdamW`. The first group with a matching pattern decides. A schedule of the group:
    ``LearningRateScheduler(…, groups={name: …})``.

    Args:
        pattern: A pattern of names (as in :mod:`fnmatch`), or several. A pattern may have a rule
            about the number of dimensions: ``"blocks.* if ndim == 2"``, also with ``>=`` and
            ``<=``.
        name: Name of the group, in charts and for schedules; must not end in ``decay`` or
            ``no_decay``.
        lr_factor: Factor on the learning rate; positive.
        weight_decay: Weight decay of all its parameters, including biases; None for the usual one.

    Raises:
        ValueError: If a value is out of range; where the group is used if a pattern matches
            nothing.

    Example:
        >>> ParameterGroup("head.*", name="head", lr_factor=0.1)
        ParameterGroup(pattern=('head.*',), name='head', lr_factor=0.1, weight_decay=None)
    """

    _used_in: ClassVar[str] = "parameter_groups(module, weight_decay=0.1, groups=[{}])"

    pattern: tuple[str, ...] | str
    _: KW_ONLY
    name: str
    lr_factor: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        patterns = as_patterns(self.pattern, name="pattern")
        if not patterns:
            raise ValueError(f"pattern must not be empty, got {self.pattern!r}; write 'head.*'")
        object.__setattr__(self, "pattern", patterns)
        check_instance("name", self.name, str, hint="write name='head'")
        if not self.name:
            raise ValueError("name must not be empty, got ''; write name='head'")
        if self.name.rpartition(".")[2] in ("decay", "no_decay"):
            raise ValueError(
                "name must not end in 'no_decay' or 'decay', which name groups with and without "
                f"weight decay, got {self.name!r}; write name='head'"
            )
        check_positive("lr_factor", self.lr_factor, hint="for instance 0.1")
        if self.weight_decay is not None:
            check_non_negative("weight_decay", self.weight_decay, hint="for instance 0.1")


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that require a gradient, by their plain names.

    Raises:
        ValueError: If there is none, or a lazy one without a shape.
    """
    parameters = {
        plain_name(name): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    if not parameters:
        raise ValueError(
            "module must have a parameter to train, got none that requires a gradient; unfreeze one"
        )
    for name, parameter in parameters.items():
        if is_lazy(parameter):  # with one dimension, whatever it will have
            raise ValueError(
                f"module must have initialized parameters, got {name!r} without a shape; pass a "
                "batch through its lazy layers before"
            )
    return parameters


def match(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    patterns: Sequence[str],
    *,
    name: str,
) -> tuple[int | None, ...]:
    """Returns for each parameter the index of the first pattern that it matches, or None.

    Args:
        module: The module of the parameters.
        parameters: Its trainable parameters by name.
        patterns: The patterns, perhaps with rules.
        name: Description of the patterns, for the error.

    Raises:
        ValueError: If a pattern is the first match of no parameter.
    """
    names, patterns = tuple(parameters), tuple(patterns)
    ndims = tuple(parameter.ndim for parameter in parameters.values())
    frozen = {plain_name(n): p.ndim for n, p in module.named_parameters() if not p.requires_grad}
    of_frozen = set(first_match(tuple(frozen), patterns, tuple(frozen.values())))
    matches = first_match(names, patterns, ndims)
    for index in sorted(i for i in of_frozen - set(matches) if i is not None):
        raise ValueError(
            f"{name} must match a parameter that requires a gradient, got "
            f"{shown(patterns[index])}, which matches frozen ones only; unfreeze them or remove "
            "the pattern"
        )
    check_all_match(names, patterns, tied_names(module), name=name, ndims=ndims)
    return matches


def checked_groups(groups: Any) -> tuple[ParameterGroup, ...]:
    """Returns ``groups=`` as a tuple; raises unless its elements are groups with different names.

    Raises:
        ValueError: If an element is no ParameterGroup, or two have the same name.
    """
    groups = python_value("groups", groups)
    if groups is None or (isinstance(groups, (list, tuple)) and not groups):
        return ()
    hint = "write [ParameterGroup('head.*', name='head')]"
    found = checked_tuple("groups", groups, ParameterGroup, hint=hint)
    names = [group.name for group in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"groups must have different names, got {name!r} twice; write one group with a "
                "list of patterns"
            )
    return found


def match_groups(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup]
) -> list[ParameterGroup | None]:
    """Returns the group of each parameter; None without a match."""
    owners = [(pattern, group) for group in groups for pattern in group.pattern]
    patterns = [pattern for pattern, _ in owners]
    matches = match(module, parameters, patterns, name="every pattern of groups")
    return [None if index is None else owners[index][1] for index in matches]
