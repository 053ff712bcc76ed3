"""What a batch holds: its samples, its tokens, its weight, by a function or by a field's name."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_bigopt import trainer_access

__all__ = ["BatchCount", "BatchWeight", "count", "named_function", "weigh"]

BatchCount: TypeAlias = str | Callable[[Any], int | Tensor] | None
BatchWeight: TypeAlias = str | Callable[[Any], float | Tensor] | None


def named_function(how: BatchWeight, *, name: str) -> BatchWeight:
    """Turns ``"package.module.function"``, as a config file has it, into the function.

    Args:
        how: A function, the name of a batch's field, a dotted name, or None.
        name: The argument's name, for the error.

    Returns:
        The function for a dotted name; anything else as it is.

    Raises:
        ValueError: If it is none of these, or a dotted name names no function.

    Example:
        >>> named_function("math.prod", name="tokens")
        <built-in function prod>
        >>> named_function("input_ids", name="tokens")
        'input_ids'
    """
    if how is not None and not isinstance(how, str) and not callable(how):
        raise ValueError(
            f"{name} must be a function of the batch, its dotted name, or the name of one of the "
            f"batch's fields, got {how!r}; write lambda batch: ..."
        )
    if not isinstance(how, str) or "." not in how:
        return how
    try:
        found = pkgutil.resolve_name(how)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{name} must be a function of the batch, its dotted name, or the name of one of the "
            f"batch's fields, got {how!r} ({error}); write 'package.module.function'"
        ) from error
    if not callable(found):
        raise ValueError(
            f"{name} must name a function, got {how!r}, which is a {type(found).__name__}"
        )
    function: Callable[[Any], float | Tensor] = found
    return function


def count(batch: Any, how: BatchCount, *, name: str) -> int:
    """Samples or tokens in a batch, as an int.

    Args:
        batch: What the loader gave.
        how: A function of the batch, or the name of one of its fields; None counts rows.
        name: ``"samples"`` or ``"tokens"``.

    Raises:
        ValueError: If the batch has no such field.

    Example:
        >>> count({"ids": torch.zeros(4, 7)}, "ids", name="tokens")
        28
    """
    if how is None:
        return trainer_access.count_rows(batch)
    if name == "samples" and isinstance(how, str):
        field = _field(batch, how, name)
        return trainer_access.count_rows(field)
    return int(weigh(batch, how, name=name))


def weigh(batch: Any, how: BatchWeight, *, name: str) -> float | Tensor:
    """What a batch weighs: a mask is summed, on its device; the entries of other fields count.

    Args:
        batch: What the loader gave.
        how: A function of the batch, or the name of one of its fields.
        name: The argument's name, for the error.

    Raises:
        ValueError: If the batch has no such field.

    Example:
        >>> weigh({"attention_mask": torch.tensor([[1, 1, 0]])}, "attention_mask", name="weight")
        tensor(2)
    """
    if callable(how):
        return how(batch)
    field = _field(batch, str(how), name)
    is_mask = field.dtype == torch.bool or "mask" in str(how)
    return field.sum() if is_mask else field.numel()


def _field(batch: Any, how: str, name: str) -> Tensor:
    try:
        field: Tensor = batch[how]
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{name} must be a function of the batch or the name of one of its fields, got {how!r} "
            f"for a batch of {type(batch).__name__}"
        ) from error
    return field
