"""Counts the samples and tokens of a batch by a function or by the name of a field."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_bigopt.checks import shown

__all__ = [
    "BatchCount",
    "BatchWeight",
    "count",
    "count_rows",
    "named_function",
    "uncountable",
    "weigh",
]

BatchCount: TypeAlias = str | Callable[[Any], int | Tensor] | None
BatchWeight: TypeAlias = str | Callable[[Any], float | Tensor] | None


def named_function(how: BatchWeight, *, name: str) -> BatchWeight:
    """Resolves a dotted name such as ``"package.module.function"`` in a config to the function.

    The module is imported, which runs its code: a config must be as trusted as a script.

    Args:
        how: A function, its dotted name, the name of a field of the batch, or None.
        name: Name of the argument, for the error message.

    Returns:
        The function for a dotted name; anything else unchanged.

    Raises:
        ValueError: If ``how`` is none of these, or a dotted name does not name a function.

    Example:
        >>> named_function("math.prod", name="tokens")
        <built-in function prod>
        >>> named_function("input_ids", name="tokens")
        'input_ids'
    """
    function: Any = _imported(how, name) if isinstance(how, str) and "." in how else how
    is_function = callable(function) and not isinstance(function, type)
    if is_function or how is None or (isinstance(how, str) and function is how):
        return function  # type: ignore[no-any-return]
    if isinstance(how, str):
        kind = "class" if isinstance(function, type) else type(function).__name__
        raise ValueError(
            f"{name} must name a function, got {shown(how)}, which is a {kind}; write "
            "'package.module.function'"
        )
    raise ValueError(f"{_must_be(name)}, got {shown(how)}; write lambda batch: ...")


def _must_be(name: str) -> str:
    return (
        f"{name} must be a function of the batch, its dotted name, or the name of one of the "
        "batch's fields"
    )


def _imported(path: str, name: str) -> Any:
    """Imports what a dotted name names."""
    advice = "write 'package.module.function'"
    if not all(part.isidentifier() for part in path.split(".")):  # pkgutil accepts other forms
        raise ValueError(f"{_must_be(name)}, got {shown(path)}, which is none of these; {advice}")
    try:
        return pkgutil.resolve_name(path)
    except Exception as error:  # a module may raise anything when it is imported
        raise ValueError(
            f"{_must_be(name)}, got {shown(path)} ({type(error).__name__}: {error}); {advice}"
        ) from error


def count(batch: Any, how: BatchCount, *, name: str) -> int:
    """Counts the samples or tokens of a batch. Synchronizes if the count is a tensor.

    Args:
        batch: The batch.
        how: A function of the batch, or the name of one of its fields; None counts the rows of the
            first tensor.
        name: ``"samples"`` or ``"tokens"``.

    Raises:
        ValueError: If the batch does not have the field, or the field is not a tensor.

    Example:
        >>> count({"ids": torch.zeros(4, 7)}, "ids", name="tokens")
        28
    """
    rows = batch
    if name == "samples" and isinstance(how, str):
        rows, how = _field(batch, how, name), None
    if how is not None:
        return int(weigh(batch, how, name=name))
    samples = count_rows(rows)
    if samples is None:
        raise uncountable(rows)
    return samples


def weigh(batch: Any, how: BatchWeight, *, name: str) -> float | Tensor:
    """Returns the weight of a batch: the sum of a mask, or the number of entries of another field.

    Args:
        batch: The batch.
        how: A function of the batch, or the name of one of its fields. A field is a mask if it is
            boolean or its name contains ``"mask"``.
        name: Name of the argument, for the error message.

    Returns:
        The weight; a tensor of shape ``()`` on the device of the batch for a mask.

    Raises:
        ValueError: If the batch does not have the field, or the field is not a tensor.

    Example:
        >>> weigh({"attention_mask": torch.tensor([[1, 1, 0]])}, "attention_mask", name="weight")
        tensor(2)
    """
    if callable(how):
        return how(batch)
    field = _field(batch, str(how), name)
    if not isinstance(field, Tensor):
        raise ValueError(
            f"{name} must name a field of the batch that is a tensor, got {shown(how)}, which is a "
            f"{type(field).__name__}; write lambda batch: ..."
        )
    is_mask = field.dtype == torch.bool or "mask" in str(how)
    return field.sum() if is_mask else field.numel()


def _field(batch: Any, how: str, name: str) -> Any:
    try:
        return batch[how]
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{name} must be a function of the batch or the name of one of its fields, got "
            f"{shown(how)} for a batch of {type(batch).__name__}; write lambda batch: ..."
        ) from error


def count_rows(batch: Any) -> int | None:
    """Returns the size of the first dimension of the first tensor in a batch.

    Returns:
        The size; None if the batch holds no tensor with a dimension.

    Example:
        >>> count_rows({"name": ["a", "b"], "image": torch.zeros(2, 3)})
        2
        >>> count_rows(["a", "b"]) is None
        True
    """
    for leaf in (batch,) if isinstance(batch, Tensor) else _leaves(batch):
        if leaf.ndim:
            return int(leaf.shape[0])
    return None


def uncountable(batch: Any) -> ValueError:
    """Returns the error for a batch whose samples are needed, and whose rows are unknown.

    With several processes the batch of another process may be the one without a tensor.
    """
    return ValueError(
        "samples must be given for batches without a tensor, got a batch of "
        f"{type(batch).__name__}; pass samples=a function of the batch"
    )


def _leaves(batch: Any) -> Iterable[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for value in batch:
            yield from _leaves(value)
