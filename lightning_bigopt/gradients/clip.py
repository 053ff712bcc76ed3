"""Clips gradients in a plain training loop: measures, decides and applies in one call."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bigopt.checks import check_non_negative, shown
from lightning_bigopt.gradients.apply import apply_
from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.rules.clipping_rule import ClipContext, ClippingRule, RuleState
from lightning_bigopt.optimizers.names import check_optimizer
from lightning_bigopt.optimizers.private import check_no_sample_gradients, check_not_private
from lightning_bigopt.parameters import listed
from lightning_bigopt.type_checks import check_instance

__all__ = ["clip_gradients_"]


def clip_gradients_(
    parameters: nn.Module
    | nn.Parameter
    | Iterable[nn.Parameter]
    | Iterable[tuple[str, nn.Parameter]],
    rule: ClippingRule,
    *,
    state: RuleState | None = None,
    optimizer: Optimizer | None = None,
    fraction: float = 0.0,
) -> ClipDecision:
    """Clips gradients by a rule; call it between ``backward`` and ``step``.

    Synchronizes with the host only if the rule does.

    Args:
        parameters: A module, a parameter, parameters, or pairs of name and parameter.
        rule: The clipping rule.
        state: The state of the rule, from ``rule.initial_state()``; changed in place. Required by
            adaptive rules.
        optimizer: The optimizer that is about to step. A fused optimizer that owns exactly these
            parameters scales the gradients in its kernel, and skips an update with non-finite
            gradients. Required by rules that limit the update.
        fraction: Fraction of the budget consumed, for scheduled thresholds.

    Returns:
        The decision: coefficient, threshold and norms.

    Raises:
        ValueError: If the rule requires a state or an optimizer that is not given, or with Opacus.

    Example:
        >>> import torch
        >>> from lightning_bigopt.gradients import NormClip, ZClip
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.tensor([[30.0, 40.0]])).sum().backward()
        >>> decision = clip_gradients_(model, NormClip(max_norm=1.0))
        >>> round(decision.norms.value, 3), round(decision.coefficient.item(), 3)
        (50.01, 0.02)

        An adaptive rule has a state; save it together with the state of the optimizer:

        >>> rule = ZClip()
        >>> state = rule.initial_state()
        >>> for _ in range(3):
        ...     _ = clip_gradients_(model, rule, state=state, optimizer=optimizer)
        ...     optimizer.step()
        >>> len(state["seed"])
        3
    """
    check_instance("rule", rule, ClippingRule, hint="try NormClip(max_norm=1.0)")
    if optimizer is not None:
        check_optimizer(optimizer)
    if state is not None:
        hint = "write state = rule.initial_state() once"
        check_instance("state", state, dict, hint=hint)
        if not rule.accepts(state):
            raise ValueError(f"state must be of {type(rule).__name__}, got {shown(state)}; {hint}")
    check_non_negative("fraction", fraction)
    named = _named(parameters)
    if optimizer is not None:
        check_not_private([optimizer], "clip_gradients_", "which clips; set its max_grad_norm")
    check_no_sample_gradients(parameter for _, parameter in named)
    if state is None:
        state = rule.initial_state()
        if _has_content(state):
            raise ValueError(
                f"state must be given to {type(rule).__name__}, which is adaptive, got None; "
                "create it once with rule.initial_state()"
            )
    context = ClipContext(parameters=named, optimizer=optimizer, fraction=fraction)
    decision = rule.decide(context, state)
    owned = optimizer is not None and _owns_exactly(optimizer, [p for _, p in named])
    apply_(decision, optimizer=optimizer, route="auto" if owned else "gradients")
    return decision


def _has_content(state: RuleState) -> bool:
    """Returns whether a state contains more than empty states of groups."""
    return any(not isinstance(value, dict) or _has_content(value) for value in state.values())


def _owns_exactly(optimizer: Optimizer, parameters: list[nn.Parameter]) -> bool:
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    if len(owned) == len(parameters) and all(map(is_, owned, parameters)):
        return True
    return set(map(id, owned)) == set(map(id, parameters))


def _named(
    parameters: nn.Module
    | nn.Parameter
    | Iterable[nn.Parameter]
    | Iterable[tuple[str, nn.Parameter]],
) -> list[tuple[str, nn.Parameter]]:
    if isinstance(parameters, nn.Module):
        return list(parameters.named_parameters())
    if isinstance(parameters, nn.Parameter):
        parameters = [parameters]
    named: list[tuple[str, nn.Parameter]] = []
    # A range holds no parameter, and may be longer than any list.
    given: Any = parameters
    items: list[Any] | None = None if isinstance(given, range) else listed(given, object)
    for index, item in enumerate([None] if items is None else items):
        is_pair = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        name, parameter = item if is_pair else (f"parameter{index}", item)
        if not isinstance(parameter, Tensor):
            raise ValueError(
                "parameters must be a module, parameters or pairs of name and parameter, got "
                f"{shown(parameters if items is None else parameter)}; pass the module, or the "
                "items() of a dict"
            )
        named.append((name, cast("nn.Parameter", parameter)))
    return named
