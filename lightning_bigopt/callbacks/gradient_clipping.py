"""GradientClipping: clips the gradient of every update by a rule."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.callbacks.resume_report import changed_settings, report_changed_settings
from lightning_bigopt.checks import as_code, check_choice
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Batch, Fit
from lightning_bigopt.engine.update import Update
from lightning_bigopt.gradients.apply import apply_
from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.clip_statistics import (
    ClipReport,
    ClipStatistics,
    loaded_counts,
    saved_counts,
    summaries,
)
from lightning_bigopt.gradients.clip_warnings import clip_warnings
from lightning_bigopt.gradients.gradient_norms import GradientNorms, unread_total
from lightning_bigopt.gradients.measure import measure
from lightning_bigopt.gradients.rules.clipping_rule import ClipContext, ClippingRule, RuleState
from lightning_bigopt.gradients.shared_decision import SharedDecision, check_rule, joint_norms
from lightning_bigopt.monitoring.tags import tag_name
from lightning_bigopt.optimizers.private import check_not_private
from lightning_bigopt.parameters import tied_names
from lightning_bigopt.trainer_access import loop, precision, strategies
from lightning_bigopt.trainer_access.packages import own

__all__ = ["ClippingScope", "GradientClipping"]

ClippingScope: TypeAlias = Literal["optimizer", "all"]
_NamedParameters: TypeAlias = list[tuple[str, nn.Parameter]]


@explain_arguments
class GradientClipping(Capability):
    """Clips the gradient of every update by a rule, after reduction and unscaling.

    The norm is the global norm on one device and under DDP, FSDP1 and FSDP2, in 32-true, bf16-mixed
    and 16-mixed precision. It is measured once per update, in float32, and shared with all other
    callbacks. A fused optimizer receives the coefficient and scales the gradient inside its kernel.
    Several optimizers (manual optimization) are each clipped by their own norm when they step, or
    with ``scope="all"`` by one norm over the gradients of all optimizers.

    Args:
        rule: The clipping rule.
        scope: ``"optimizer"`` gives each optimizer a norm, a decision and a state of its own.
            ``"all"`` makes one decision for all optimizers of the Trainer when the first of them
            steps, and applies its coefficient to the gradients of each optimizer when that one
            steps. All backward passes must run before the first step of the batch. Every gradient
            that is not None by then counts, also an old one that has not been set to zero; the
            gradients of an optimizer with a NaN or an infinity do not. Without several optimizers
            both are the same.

    Raises:
        ValueError: If ``scope="all"`` is used with a rule that has no common coefficient, such as
            :class:`AGC` or :class:`ValueClip`. At fit start with ``Trainer(gradient_clip_val=)``, a
            module that overrides ``configure_gradient_clipping``, an optimizer of Opacus, or
            DeepSpeed; with ``scope="all"``, several optimizers and a GradScaler. In a step with
            ``scope="all"`` if a gradient has changed since the first step of the batch.

    Logs:
        With an OptimizationMonitor ``clip/coefficient``, ``clip/threshold`` and ``clip/fraction``;
        for several optimizers with ``scope="all"`` also ``grad_norm/total`` of all of them.

    State:
        ``rule``: the state of the rule for each optimizer, or one with ``scope="all"``; ``audit``:
        counts of clipped updates; ``settings``: the rule as code, and the scope. With another rule
        or scope than that of the checkpoint, both start again, and the change is logged.

    Example:
        >>> from lightning_bigopt import GradientClipping, NormClip
        >>> GradientClipping(NormClip(max_norm=1.0))
        GradientClipping(NormClip(...))

        One norm for several optimizers that step together:

        >>> GradientClipping(NormClip(max_norm=1.0), scope="all")
        GradientClipping(NormClip(...), scope='all')
    """

    owns = "gradient clipping"
    rank = 50
    needs_samples = None

    def __init__(self, rule: ClippingRule, *, scope: ClippingScope = "optimizer") -> None:
        check_choice("scope", scope, ClippingScope)
        check_rule(rule, is_shared=scope == "all")
        self.rule, self.scope = rule, scope
        # The engine measures norms of one order, which all capabilities share. Rules without norms
        # have the order None.
        self.norm_order = rule.norm_order or 2.0
        self.needs_horizon = rule.needs_horizon  # for a scheduled threshold
        self._resolved = rule
        self._saved_settings: dict[str, str] | None = None
        self._names: tuple[str, ...] = ()
        self._tied: tuple[tuple[str, str], ...] = ()
        self._parameters: dict[str, _NamedParameters] = {}
        self._shared: SharedDecision | None = None
        self._stepped: set[int] = set()  # the optimizers that have reached it
        self._joint_norm: float | Tensor | None = None  # of the last shared decision
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
        is_overridden = own(trainer, "utilities.model_helpers.is_overridden")
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
        check_not_private(
            trainer.optimizers,
            "GradientClipping",
            "which clips the gradient of each sample and scales its noise by that limit; set its "
            "max_grad_norm",
        )

    def check_optimizers(self, fit: Fit) -> None:
        """Raises if several optimizers share a norm under a GradScaler."""
        if self._is_shared(fit) and precision.gradient_scaler(fit.trainer) is not None:
            raise ValueError(
                "precision must not be 16-mixed with GradientClipping(scope='all') and several "
                "optimizers, got a GradScaler, which unscales the gradients of an optimizer only "
                "when that one steps; use bf16-mixed, or scope='optimizer'"
            )

    def _is_shared(self, fit: Fit) -> bool:
        """Returns whether several optimizers share a norm."""
        return self.scope == "all" and len(fit.trainer.optimizers) > 1

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

    def rescale(self, update: Update) -> None:
        """Checks that no gradient has changed since the shared decision."""
        if id(update.optimizer) in self._stepped:  # the next step of the same optimizer
            self._end_decision()
        self._stepped.add(id(update.optimizer))
        if self._shared is not None:  # checked before a StepGuard scales or drops gradients
            self._shared.check(update.parameters)

    def clip(self, update: Update) -> None:
        """Decides by the rule, applies the decision, and counts it."""
        if self.fit is not None and self._is_shared(self.fit):
            if self._shared is None:
                self._shared = self._decide_for_all(self.fit, update)
            update.decision = self._shared.clip_(update.optimizer, update.norms_after_guard)
            return
        self._forget_replaced(update)
        norms = update.norms_after_guard if self.rule.norm_order is not None else None
        update.decision = self._decide(update, update.label, update.parameters, norms)
        apply_(update.decision, optimizer=update.optimizer)

    def _decide_for_all(self, fit: Fit, update: Update) -> SharedDecision:
        """Decides on the gradients of all optimizers, before the first of them steps."""
        parameters, parts = list(update.parameters), [update.norms_after_guard]
        known = {id(parameter) for _, parameter in parameters}
        for optimizer in fit.trainer.optimizers:
            # A parameter of several optimizers counts once.
            others = [p for p in fit.optimizer_info(optimizer).parameters if id(p[1]) not in known]
            if others:
                order, group = update.norm_order, update.shard_group
                parts.append(measure(others, norm_type=order, process_group=group))
            parameters += others
            known.update(id(parameter) for _, parameter in others)
        joint = joint_norms(parts)
        self._joint_norm = unread_total(joint)
        return SharedDecision(self._decide(update, "", parameters, joint), parameters)

    def _decide(
        self, update: Update, label: str, parameters: _NamedParameters, norms: GradientNorms | None
    ) -> ClipDecision:
        """Decides on parameters with one state of the rule, and counts the decision."""
        context = ClipContext(
            parameters=parameters,
            norms=norms,
            optimizer=update.optimizer if parameters is update.parameters else None,
            fraction=update.progress.fraction,
            process_group=update.shard_group,
            all_names=self._names,
            tied=self._tied,
        )
        decision = self._resolved.decide(context, self._state(label))
        statistics = self._statistics.setdefault(label, {})
        for group, part in decision.each_group():
            statistics.setdefault(group, ClipStatistics()).add(part)
        return decision

    def _state(self, label: str) -> RuleState:
        state = self._states.get(label)
        if state is None:
            state = self._states[label] = self._resolved.initial_state()
        return state

    def end_batch(self, batch: Batch) -> None:
        """Ends the shared decision."""
        self._end_decision()

    def _end_decision(self) -> None:
        self._shared, self._stepped = None, set()

    def _forget_replaced(self, update: Update) -> None:
        """Removes the history of parameters whose tensors have been replaced from the state."""
        before = self._parameters.get(update.label)
        if before is update.parameters:  # a new list is made when a parameter changes
            return
        self._parameters[update.label] = update.parameters
        tensors = dict(before or ())
        replaced = {n for n, p in update.parameters if n in tensors and tensors[n] is not p}
        if replaced:
            self._resolved.forget(replaced, self._state(update.label))

    def metrics(self, fit: Fit) -> Mapping[str, float | Tensor]:
        """Returns the fraction of clipped updates since the last logged one, and a joint norm."""
        fractions = {
            tag_name("clip/fraction", label, group): statistics.fraction_since_last_log()
            for label, groups in self._statistics.items()
            for group, statistics in groups.items()
        }
        values = {tag: fraction for tag, fraction in fractions.items() if fraction is not None}
        if self._joint_norm is not None:
            values["grad_norm/total"], self._joint_norm = self._joint_norm, None
        return values

    def reports(self) -> dict[tuple[str, str], ClipReport]:
        """Summarizes the clipping so far, by optimizer and group of the rule. Synchronizes."""
        reports = {
            (label, group): statistics.report()
            for label, groups in self._statistics.items()
            for group, statistics in groups.items()
        }
        return {key: report for key, report in reports.items() if report is not None}

    def end(self, fit: Fit) -> None:
        """Logs how often clipping acted, with advice; warns if other code has clipped before."""
        self._parameters, self._joint_norm = {}, None
        self._end_decision()
        is_short = loop.is_fast_dev_run(fit.trainer)  # one update has no statistics
        if is_short:
            return
        reports = self.reports()
        for line in summaries(self.rule, reports):
            rank_zero_info(line)
        for line in clip_warnings(reports):
            rank_zero_warn(line)

    def specification(self) -> str:
        """Returns the rule as code, with a scope other than the default."""
        return repr(self.rule) + self._scope_text()

    def _scope_text(self) -> str:
        return "" if self.scope == "optimizer" else f", scope={self.scope!r}"

    def _settings(self) -> dict[str, str]:
        return {self.owns: as_code(self.rule), "scope": self.scope}

    def reset(self) -> None:
        """Clears the states of the rule and the counts."""
        self._states: dict[str, RuleState] = {}
        self._statistics: dict[str, dict[str, ClipStatistics]] = {}
        self._saved_settings = None

    def saved_state(self) -> dict[str, Any]:
        """Returns the state of the rule and the counts, by optimizer."""
        rule, counts = copy.deepcopy(self._states), saved_counts(self._statistics)
        return {"rule": rule, "audit": counts, "settings": self._settings()}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the state of the rule and the counts, unless another rule has saved them."""
        self.reset()
        saved = self._saved_settings = state.get("settings")  # None in a checkpoint of version 0.1
        if saved is None and not all(map(self.rule.accepts, state["rule"].values())):
            saved = self._saved_settings = {self.owns: "another rule, whose history is not used"}
        if changed_settings(saved, self._settings()):
            return
        self._states = copy.deepcopy(state["rule"])
        self._statistics = loaded_counts(state.get("audit", {}))

    def __repr__(self) -> str:
        return f"GradientClipping({type(self.rule).__name__}(...){self._scope_text()})"
