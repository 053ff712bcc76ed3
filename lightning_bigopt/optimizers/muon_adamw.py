"""MuonAdamW: Muon for hidden matrices and AdamW for the other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import (
    check_between,
    check_choice,
    check_non_negative,
    shown,
    with_article,
)
from lightning_bigopt.optimizers.combined import CombinedOptimizer
from lightning_bigopt.optimizers.make_part import OptimizerFactory
from lightning_bigopt.optimizers.muon import Muon, check_warmup
from lightning_bigopt.optimizers.parameter_group import (
    ParameterGroup,
    checked_groups,
    match,
    match_groups,
    trainable_parameters,
)
from lightning_bigopt.parameters import as_patterns, listed, plain_name
from lightning_bigopt.type_checks import check_instance

__all__ = ["MuonAdamW", "hidden_matrices", "muon_adamw"]


def hidden_matrices(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the trainable matrices that Muon is for.

    These are the parameters with two dimensions, except biases, those of ``nn.Embedding`` and
    ``nn.EmbeddingBag``, and those of the last ``nn.Linear`` of the module, its output head.

    Example:
        >>> hidden_matrices(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)))
        ('1.weight',)
    """
    layers = list(module.modules())
    heads = [layer for layer in layers if isinstance(layer, nn.Linear)][-1:]
    tables = [layer for layer in layers if isinstance(layer, (nn.Embedding, nn.EmbeddingBag))]
    # All of them, because the weight may be computed from others, as by weight_norm.
    excluded = {id(p) for layer in (*tables, *heads) for p in layer.parameters()}
    return tuple(
        plain_name(name)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and name.rpartition(".")[2] != "bias"
        and id(parameter) not in excluded
    )


@explain_arguments
class MuonAdamW(CombinedOptimizer):
    r"""Muon for hidden matrices, and AdamW for the other parameters, as one optimizer.

    .. math:: W \leftarrow (1 - \eta \lambda) W - 0.2\, \eta \sqrt{\max(A, B)}\; O

    for a matrix of shape (A, B), with the orthogonalized momentum :math:`O`, so that the root mean
    square of an update is about that of AdamW, and one learning rate and weight decay serve both.
    Hidden matrices are those of :func:`hidden_matrices`: parameters with two dimensions, except
    biases, ``nn.Embedding`` and the last ``nn.Linear``. AdamW updates all other parameters,
    including convolution kernels, and has no weight decay for those with at most one dimension.
    The groups are named ``Muon``, ``AdamW`` and ``AdamW.no_decay``.

    The momentum of Muon rises from ``momentum_start`` to ``momentum`` over the first
    ``momentum_warmup`` updates (see :class:`~lightning_bigopt.optimizers.Muon`). A
    ``HyperparameterScheduler("momentum", …)`` raises unless ``momentum_warmup`` is 0.

    Args:
        module: The module.
        lr: Learning rate :math:`\eta` of both, as for AdamW.
        weight_decay: Weight decay :math:`\lambda` of all matrices.
        adamw_lr: Learning rate of the AdamW part; None for ``lr``.
        betas: Decays of the moments of AdamW.
        momentum: Momentum of Muon after the warm-up.
        momentum_start: Momentum of the first update.
        momentum_warmup: Length of the warm-up in updates; 0 for a constant momentum.
        adamw: Patterns of further matrices for AdamW, such as a table of positions.
        muon: Patterns of further matrices for Muon, such as a last ``nn.Linear`` that is not an
            output layer.
        groups: Groups with a learning-rate factor or a weight decay of their own.
        no_decay: Patterns of further parameters without weight decay.
        fused: Whether AdamW uses fused kernels; None for the default of torch.

    Raises:
        ValueError: If the module has no hidden matrix (as with the flat shards of FSDP1), a pattern
            matches nothing, or a value is out of range.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
        >>> optimizer = MuonAdamW(model, lr=1e-3)
        >>> for group in optimizer.param_groups:
        ...     print(group["name"], group["weight_decay"], group["param_names"])
        Muon 0.1 ['1.weight']
        AdamW 0.1 ['0.weight', '2.weight']
        AdamW.no_decay 0.0 ['1.bias', '2.bias']

    References:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Liu et al.,
        "Muon is scalable for LLM training", 2025, Sec. 2.2.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.1,
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        momentum_start: float = 0.85,
        momentum_warmup: int = 300,
        adamw: str | Iterable[str] = (),
        muon: str | Iterable[str] = (),
        groups: Sequence[ParameterGroup] | None = None,
        no_decay: str | Iterable[str] = (),
        fused: bool | None = None,
    ) -> None:
        check_instance("module", module, nn.Module, hint="pass the module itself")
        _check(lr=lr, weight_decay=weight_decay, adamw_lr=adamw_lr, momentum=momentum, betas=betas)
        check_choice("fused", fused, (True, False, None))
        check_warmup(momentum_warmup, momentum_start)
        parameters = trainable_parameters(module)
        chosen = _chosen(module, parameters, adamw=adamw, muon=muon)
        ours = partial(
            Muon,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            momentum_start=momentum_start,
            momentum_warmup=momentum_warmup,
            adjust_lr_fn="match_rms_adamw",
        )
        other = partial(
            torch.optim.AdamW,
            lr=lr if adamw_lr is None else adamw_lr,
            weight_decay=weight_decay,
            betas=(betas[0], betas[1]),
            fused=fused,
        )
        factories: dict[str, OptimizerFactory] = {"Muon": ours, "AdamW": other}
        excluded = match(
            module,
            parameters,
            as_patterns(no_decay, name="no_decay"),
            name="every pattern of no_decay",
        )
        self._combine(
            factories,
            parameters,
            owners=["Muon" if name in chosen else "AdamW" for name in parameters],
            specifications=match_groups(module, parameters, checked_groups(groups)),
            decays=[
                index is None and parameter.ndim > 1 and name.rpartition(".")[2] != "bias"
                for (name, parameter), index in zip(parameters.items(), excluded, strict=True)
            ],
        )


def muon_adamw(module: nn.Module, *, lr: float, **options: Any) -> MuonAdamW:
    """Returns :class:`MuonAdamW`, with the same arguments.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
        >>> list(muon_adamw(model, lr=1e-3).parts)
        ['Muon', 'AdamW']
    """
    return MuonAdamW(module, lr=lr, **options)


def _chosen(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    *,
    adamw: str | Iterable[str],
    muon: str | Iterable[str],
) -> set[str]:
    """Returns the names of the parameters for Muon."""
    to_adamw, to_muon = (
        match(module, parameters, as_patterns(patterns, name=name), name=f"every pattern of {name}")
        for name, patterns in (("adamw", adamw), ("muon", muon))
    )
    chosen = set(hidden_matrices(module))
    for name, by_adamw, by_muon in zip(parameters, to_adamw, to_muon, strict=True):
        if by_adamw is not None and by_muon is not None:
            raise ValueError(
                f"adamw and muon must match different parameters, got {name!r} for both; "
                "remove one of the patterns"
            )
        if by_adamw is not None:
            chosen.discard(name)
        elif by_muon is not None:
            chosen.add(name)
    if not chosen:
        kind = type(module).__name__
        raise ValueError(
            f"module must have a hidden matrix for Muon, got {with_article(kind)} without "
            "one; use AdamW alone, or name matrices in muon= (FSDP1 has flat shards: use FSDP2, "
            "ModelParallelStrategy)"
        )
    for name in sorted(chosen):
        if parameters[name].ndim != 2:
            raise ValueError(
                f"muon must match matrices, got {name!r} with {parameters[name].ndim} "
                "dimensions; write a pattern with a rule, such as 'blocks.* if ndim == 2'"
            )
    return chosen


def _check(
    *,
    lr: float,
    weight_decay: float,
    adamw_lr: float | None,
    momentum: float,
    betas: Sequence[float],
) -> None:
    given = {"lr": lr, "weight_decay": weight_decay}
    for name, value in (given if adamw_lr is None else given | {"adamw_lr": adamw_lr}).items():
        check_non_negative(name, value, hint="for instance 1e-3")
    check_between("momentum", momentum, 0, 1, ends="[)", hint="write 0.95")
    pair = listed(betas, object, most=3)
    if pair is None or len(pair) != 2:
        raise ValueError(f"betas must be two numbers, got {shown(betas)}; write (0.9, 0.95)")
    for index, beta in enumerate(pair):
        check_between(f"betas[{index}]", beta, 0, 1, ends="[)", hint="write (0.9, 0.95)")
