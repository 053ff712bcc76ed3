"""Makes the optimizer of one part of a combined optimizer, and checks it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from lightning_bigopt.optimizers.parameter_group import ParameterGroup
from lightning_bigopt.type_checks import check_callable, check_instance

__all__ = ["OptimizerFactory", "checked_factories", "make_part"]

OptimizerFactory: TypeAlias = Callable[[Iterable[Any]], Optimizer]
"""Makes an optimizer of parameter groups: a class, or ``functools.partial`` of one."""

_Group: TypeAlias = dict[str, Any]


def checked_factories(optimizers: Any) -> dict[str, OptimizerFactory]:
    """Returns ``optimizers=`` as a dict; raises unless its values can make optimizers."""
    example = "write {'*': functools.partial(torch.optim.AdamW, lr=1e-3)}"
    check_instance("optimizers", optimizers, Mapping, hint=example)
    if not optimizers:
        raise ValueError(f"optimizers must not be empty, got {{}}; {example}")
    for key, factory in optimizers.items():
        check_instance("every key of optimizers", key, str, hint=example)
        if isinstance(factory, Optimizer):
            raise ValueError(
                f"optimizers[{key!r}] must make an optimizer, got {type(factory).__name__}, which "
                "is one; write functools.partial(torch.optim.AdamW, lr=1e-3)"
            )
        check_callable(f"optimizers[{key!r}]", factory, hint=example)
    return dict(optimizers)


def make_part(
    key: str,
    factory: OptimizerFactory,
    members: Mapping[tuple[ParameterGroup | None, bool], list[str]],
    parameters: Mapping[str, nn.Parameter],
) -> Optimizer:
    """Makes the optimizer of a part.

    Args:
        key: Its key in ``optimizers=``, for errors.
        factory: Makes the optimizer of groups.
        members: For each group its specification, whether it keeps the weight decay, and the names
            of its parameters.
        parameters: The parameters by name.

    Raises:
        ValueError: If the optimizer does not accept the parameters, holds others, needs a closure,
            or has no weight decay although a group has one.
    """
    groups: list[_Group] = []
    for (specification, keeps), names in members.items():
        group: _Group = {"params": [parameters[name] for name in names], "param_names": names}
        if specification is not None and specification.weight_decay is not None:
            group["weight_decay"] = float(specification.weight_decay)
        elif not keeps:
            group["weight_decay"] = 0.0
        groups.append(group)
    try:
        part = factory(groups)
    except ValueError as error:
        first = next(chain.from_iterable(members.values()))
        raise ValueError(
            f"optimizers[{key!r}] must accept its parameters, got {first!r} and others, and the "
            f"error {str(error)!r}; match fewer, for instance 'blocks.* if ndim == 2'"
        ) from error
    check_instance(f"optimizers[{key!r}]", part, Optimizer, hint="it must return an optimizer")
    _check_part(key, part, [name for names in members.values() for name in names], parameters)
    for group, names in zip(part.param_groups, members.values(), strict=True):
        group.setdefault("param_names", names)
        if group.get("weight_decay") and "weight_decay" not in part.defaults:
            raise ValueError(
                f"weight_decay must be None for {type(part).__name__}, which has none, got "
                f"{group['weight_decay']:g}; remove it from groups"
            )
    return part


def _check_part(
    key: str, part: Optimizer, names: Sequence[str], parameters: Mapping[str, nn.Parameter]
) -> None:
    held = {id(parameter) for group in part.param_groups for parameter in group["params"]}
    if held != {id(parameters[name]) for name in names}:
        raise ValueError(
            f"optimizers[{key!r}] must hold the parameters that it is given, got "
            f"{type(part).__name__} with others; use a class of optimizers or a partial of one"
        )
    closure = inspect.signature(functools.partial(type(part).step, part)).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"optimizers[{key!r}] must step without a closure, got {type(part).__name__}; use it "
            "alone, for all parameters"
        )
