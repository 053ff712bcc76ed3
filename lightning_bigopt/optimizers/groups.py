"""Parameter groups with and without weight decay, optionally with a learning rate per layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

from torch import Tensor, nn

from lightning_bigopt.checks import check_between, check_non_negative, shown
from lightning_bigopt.config_values import python_value
from lightning_bigopt.optimizers.parameter_group import (
    ParameterGroup,
    checked_groups,
    match,
    match_groups,
    trainable_parameters,
)
from lightning_bigopt.parameters import (
    as_patterns,
    check_all_match,
    first_match,
    numbered_prefix,
    tied_names,
)
from lightning_bigopt.type_checks import check_instance

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
    groups: Sequence[ParameterGroup] | None = None,
) -> list[dict[str, Any]]:
    r"""Returns named parameter groups for any torch optimizer.

    Parameters with two or more dimensions get weight decay; biases and parameters with fewer
    dimensions, such as the gains of normalizations, do not. With ``layer_decay`` each of the layers
    0 … L from the input to the output has its own learning rate:

    .. math:: \eta_i = \eta \max(m, d^{L - i}), \quad 0 \le i \le L

    Schedules multiply the ``lr`` of each group, so that ratios between layers are kept. A parameter
    that several modules share is listed once, under its first name. Frozen parameters are not
    listed.

    Args:
        module: The module; its parameters must be registered from the input to the output.
        weight_decay: Weight decay of the parameters that get one, non-negative.
        no_decay: Patterns of further parameters without decay, such as ``"*.wpe.weight"``. A
            pattern may have a rule: ``"* if ndim == 3"``, also with ``>=`` and ``<=``.
        lr: Learning rate :math:`\eta`. Required with ``layer_decay``; otherwise None uses the
            learning rate of the optimizer.
        layer_decay: Factor :math:`d` from one layer to the previous layer, in (0, 1]; None for one
            learning rate.
        min_factor: Smallest factor :math:`m`, in [0, 1].
        layers: ``"blocks"`` assigns parameters whose names are equal up to their first number to
            one layer, and consecutive parameters without a number, such as those of an embedding
            or a head, to another. Or patterns from the input to the output, one for each layer; the
            first that matches a name decides.
        groups: Groups of their own by pattern, with a factor on ``lr``, or with a weight decay for
            all their parameters.

    Returns:
        Groups with ``name``, ``params``, ``weight_decay`` and, if it is given, ``lr``. The names
        are ``decay`` and ``no_decay``, with layers ``layer_0.decay`` and so on; those of a group of
        ``groups`` begin with its name: ``head.decay``, or ``head`` if it has a weight decay.
        OptimizationMonitor shows them in its tags. No group is empty.

    Raises:
        ValueError: If a number is out of range, a pattern matches nothing, a parameter belongs to
            no layer, no parameter requires a gradient, or no parameter would get weight decay (as
            with the flat shards of FSDP1).

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
    check_instance("module", module, nn.Module, hint="pass the module itself")
    _check(weight_decay=weight_decay, lr=lr, layer_decay=layer_decay, min_factor=min_factor)
    parameters = trainable_parameters(module)
    own = checked_groups(groups)
    if lr is None and (scaled := next((g for g in own if g.lr_factor != 1.0), None)) is not None:
        raise ValueError(
            f"lr must be given with lr_factor, got None with lr_factor={scaled.lr_factor:g} of "
            f"{scaled.name!r}; pass the learning rate of the other parameters"
        )
    names, patterns = tuple(parameters), as_patterns(no_decay, name="no_decay")
    if not (isinstance(layers, str) and layers == "blocks"):
        layers = python_value("layers", layers)
        check_instance("layers", layers, (list, tuple), hint="write 'blocks' or ['embed.*', '*']")
        layers = as_patterns(layers, name="layers")
    tied = tied_names(module)
    excluded = match(module, parameters, patterns, name="every pattern of no_decay")
    specifications = match_groups(module, parameters, own)
    decays = [
        index is None and parameter.ndim > 1 and name.rpartition(".")[2] != "bias"
        for (name, parameter), index in zip(parameters.items(), excluded, strict=True)
    ]
    if weight_decay and not any(decays):
        raise ValueError(
            f"weight_decay must be 0 if no parameter has two dimensions, got {shown(weight_decay)} "
            f"for {names[0]} and others; under FSDP1, whose shards are flat, make the groups by "
            "name"
        )
    depths = [0] * len(names) if layer_decay is None else _depths(names, layers, tied)
    members: dict[tuple[int, int, str, float], list[nn.Parameter]] = {}
    for parameter, depth, decaying, group in zip(
        parameters.values(), depths, decays, specifications, strict=True
    ):
        label, value = ("decay", float(weight_decay)) if decaying else ("no_decay", 0.0)
        if group is not None and group.weight_decay is not None:
            label, value = group.name, float(group.weight_decay)
        elif group is not None:
            label = f"{group.name}.{label}"
        # Layers from the input to the output; in each, groups in their order, and decay first.
        place = -1 if group is None else own.index(group)
        members.setdefault((depth, place, label, -value), []).append(parameter)
    made = []
    for (depth, place, label, negative), chosen in sorted(members.items(), key=itemgetter(0)):
        name = label if layer_decay is None else f"layer_{depth}.{label}"
        entry: dict[str, Any] = {"name": name, "params": chosen, "weight_decay": -negative or 0.0}
        if lr is not None:
            factor = 1.0 if layer_decay is None else layer_decay ** (max(depths) - depth)
            entry["lr"] = lr * max(min_factor, factor)
            if place >= 0:
                entry["lr"] *= own[place].lr_factor
        made.append(entry)
    return made


def _depths(
    names: tuple[str, ...],
    layers: Literal["blocks"] | Sequence[str],
    tied: tuple[tuple[str, str], ...],
) -> list[int]:
    """Returns the layer of each parameter, counted from the input."""
    if layers == "blocks":
        return [
            index for index, (_, run) in enumerate(groupby(names, key=numbered_prefix)) for _ in run
        ]
    check_all_match(names, tuple(layers), tied, name="every pattern of layers")
    depths = []
    for name, layer in zip(names, first_match(names, tuple(layers)), strict=True):
        if layer is None:
            raise ValueError(
                f"layers must contain a pattern for every parameter, got none for {name!r}; add "
                "'*' for the layer of the others"
            )
        depths.append(layer)
    return depths


def _check(
    *, weight_decay: float, lr: float | None, layer_decay: float | None, min_factor: float
) -> None:
    check_non_negative("weight_decay", weight_decay, hint="for instance 0.1")
    if lr is not None:
        given: Any = lr
        is_scalar = isinstance(given, Tensor) and given.numel() == 1
        check_non_negative(
            "lr", given.item() if is_scalar else lr, hint="pass the peak learning rate"
        )
    check_between("min_factor", min_factor, 0, 1, ends="[]", hint="0 sets no lower bound")
    if layer_decay is None:
        return
    check_between("layer_decay", layer_decay, 0, 1, ends="(]", hint="for instance 0.8")
    if lr is None:
        raise ValueError(
            f"lr must be given with layer_decay, got None with layer_decay={shown(layer_decay)}; "
            "pass the learning rate of the last layer"
        )
