"""Groups: assigns different clipping rules to parameters by patterns of their names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import shown
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.gradient_norms import GradientNorms
from lightning_bigopt.gradients.rules.clipping_rule import ClipContext, ClippingRule, RuleState
from lightning_bigopt.parameters import first_match

__all__ = ["Groups"]


@explain_arguments
@dataclass(frozen=True)
class Groups(ClippingRule):
    """Assigns each parameter the rule of the first pattern that its name matches.

    Each group is clipped by its own norm. Parameters without a match, or with the rule None, are
    not clipped. Synchronizes once per update for each adaptive rule. State: the state of each rule,
    by pattern.

    Args:
        rules: Patterns (as in :mod:`fnmatch`) and their rules, in order; stored as a tuple of
            pairs.

    Raises:
        ValueError: If there are no rules or one is not a rule; at the first update if a pattern is
            the first match of no parameter.

    Example:
        >>> from lightning_bigopt.gradients import NormClip, ValueClip
        >>> Groups({"head.*": None, "*": NormClip(max_norm=1.0)}).patterns
        ('head.*', '*')

        A pattern that matches nothing is a mistake:

        >>> from torch import nn
        >>> context = ClipContext(parameters=list(nn.Linear(2, 2).named_parameters()))
        >>> rule = Groups({"haed.*": ValueClip(max_abs=1.0)})
        >>> rule.decide(context, rule.initial_state())
        Traceback (most recent call last):
        ValueError: every pattern must match a parameter, got 'haed.*', which matches none of ...
    """

    rules: Mapping[str, ClippingRule | None] | tuple[tuple[str, ClippingRule | None], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", _checked(self.rules))

    @property
    def pairs(self) -> tuple[tuple[str, ClippingRule | None], ...]:
        """Patterns and rules, in order."""
        assert isinstance(self.rules, tuple)  # set in __post_init__
        return self.rules

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns, in order."""
        return tuple(pattern for pattern, _ in self.pairs)

    @property
    def norm_order(self) -> float | None:
        """Order of the norms that most of the rules read; None if none reads norms."""
        orders = [rule.norm_order for _, rule in self.pairs if rule is not None]
        read = [order for order in orders if order is not None]
        return max(read, key=read.count) if read else None

    @property
    def needs_horizon(self) -> bool:
        """Whether one of the rules has a schedule."""
        return any(rule.needs_horizon for _, rule in self.pairs if rule is not None)

    def initial_state(self) -> RuleState:
        """Returns the initial state of each rule, by pattern."""
        return {pattern: rule.initial_state() for pattern, rule in self.pairs if rule is not None}

    def accepts(self, state: RuleState) -> bool:
        """Returns whether the state has the same patterns, and each rule accepts its own state."""
        return super().accepts(state) and all(
            rule is None or rule.accepts(state[pattern]) for pattern, rule in self.pairs
        )

    def resolve(self, horizon: Horizon) -> Groups:
        """Returns the groups with every schedule resolved on a horizon."""
        resolved = ((p, None if rule is None else rule.resolve(horizon)) for p, rule in self.pairs)
        return replace(self, rules=tuple(resolved))

    def forget(self, names: Collection[str], state: RuleState) -> None:
        """Removes the history of replaced parameters from the state of each rule."""
        for pattern, rule in self.pairs:
            if rule is not None:
                rule.forget(names, state[pattern])

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """Decides for each pattern separately; the decisions are in ``by_pattern``."""
        context.check_patterns(self.patterns)
        order = self.norm_order
        norms = None if order is None else context.norms_of_type(order)
        matches = first_match(tuple(name for name, _ in context.parameters), self.patterns)
        decisions = {}
        for index, (pattern, rule) in enumerate(self.pairs):
            if rule is None:
                continue
            members = [
                member
                for member, match in zip(context.parameters, matches, strict=True)
                if match == index
            ]
            if not members:
                continue  # all parameters of the pattern belong to other optimizers
            part = replace(context, parameters=members, norms=self._norms_of_group(norms, index))
            decisions[pattern] = rule.decide(part, state[pattern])
        return ClipDecision(norms=norms, by_pattern=decisions)

    def _norms_of_group(self, norms: GradientNorms | None, index: int) -> GradientNorms | None:
        if norms is None:
            return None
        matches = first_match(norms.names, self.patterns)
        return norms.select([i for i, match in enumerate(matches) if match == index])


def _checked(
    rules: Mapping[str, ClippingRule | None] | tuple[tuple[str, ClippingRule | None], ...],
) -> tuple[tuple[str, ClippingRule | None], ...]:
    pairs: Any = tuple(rules.items()) if isinstance(rules, Mapping) else rules
    is_sequence = isinstance(pairs, (tuple, list))
    if not is_sequence or not all(isinstance(p, (tuple, list)) and len(p) == 2 for p in pairs):
        raise ValueError(
            f"rules must be a dict from patterns to rules, got {shown(rules)}; write "
            "{'*': NormClip()}"
        )
    checked = tuple((pattern, rule) for pattern, rule in pairs)
    if not checked:
        raise ValueError(
            f"rules must contain at least one pattern, got {shown(rules)}; try {{'*': NormClip()}}"
        )
    for pattern, rule in checked:
        if not isinstance(pattern, str):
            raise ValueError(
                f"rules must have patterns as keys, got {shown(pattern)}; write a string"
            )
        if rule is not None and not isinstance(rule, ClippingRule):
            raise ValueError(
                f"rules[{shown(pattern)}] must be a ClippingRule or None, got {shown(rule)}; try "
                "NormClip()"
            )
    return checked
