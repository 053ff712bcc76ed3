"""Names of parameters, patterns that match them, and the blocks that they belong to."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bigopt.checks import shown

__all__ = [
    "as_patterns",
    "block_of",
    "check_all_match",
    "first_match",
    "listed",
    "named_parameters",
    "numbered_prefix",
    "parameter_names",
    "plain_name",
    "tied_names",
]

_MOST_ELEMENTS = 10_000_000
_NO_LISTS = (str, bytes, bytearray, Mapping, Tensor, type)
T = TypeVar("T")

# Parts that FSDP1, torch.compile and activation checkpointing insert into names.
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """Returns the name of a parameter without the parts that wrappers insert.

    Example:
        >>> plain_name("_orig_mod.head._fsdp_wrapped_module.weight")
        'head.weight'
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Returns the plain names of all parameters, including frozen ones."""
    return tuple(plain_name(name) for name, _ in module.named_parameters())


def tied_names(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Returns pairs of the second name of a tied parameter and its first, which is used.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(5, 2), "head": nn.Linear(2, 5)})
        >>> model["head"].weight = model["embed"].weight
        >>> parameter_names(model), tied_names(model)
        (('embed.weight', 'head.bias'), (('head.weight', 'embed.weight'),))
    """
    first: dict[int, str] = {}
    pairs = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            pairs.append((plain_name(name), plain_name(known)))
    return tuple(pairs)


def named_parameters(module: nn.Module, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters of an optimizer with their plain names in the module.

    Each tensor is listed once, in the order of the groups. A parameter that is not in the module is
    named by its position, such as ``"group0.2"``.
    """
    names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), f"group{index}.{position}")
            found.setdefault(id(parameter), (name, parameter))
    return list(found.values())


def numbered_prefix(name: str) -> str:
    """Returns the name up to its first number; empty if it contains no number.

    Example:
        >>> numbered_prefix("gpt.h.3.attn.weight"), numbered_prefix("head.weight")
        ('gpt.h.3', '')
    """
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def block_of(name: str) -> str:
    """Returns the block that a parameter belongs to, by its name.

    This is the name up to its first number, which is the index of the block in most models, or
    the name of the module that owns the parameter if there is no number.

    Example:
        >>> block_of("gpt.h.3.attn.weight"), block_of("gpt.wte.weight"), block_of("scale")
        ('gpt.h.3', 'gpt.wte', 'scale')
    """
    plain = plain_name(name)
    return numbered_prefix(plain) or plain.rpartition(".")[0] or plain


def listed(values: Any, kind: type[T], *, most: int = _MOST_ELEMENTS) -> list[T] | None:
    """Returns the elements of an iterable; None unless all are instances of a class.

    A string, bytes and a mapping are no iterables here.

    Args:
        values: The iterable, which may be endless.
        kind: The class of the elements.
        most: Number of elements after which no more are taken.

    Example:
        >>> listed(("a", "b"), str), listed("ab", str), listed(["a", 1], str)
        (['a', 'b'], None, None)
    """
    if not isinstance(values, Iterable) or isinstance(values, _NO_LISTS):
        return None
    found: list[T] = []
    try:
        for value in islice(values, most):
            if not isinstance(value, kind):
                return None
            found.append(value)
    except TypeError:  # an array without dimensions
        return None
    return found


def as_patterns(patterns: str | Iterable[str], *, name: str = "patterns") -> tuple[str, ...]:
    """Converts one pattern or several patterns to a tuple.

    Args:
        patterns: A pattern, or several.
        name: Name of the argument, for the error.

    Raises:
        ValueError: If an element is no string.

    Example:
        >>> as_patterns("head.*")
        ('head.*',)
    """
    if isinstance(patterns, str):
        return (patterns,)
    found = listed(patterns, str)
    if found is not None:
        return tuple(found)
    raise ValueError(
        f"{name} must be a pattern or a list of patterns, got {shown(patterns)}; write ['head.*']"
    )


_RULES = {"==": operator.eq, ">=": operator.ge, "<=": operator.le}
_RULE = re.compile(r"ndim\s*(==|>=|<=)\s*(\d+)")


def _matches(name: str, pattern: str, ndim: int | None) -> bool:
    """Returns whether a parameter matches a pattern, and its rule where ``ndim`` is given."""
    glob, has_rule, rule = pattern.partition(" if ")
    if ndim is None or not has_rule:
        return fnmatchcase(name, pattern)
    found = _RULE.fullmatch(rule.strip())
    if found is None:
        raise ValueError(
            f"the rule of a pattern must compare ndim with a number, got {shown(pattern)}; write "
            "'blocks.* if ndim == 2', or with >= or <="
        )
    return fnmatchcase(name, glob.strip()) and bool(_RULES[found[1]](ndim, int(found[2])))


@lru_cache(maxsize=64)
def first_match(
    names: tuple[str, ...], patterns: tuple[str, ...], ndims: tuple[int, ...] = ()
) -> tuple[int | None, ...]:
    """Returns for each name the index of the first pattern that it matches; None without a match.

    Args:
        names: Names of parameters.
        patterns: The patterns. If ``ndims`` is given, they may have a rule: ``"*.weight if ndim ==
            2"``, also with ``>=`` and ``<=``.
        ndims: The number of dimensions of each parameter; empty if patterns have no rules.

    Example:
        >>> first_match(("head.bias", "body.bias"), ("head.*", "*.bias"))
        (0, 1)
        >>> first_match(("0.weight", "0.bias"), ("* if ndim == 2", "*"), (2, 1))
        (0, 1)
    """
    sizes: tuple[int | None, ...] = ndims or (None,) * len(names)
    return tuple(
        next((i for i, pattern in enumerate(patterns) if _matches(name, pattern, ndim)), None)
        for name, ndim in zip(names, sizes, strict=True)
    )


@lru_cache(maxsize=64)
def check_all_match(
    names: tuple[str, ...],
    patterns: tuple[str, ...],
    tied: tuple[tuple[str, str], ...] = (),
    *,
    name: str = "every pattern",
    ndims: tuple[int, ...] = (),
) -> None:
    """Raises unless each pattern is the first match of some name.

    Args:
        names: Names of parameters.
        patterns: The patterns.
        tied: Other names of some of these parameters, as :func:`tied_names` returns them.
        name: Description of the patterns, for the error.
        ndims: As for :func:`first_match`.

    Raises:
        ValueError: If a pattern matches no name, or only names that an earlier pattern matches.
    """
    used = set(first_match(names, patterns, ndims))
    sizes: tuple[int | None, ...] = ndims or (None,) * len(names)
    for index, pattern in enumerate(patterns):
        if index in used:
            continue
        taken = [n for n, ndim in zip(names, sizes, strict=True) if _matches(n, pattern, ndim)]
        others = [pair for pair in tied if fnmatchcase(pair[0], pattern)]
        if taken:
            why = f"; an earlier pattern matches {taken[0]} first; correct or remove the pattern"
        elif others:
            other, first = others[0]
            why = f"; {other} is tied to {first}: write a pattern for {first}"
        else:
            why = "; correct or remove the pattern"
        some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        raise ValueError(
            f"{name} must match a parameter, got {shown(pattern)}, which matches none of "
            f"{some or 'no parameters at all'}{why}"
        )
