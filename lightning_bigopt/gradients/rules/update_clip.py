"""UpdateClip: limits the root mean square of an Adam update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, _foreach_div, nn
from torch.optim import Optimizer

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_positive
from lightning_bigopt.gradients.norm_kernels import local_norms
from lightning_bigopt.gradients.rules.update_rule import UpdateRule, chunks, whole_norms
from lightning_bigopt.gradients.sharding import redistribute_like_parameter_, to_local
from lightning_bigopt.optimizers.names import part_optimizers

__all__ = ["UpdateClip"]


@explain_arguments
@dataclass(frozen=True)
class UpdateClip(UpdateRule):
    r"""Limits the root mean square of an Adam update, as StableAdamW and Adafactor do.

    .. math::
        \eta_t = \eta / \max(1, \mathrm{RMS}_t / d), \qquad
        \mathrm{RMS}_t = \sqrt{\operatorname{mean}\bigl(g^2 / \max(\hat v, \epsilon^2)\bigr)}

    for each tensor, with the bias-corrected second moment :math:`\hat v`, which already contains
    :math:`g`. It acts if a gradient is large compared with the second moment, so that the step of
    Adam would be too large. Costs a copy of the weights and one more pass over gradients and
    moments; needs no host synchronization. Has no state. Of a combined optimizer it limits the
    parts of the Adam family; the updates of other parts, such as Muon, are not limited.

    Args:
        max_rms: The limit :math:`d`, positive.

    Raises:
        ValueError: If ``max_rms`` is not positive and finite; at the first update if the optimizer
            is not of the Adam family (with ``betas``, ``eps`` and ``exp_avg_sq``), or after it if
            its moments are elsewhere (ZeroRedundancyOptimizer, Lookahead) or quantized.

    Example:
        >>> UpdateClip()
        UpdateClip(max_rms=1.0)

    References:
        Wortsman et al., "Stable and low-precision training for large-scale vision-language
        models", NeurIPS 2023, Algorithm 2. Shazeer & Stern, "Adafactor", ICML 2018, Sec. 6.
    """

    sparse = "refused"  # the gradients are read

    max_rms: float = 1.0

    def __post_init__(self) -> None:
        check_positive("max_rms", self.max_rms)

    def check(self, optimizer: Optimizer) -> None:
        """Raises for an optimizer that is not of the Adam family, nor combined with one."""
        super().check(optimizer)
        family = _adam_parts(optimizer)
        for part in family or [optimizer]:
            state = next(filter(None, part.state.values()), None)
            if state is not None:  # the optimizer has made a step
                _second_moment(state, part)
        if not family:
            raise ValueError(
                "optimizer must be of the Adam family for UpdateClip, got "
                f"{type(optimizer).__name__}; use MaxUpdateRatio"
            )

    def limited(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Returns the parameters of the Adam family; a combined optimizer may have others."""
        groups = [group for part in _adam_parts(optimizer) for group in part.param_groups]
        chosen = {id(parameter) for group in groups for parameter in group["params"]}
        return [parameter for parameter in parameters if id(parameter) in chosen]

    def factors(
        self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], before: Sequence[Tensor]
    ) -> Tensor:
        """Returns ``max_rms`` over the root mean square of each update."""
        settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        norms = []
        for indices in chunks(before):
            chosen = [parameters[index] for index in indices]
            _check_states(optimizer, chosen, [before[index] for index in indices])
            norms.append(local_norms(_ratios(optimizer, chosen, settings), 2.0))
        whole = whole_norms(torch.cat(norms), parameters)
        sizes = [p.numel() * (2 if p.is_complex() else 1) for p in parameters]
        roots = [self.max_rms * max(size, 1) ** 0.5 for size in sizes]
        return torch.stack([root / norm for root, norm in zip(roots, whole.unbind(), strict=True)])


def _adam_parts(optimizer: Optimizer) -> list[Optimizer]:
    """Returns the parts of the Adam family; the optimizer itself if it is not combined."""
    parts = part_optimizers(optimizer).values() or [optimizer]
    return [part for part in parts if all({"betas", "eps"} <= g.keys() for g in part.param_groups)]


def _check_states(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], before: Sequence[Tensor]
) -> None:
    """Raises if a parameter without a state has changed: its moments must be elsewhere."""
    for parameter, old in zip(parameters, before, strict=True):
        if not optimizer.state.get(parameter) and not torch.equal(to_local(parameter), old):
            raise ValueError(
                "optimizer must keep exp_avg_sq and step in its state for UpdateClip, got "
                f"{type(optimizer).__name__}, which has changed a parameter without a state; use "
                "MaxUpdateRatio"
            )


def _ratios(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], settings: dict[int, dict[str, Any]]
) -> list[Tensor]:
    """Divides gradients by the roots of their second moments; empty tensors without moments."""
    ratios = [torch.empty(0, device=to_local(parameter).device) for parameter in parameters]
    found = [optimizer.state.get(parameter) for parameter in parameters]
    kept = [index for index, state in enumerate(found) if state]
    if not kept:
        return ratios
    states = [state for state in found if state]
    groups = [settings[id(parameters[i])] for i in kept]
    moments = [_numbers(_second_moment(state, optimizer)).float() for state in states]
    scales = _divided(moments, [_correction(s, g) for s, g in zip(states, groups, strict=True)])
    torch._foreach_clamp_min_(scales, [group["eps"] ** 2 for group in groups])
    torch._foreach_sqrt_(scales)
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(
        scales, [_numbers(redistribute_like_parameter_(parameters[i])) for i in kept]
    )
    for index, scale in zip(kept, scales, strict=True):
        ratios[index] = scale
    return ratios


def _second_moment(state: dict[str, Any], optimizer: Optimizer) -> Tensor:
    """Returns the second moment that the optimizer uses, without bias correction."""
    if not {"exp_avg_sq", "step"} <= state.keys():
        raise ValueError(
            "optimizer must keep exp_avg_sq and step for UpdateClip, got "
            f"{type(optimizer).__name__}, which keeps {', '.join(state)}; use MaxUpdateRatio"
        )
    moment: Tensor = state.get("max_exp_avg_sq", state["exp_avg_sq"])  # with amsgrad the maximum
    if hasattr(to_local(moment), "__tensor_flatten__"):  # a tensor that is made of others
        # Small moments are rounded to zero in 8 bits, and the ratio to them would be too large.
        raise ValueError(
            "optimizer must keep exp_avg_sq in plain tensors for UpdateClip, got "
            f"{type(optimizer).__name__}, which keeps {type(to_local(moment)).__name__}; use "
            "MaxUpdateRatio"
        )
    return moment


def _numbers(tensor: Tensor) -> Tensor:
    """Returns the local shard, a complex one as pairs of real numbers, as the optimizer sees it."""
    local = to_local(tensor)
    return torch.view_as_real(local) if local.is_complex() else local


def _correction(state: dict[str, Any], group: dict[str, Any]) -> float | Tensor:
    step = state["step"]
    if isinstance(step, Tensor) and step.device.type == "cpu":
        step = step.item()  # does not synchronize
    correction: float | Tensor = 1.0 - group["betas"][1] ** step
    return correction


def _divided(tensors: list[Tensor], divisors: list[float | Tensor]) -> list[Tensor]:
    numbers = [divisor for divisor in divisors if isinstance(divisor, float)]
    if len(numbers) == len(tensors):
        return list(_foreach_div(tensors, numbers))
    on_device = [
        d.to(t.device) if isinstance(d, Tensor) else torch.full((), d, device=t.device)
        for t, d in zip(tensors, divisors, strict=True)
    ]
    return list(_foreach_div(tensors, on_device))
