"""Muon with a warm-up of the momentum, and with exact updates of sharded matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from lightning_bigopt.checks import check_between, check_count

__all__ = ["Muon", "check_warmup"]


class Muon(torch.optim.Muon):
    r"""torch's Muon with a warm-up of the momentum, and with exact updates of sharded matrices.

    .. math:: \mu_t = (1 - f) \mu_0 + f \mu, \quad f = \min(t / T, 1)

    for update :math:`t = 0, 1, \ldots`. The count is saved in the groups; updates that are skipped,
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
        ValueError: If an argument is out of range, or a parameter is no real matrix; in the step
            if a gradient is sparse.

    Example:
        >>> weight = torch.nn.Parameter(torch.eye(2))
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
        check_warmup(momentum_warmup, momentum_start)
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
        for parameter in self.param_groups[-1]["params"]:
            if parameter.ndim != 2 or parameter.is_complex():
                self.param_groups.pop()
                raise ValueError(
                    f"the parameters of Muon must be real matrices, got one of shape "
                    f"{tuple(parameter.shape)} and dtype {parameter.dtype}; use AdamW for it"
                )
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
        if gradient.is_sparse:
            raise ValueError(
                f"parameters must have dense gradients for Muon, got a sparse one of shape "
                f"{tuple(gradient.shape)}; use AdamW for it"
            )
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


def check_warmup(length: int, start: float) -> None:
    """Raises unless the length and the start of a warm-up are in range."""
    check_count("momentum_warmup", length, minimum=0, hint="0 for a constant momentum")
    check_between("momentum_start", start, 0, 1, ends="[)", hint="write 0.85")


def _whole(tensor: Tensor) -> Tensor:
    """Gathers the shards of a DTensor; returns another tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
