"""GradientClipping: clips the gradient of every update by a rule."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_bigopt.callbacks.resume_report import (
    as_code,
    changed_settings,
    report_changed_settings,
)
from lightning_bigopt.checks import check_instance
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.engine.update import Update
from lightning_bigopt.gradients.apply import apply_
from lightning_bigopt.gradients.clip_statistics import ClipReport, ClipStatistics, advice
from lightning_bigopt.gradients.rules.clipping_rule import ClipContext, ClippingRule, RuleState
from lightning_bigopt.gradients.rules.rule_groups import Groups
from lightning_bigopt.monitoring.tags import tag_name
from lightning_bigopt.optimizers.names import is_opacus_optimizer
from lightning_bigopt.parameters import tied_names
from lightning_bigopt.trainer_access import strategies

__all__ = ["GradientClipping"]


class GradientClipping(Capability):
    """Clips the gradient of every update by a rule, after reduction and unscaling.

    The norm is the global norm on one device and under DDP, FSDP1 and FSDP2, in 32-true, bf16-mixed
    and 16-mixed precision. It is measured once per update, in float32, and shared with all other
    callbacks. A fused optimizer receives the coefficient and scales the gradient inside its kernel.
    Several optimizers (manual optimization) are each clipped by their own norm when they step. For
    one norm over all of them call :func:`~lightning_bigopt.gradients.clip_gradients_` after the
    backward pass instead.

    Args:
        rule: The clipping rule.

    Raises:
        ValueError: At fit start with ``Trainer(gradient_clip_val=)``, a module that overrides
            ``configure_gradient_clipping``, an optimizer of Opacus, or DeepSpeed.

    Logs:
        With an OptimizationMonitor ``clip/coefficient``, ``clip/threshold`` and ``clip/fraction``.

    State:
        ``rule``: the state of the rule for each optimizer; ``audit``: counts of clipped updates;
        ``settings``: the rule as code. With another rule than that of the checkpoint, both start
        again, and the change is logged.

    Example:
        >>> from lightning_bigopt import GradientClipping, NormClip
        >>> GradientClipping(NormClip(max_norm=1.0))
        GradientClipping(NormClip(...))
    """

    owns = "gradient clipping"
    rank = 50
    needs_samples = None

    def __init__(self, rule: ClippingRule) -> None:
        check_instance("rule", rule, ClippingRule, hint="try NormClip(max_norm=1.0)")
        self.rule = rule
        # The engine measures norms of one order, which all capabilities share. Rules without norms
        # have the order None.
        self.norm_order = rule.norm_order or 2.0
        self.needs_horizon = rule.needs_horizon  # for a scheduled threshold
        self._resolved = rule
        self._saved_settings: dict[str, str] | None = None
        self._names: tuple[str, ...] = ()
        self._tied: tuple[tuple[str, str], ...] = ()
        self._parameters: dict[str, list[tuple[str, nn.Parameter]]] = {}
        self.reset()

    def check_fit(self, fit: Fit) -> None:
        """Raises if anything else clips gradients."""
        trainer = fit.trainer
        # Lightning does not clip at 0 either.
        if trainer.gradient_clip_val is not None and trainer.gradient_clip_val > 0:
            raise ValueError(
                "gradient_clip_val must be None with GradientClipping, got "
                f"{trainer.gradient_clip_val}; keep one of them"
            )
        if is_overridden("configure_gradient_clipping", fit.module):
            raise ValueError(
                "configure_gradient_clipping must not be overridden with GradientClipping, got "
                f"one in {type(fit.module).__name__}; keep one of them"
            )
        if strategies.is_deepspeed(trainer):
            raise ValueError(
                "strategy must not be DeepSpeed with GradientClipping, got "
                f"{type(trainer.strategy).__name__}, which clips itself; set gradient_clipping in "
                "its config"
            )
        for optimizer in trainer.optimizers:
            if is_opacus_optimizer(optimizer):
                raise ValueError(
                    "optimizer must not be an optimizer of Opacus with GradientClipping, got "
                    f"{type(optimizer).__name__}, which clips the gradient of each sample and "
                    "scales its noise by that limit; set its max_grad_norm"
                )

    def start(self, fit: Fit) -> None:
        """Resolves the durations of a scheduled threshold on the horizon."""
        self._names, self._parameters = fit.parameter_names(), {}
        self._tied = tied_names(fit.module)
        horizon = fit.clock.horizon
        self._resolved = self.rule if horizon is None else self.rule.resolve(horizon)

    def announce(self, fit: Fit) -> None:
        """Logs a change of the rule since the checkpoint."""
        saved, self._saved_settings = self._saved_settings, None
        report_changed_settings(saved, self._settings())

    def needs_norms(self, update: Update) -> bool:
        """Returns whether the rule reads norms of whole tensors."""
        return self.rule.norm_order is not None

    def clip(self, update: Update) -> None:
        """Decides by the rule, applies the decision, and counts it."""
        state = self._states.get(update.label)
        if state is None:
            state = self._states[update.label] = self._resolved.initial_state()
        self._forget_replaced(update, state)
        context = ClipContext(
            parameters=update.parameters,
            norms=update.norms_after_guard if self.rule.norm_order is not None else None,
            optimizer=update.optimizer,
            fraction=update.progress.fraction,
            process_group=update.shard_group,
            all_names=self._names,
            tied=self._tied,
        )
        update.decision = self._resolved.decide(context, state)
        apply_(update.decision, optimizer=update.optimizer)
        statistics = self._statistics.setdefault(update.label, {})
        for group, decision in update.decision.each_group():
            statistics.setdefault(group, ClipStatistics()).add(decision)

    def _forget_replaced(self, update: Update, state: RuleState) -> None:
        """Removes the history of parameters whose tensors have been replaced from the state."""
        before = self._parameters.get(update.label)
        if before is update.parameters:  # a new list is made when a parameter changes
            return
        self._parameters[update.label] = update.parameters
        tensors = dict(before or ())
        replaced = {n for n, p in update.parameters if n in tensors and tensors[n] is not p}
        if replaced:
            self._resolved.forget(replaced, state)

    def metrics(self, fit: Fit) -> Mapping[str, float | Tensor]:
        """Returns the fraction of updates that were clipped since the last logged update."""
        fractions = {
            tag_name("clip/fraction", label, group): statistics.fraction_since_last_log()
            for label, groups in self._statistics.items()
            for group, statistics in groups.items()
        }
        return {tag: fraction for tag, fraction in fractions.items() if fraction is not None}

    def reports(self) -> dict[tuple[str, str], ClipReport]:
        """Summarizes the clipping so far, by optimizer and group of the rule. Synchronizes."""
        reports = {
            (label, group): statistics.report()
            for label, groups in self._statistics.items()
            for group, statistics in groups.items()
        }
        return {key: report for key, report in reports.items() if report is not None}

    def end(self, fit: Fit) -> None:
        """Logs how often clipping acted, with advice on the threshold."""
        self._parameters = {}
        rules = dict(self.rule.pairs) if isinstance(self.rule, Groups) else {"": self.rule}
        for (label, group), report in self.reports().items():
            names = "".join(f", {name}" for name in (label, group) if name)
            rule = rules[group]
            assert rule is not None  # a group without a rule has no statistics
            hint = advice(report, rule)
            rank_zero_info(
                f"{type(rule).__name__}{names}: {report}." + (f" {hint}" if hint else "")
            )

    def specification(self) -> str:
        """Returns the rule as code."""
        return repr(self.rule)

    def _settings(self) -> dict[str, str]:
        return {self.owns: as_code(self.rule)}

    def reset(self) -> None:
        """Clears the states of the rule and the counts."""
        self._states: dict[str, RuleState] = {}
        self._statistics: dict[str, dict[str, ClipStatistics]] = {}
        self._saved_settings = None

    def saved_state(self) -> dict[str, Any]:
        """Returns the state of the rule and the counts, by optimizer."""
        counts = {
            label: {group: statistics.state_dict() for group, statistics in groups.items()}
            for label, groups in self._statistics.items()
        }
        rule = copy.deepcopy(self._states)
        return {"rule": rule, "audit": counts, "settings": self._settings()}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the state of the rule and the counts, unless another rule has saved them."""
        self.reset()
        self._saved_settings = state.get("settings")
        if changed_settings(self._saved_settings, self._settings()):
            return
        self._states = copy.deepcopy(state["rule"])
        for label, groups in state.get("audit", {}).items():
            for group, saved in groups.items():
                statistics = ClipStatistics()
                statistics.load_state_dict(saved)
                self._statistics.setdefault(label, {})[group] = statistics

    def __repr__(self) -> str:
        return f"GradientClipping({type(self.rule).__name__}(...))"
