"""Muon with a warm-up of the momentum, and MuonAdamW: Muon for hidden matrices, AdamW beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_between, check_count
from lightning_bigopt.optimizers.combined import CombinedOptimizer, OptimizerFactory
from lightning_bigopt.optimizers.parameter_group import (
    ParameterGroup,
    checked_groups,
    match,
    match_groups,
    trainable_parameters,
)
from lightning_bigopt.parameters import as_patterns, plain_name
from lightning_bigopt.type_checks import check_instance

__all__ = ["Muon", "MuonAdamW", "hidden_matrices", "muon_adamw"]


class Muon(torch.optim.Muon):
    r"""torch's Muon with a warm-up of the momentum, and with exact updates of sharded matrices.

    .. math:: \mu_t = (1 - f) \mu_0 + f \mu, \quad f = \min(t / T, 1)

    for update :math:`t = 0, 1, \dots` The count is saved in the groups; updates that are skipped,
    and updates without gradients, do not count.

    torch's own Muon multiplies the shards of a DTensor in bfloat16 and adds the products, which
    rounds differently for each number of processes. This class orthogonalizes the whole matrix on
    every process of its mesh, as one process does. It gathers one matrix at a time, in bfloat16.

    Args:
        params: Matrices, or groups of them.
        momentum_warmup: The length :math:`T` in updates; 0 for a constant momentum.
        momentum_start: The momentum :math:`\mu_0` of the first update.
        options: Arguments of ``torch.optim.Muon``, such as ``lr`` and ``momentum`` (:math:`\mu`).

    Raises:
        ValueError: If an argument is out of range, or a parameter is no matrix.

    Example:
        >>> weight = nn.Parameter(torch.eye(2))
        >>> optimizer = Muon([weight], lr=0.1, momentum=0.95, momentum_warmup=2)
        >>> seen = []
        >>> for _ in range(3):
        ...     weight.grad = torch.ones(2, 2)
        ...     optimizer.step()
        ...     seen.append(round(optimizer.param_groups[0]["momentum"], 3))
        >>> seen
        [0.85, 0.9, 0.95]

    References:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the warm-up
        is that of the modded-nanogpt speedrun.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        momentum_warmup: int = 300,
        momentum_start: float = 0.85,
        **options: Any,
    ) -> None:
        check_count("momentum_warmup", momentum_warmup, minimum=0, hint="0 for a constant momentum")
        check_between("momentum_start", momentum_start, 0, 1, ends="[)", hint="write 0.85")
        super().__init__(params, **options)
        if not momentum_warmup:
            return
        for group in self.param_groups:
            self._begin_warmup(group, momentum_warmup, momentum_start)

    @staticmethod
    def _begin_warmup(group: dict[str, Any], length: int, start: float) -> None:
        settings = {"momentum_end": group["momentum"], "momentum_start": start}
        group.update(settings, momentum=start, momentum_warmup=length, updates=0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; during a warm-up it joins that of the first group."""
        first = self.param_groups[0] if self.param_groups else {}
        super().add_param_group(param_group)
        if "updates" in first:
            group = self.param_groups[-1]
            self._begin_warmup(group, first["momentum_warmup"], first["momentum_start"])
            group["updates"] = first["updates"]

    @property
    def scheduled_fields(self) -> frozenset[str]:
        """The fields of parameter groups that the optimizer schedules itself."""
        has_warmup = any("updates" in group for group in self.param_groups)
        return frozenset({"momentum"} if has_warmup else ())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes an update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            gradients = [p for p in group["params"] if p.grad is not None]
            if "updates" in group and gradients:
                done = min(group["updates"] / group["momentum_warmup"], 1.0)
                start, end = group["momentum_start"], group["momentum_end"]
                group["momentum"] = (1 - done) * start + done * end
                group["updates"] += 1
            for parameter in gradients:
                self._step_(parameter, group)
        return loss

    def _step_(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None  # the caller has selected parameters with gradients
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(
                gradient, memory_format=torch.preserve_format
            )
        buffer, lr = state["momentum_buffer"], float(group["lr"])
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        direction: Tensor = _zeropower_via_newtonschulz(
            _whole(update.bfloat16()),
            group["ns_coefficients"],
            group["ns_steps"],
            group["eps"],
        )
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            whole = DTensor.from_local(direction, mesh, [Replicate()] * mesh.ndim, run_check=False)
            direction = whole.redistribute(placements=parameter.placements)
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.add_(direction, alpha=-_adjust_lr(lr, group["adjust_lr_fn"], parameter.shape))


def _whole(tensor: Tensor) -> Tensor:
    """Gathers the shards of a DTensor; returns another tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def hidden_matrices(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the trainable matrices that Muon is for.

    These are the parameters with two dimensions, except biases, the weights of ``nn.Embedding`` and
    ``nn.EmbeddingBag``, and the weight of the last ``nn.Linear`` of the module, its output head.

    Example:
        >>> hidden_matrices(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)))
        ('1.weight',)
    """
    layers = list(module.modules())
    heads = [layer for layer in layers if isinstance(layer, nn.Linear)][-1:]
    tables = [layer for layer in layers if isinstance(layer, (nn.Embedding, nn.EmbeddingBag))]
    excluded = {id(layer.weight) for layer in (*tables, *heads)}
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
    biases, ``nn.Embedding`` and the last ``nn.Linear``. Everything else belongs to AdamW:
    convolution kernels, too, and its parameters with at most one dimension have no weight decay.
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
        muon: Patterns of further matrices for Muon, such as a last ``nn.Linear`` that is no head.
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
        parameters = trainable_parameters(module)
        adamw, muon = as_patterns(adamw, name="adamw"), as_patterns(muon, name="muon")
        to_adamw = match(module, parameters, adamw, name="every pattern of adamw")
        to_muon = match(module, parameters, muon, name="every pattern of muon")
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
            raise ValueError(
                f"module must have a hidden matrix for Muon, got none among {len(parameters)} "
                "parameters; use AdamW alone, or name matrices in muon= (FSDP1 has flat shards: "
                "use FSDP2, ModelParallelStrategy)"
            )
        for name in chosen:
            if parameters[name].ndim != 2:
                raise ValueError(
                    f"muon must match matrices, got {name!r} with {parameters[name].ndim} "
                    "dimensions; write a pattern with a rule, such as 'blocks.* if ndim == 2'"
                )
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
