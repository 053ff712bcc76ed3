"""Parameter groups: weight decay where it belongs, and a learning rate for each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Literal

from torch import nn

from lightning_bigopt.parameters import (
    as_patterns,
    check_all_match,
    first_match,
    numbered_prefix,
    plain_name,
)

__all__ = ["parameter_groups"]


def parameter_groups(
    module: nn.Module,
    *,
    weight_decay: float,
    no_decay: str | Iterable[str] = (),
    lr: float | None = None,
    layer_decay: float | None = None,
    min_factor: float = 0.0,
    layers: Literal["blocks"] | Sequence[str] = "blocks",
) -> list[dict[str, Any]]:
    r"""Named parameter groups for any optimizer of torch's kind.

    Matrices decay; biases and whatever has one dimension or none (gains of normalizations) do not.
    With ``layer_decay`` each layer has a learning rate of its own, the layer at the output the
    whole one:

    .. math:: \eta_i = \eta \max(m, d^{L - i}), \quad 0 \le i \le L

    Schedules multiply each group's own ``lr``, so these ratios last. A parameter that several
    modules share counts once, under its first name; frozen ones are left out.

    Args:
        module: Its parameters, registered from the input to the output.
        weight_decay: Decay of the matrices, zero or more.
        no_decay: Patterns of further parameters without decay, such as ``"*.wpe.weight"``.
        lr: Learning rate :math:`\eta`; needed with ``layer_decay``, else None leaves it to the
            optimizer.
        layer_decay: The factor :math:`d` from one layer to the one before, in (0, 1]; None for one
            learning rate.
        min_factor: The least factor :math:`m`, in [0, 1].
        layers: Which parameters make up a layer. ``"blocks"`` takes the name up to its first
            number; parameters without one, such as embedding and head, make a layer where they
            stand between those. Or patterns from the input to the output, of which the first that
            matches counts.

    Returns:
        Groups with ``name``, ``params``, ``weight_decay`` and, where it is given, ``lr``. The names
        are ``decay`` and ``no_decay``, with layers ``layer_0.decay`` and so on; OptimizationMonitor
        shows them in its tags. No group is empty.

    Raises:
        ValueError: If a number is out of range, a pattern matches nothing, a parameter belongs to
            no layer, nothing is left to train, or no parameter would decay (as with the flat
            shards of FSDP1).

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> groups = parameter_groups(model, lr=0.1, weight_decay=0.01, layer_decay=0.5)
        >>> for group in groups:
        ...     print(group["name"], group["lr"], group["weight_decay"], len(group["params"]))
        layer_0.decay 0.05 0.01 1
        layer_0.no_decay 0.05 0.0 1
        layer_1.decay 0.1 0.01 1
        layer_1.no_decay 0.1 0.0 1
        >>> optimizer = torch.optim.AdamW(groups)

    References:
        Howard & Ruder, "ULMFiT", ACL 2018, Sec. 3.2; Bao et al., "BEiT", ICLR 2022, App. H.
    """
    _check(weight_decay=weight_decay, lr=lr, layer_decay=layer_decay, min_factor=min_factor)
    parameters = {
        plain_name(name): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    if not parameters:
        raise ValueError(
            "module must have a parameter to train, got none that requires a gradient; unfreeze one"
        )
    names, patterns = tuple(parameters), as_patterns(no_decay)
    check_all_match(names, patterns)
    spared = first_match(names, patterns)
    decays = [
        match is None and parameter.ndim > 1 and name.rpartition(".")[2] != "bias"
        for (name, parameter), match in zip(parameters.items(), spared, strict=True)
    ]
    if weight_decay and not any(decays):
        raise ValueError(
            f"weight_decay must be 0 where no parameter has two dimensions, got {weight_decay!r} "
            f"for {names[0]} and others; under FSDP1, whose shards are flat, make the groups by "
            "their names"
        )
    depths = [0] * len(names) if layer_decay is None else _depths(names, layers)
    groups: dict[str, dict[str, Any]] = {}
    for depth in range(max(depths) + 1):
        for label, decaying in (("decay", True), ("no_decay", False)):
            members = [
                parameter
                for parameter, at, decay in zip(parameters.values(), depths, decays, strict=True)
                if at == depth and decay is decaying
            ]
            if not members:
                continue
            name = label if layer_decay is None else f"layer_{depth}.{label}"
            group: dict[str, Any] = {"name": name, "params": members}
            group["weight_decay"] = weight_decay if decaying else 0.0
            if lr is not None:
                factor = 1.0 if layer_decay is None else layer_decay ** (max(depths) - depth)
                group["lr"] = lr * max(min_factor, factor)
            groups[name] = group
    return list(groups.values())


def _depths(names: tuple[str, ...], layers: Literal["blocks"] | Sequence[str]) -> list[int]:
    """The layer of each parameter, counted from the input."""
    if layers == "blocks":
        return [
            index for index, (_, run) in enumerate(groupby(names, key=numbered_prefix)) for _ in run
        ]
    patterns = as_patterns(layers)
    check_all_match(names, patterns)
    depths = []
    for name, match in zip(names, first_match(names, patterns), strict=True):
        if match is None:
            raise ValueError(
                f"layers must hold a pattern for every parameter, got none for {name!r}; add '*' "
                "where the rest belongs"
            )
        depths.append(match)
    return depths


def _check(
    *, weight_decay: float, lr: float | None, layer_decay: float | None, min_factor: float
) -> None:
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be zero or more, got {weight_decay!r}; 0.1 is usual")
    if lr is not None and not 0 <= lr < math.inf:
        raise ValueError(f"lr must be zero or more, got {lr!r}; pass the optimizer's peak rate")
    if not 0 <= min_factor <= 1:
        raise ValueError(f"min_factor must be in [0, 1], got {min_factor!r}; 0 sets no floor")
    if layer_decay is None:
        return
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay!r}; try 0.8")
    if lr is None:
        raise ValueError("lr must be given with layer_decay, got None; pass the output layer's")
