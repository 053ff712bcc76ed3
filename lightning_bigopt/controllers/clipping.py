"""Clipping: a rule's decision, carried out where it costs least."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_bigopt import trainer_access
from lightning_bigopt.controllers.audit import ClipAudit, ClipReport, advice
from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.gradients import ClipContext, ClippingRule, Groups, apply_, clear_
from lightning_bigopt.gradients.rules.base import RuleState
from lightning_bigopt.reporting.tags import tag_name

if TYPE_CHECKING:
    from lightning_bigopt.pipeline import OptimizerStep, Pipeline

__all__ = ["GradientClippingController"]


class GradientClippingController(Controller):
    """Limits the gradient of every accepted update; one state of the rule for each optimizer."""

    role = "gradient clipping"
    rank = 50

    def __init__(self, rule: ClippingRule) -> None:
        if not isinstance(rule, ClippingRule):
            raise ValueError(
                f"rule must be a ClippingRule, got {rule!r}; try NormClip(max_norm=1.0)"
            )
        self.rule = rule
        self.norm_type = rule.measures or 2.0  # of the norms that everybody reads
        self._reads_norms = rule.measures is not None
        self._resolved = rule
        self._names: tuple[str, ...] = ()
        self._states: dict[str, RuleState] = {}
        self._audits: dict[str, dict[str, ClipAudit]] = {}

    @property
    def needs_horizon(self) -> bool:  # type: ignore[override]
        """A scheduled threshold needs to know where the run ends."""
        return self.rule.needs_horizon

    def on_fit_start(self, pipeline: Pipeline) -> None:
        """Refuses a second owner of clipping."""
        trainer = pipeline.trainer
        if trainer.gradient_clip_val is not None:
            raise ValueError(
                "gradient_clip_val must be None with GradientClipping, got "
                f"{trainer.gradient_clip_val}; keep one of them"
            )
        if is_overridden("configure_gradient_clipping", pipeline.module):
            raise ValueError(
                "configure_gradient_clipping must not be overridden with GradientClipping, got "
                f"one in {type(pipeline.module).__name__}; keep one of them"
            )
        if trainer_access.is_deepspeed(trainer):
            raise ValueError(
                "strategy must not be DeepSpeed with GradientClipping, got "
                f"{type(trainer.strategy).__name__}: DeepSpeed clips by itself; set "
                "gradient_clipping in its config"
            )
        for optimizer in trainer.optimizers:
            if trainer_access.is_private(optimizer):
                raise ValueError(
                    f"optimizer must not be Opacus' with GradientClipping, got "
                    f"{type(optimizer).__name__}: it clips every sample's gradient already, and "
                    "its noise is measured against that limit; set max_grad_norm there"
                )

    def on_train_start(self, pipeline: Pipeline) -> None:
        """Converts the durations of a scheduled threshold; nobody else clips, and none is asked."""
        trainer_access.pass_over_clipping(pipeline.trainer)
        self._names = pipeline.parameter_names
        horizon = pipeline.clock.horizon
        self._resolved = self.rule if horizon is None else self.rule.resolve(horizon)

    def wants_norms(self, step: OptimizerStep) -> bool:
        """Some rules look at entries or units only."""
        return self._reads_norms

    def clip(self, step: OptimizerStep) -> None:
        """Decides once, and carries it out."""
        optimizer, pipeline, label = step.optimizer, step.pipeline, step.label
        state = self._states.get(label)
        if state is None:
            state = self._states[label] = self._resolved.initial_state()
        context = ClipContext(
            parameters=step.parameters,
            norms=step.coming_norms if self._reads_norms else None,
            optimizer=optimizer,
            fraction=pipeline.window.fraction,
            process_group=pipeline.shard_group,
            all_names=self._names,
        )
        step.decision = self._resolved.decide(context, state)
        apply_(step.decision, optimizer=optimizer)
        audits = self._audits.setdefault(label, {})
        for group, decision in step.decision.by_group.items():
            audit = audits.get(group)
            if audit is None:
                audit = audits[group] = ClipAudit()
            audit.add(decision)

    def metrics(self, pipeline: Pipeline) -> Mapping[str, float | Tensor]:
        """The share of updates clipped since the last logged one."""
        shares = {
            tag_name("clip/fraction", label, group): audit.take_share()
            for label, audits in self._audits.items()
            for group, audit in audits.items()
        }
        return {tag: share for tag, share in shares.items() if share is not None}

    def reports(self) -> dict[tuple[str, str], ClipReport]:
        """What clipping has done so far, by optimizer and group. Synchronizes."""
        found = {
            (label, group): audit.report()
            for label, audits in self._audits.items()
            for group, audit in audits.items()
        }
        return {key: report for key, report in found.items() if report is not None}

    def on_fit_end(self, pipeline: Pipeline) -> None:
        """Takes back what waits for a step that never came, and says how often clipping acted."""
        trainer_access.come_back_to_clipping(pipeline.trainer)
        for optimizer in pipeline.trainer.optimizers:
            clear_(optimizer)
        rules = dict(self.rule.pairs) if isinstance(self.rule, Groups) else {"": self.rule}
        for (label, group), report in self.reports().items():
            whose = "".join(f", {name}" for name in (label, group) if name)
            rule = rules[group]
            assert rule is not None  # it has decided
            hint = advice(report, rule)
            rank_zero_info(
                f"{type(rule).__name__}{whose}: {report}." + (f" {hint}" if hint else "")
            )

    def reset(self) -> None:
        """Forgets every history."""
        self._states = {}
        self._audits = {}

    def state_dict(self) -> dict[str, Any]:
        """The rule's history and the audit's counts, an optimizer each."""
        audits = {
            label: {group: audit.state_dict() for group, audit in audits.items()}
            for label, audits in self._audits.items()
        }
        return {"rule": copy.deepcopy(self._states), "audit": audits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the histories of a checkpoint."""
        self._states = copy.deepcopy(state["rule"])
        self._audits = {}
        for label, audits in state.get("audit", {}).items():
            for group, saved in audits.items():
                audit = self._audits.setdefault(label, {})[group] = ClipAudit()
                audit.load_state_dict(saved)
