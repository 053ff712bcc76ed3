"""Clipping: a rule's decision, carried out where it costs least."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_bigopt import trainer_access
from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.gradients import ClipContext, ClippingRule, apply_, clear_
from lightning_bigopt.gradients.rules.base import RuleState

if TYPE_CHECKING:
    from lightning_bigopt.pipeline import OptimizerStep, Pipeline

__all__ = ["GradientClippingController"]


class GradientClippingController(Controller):
    """Limits the gradient of every accepted update; one state of the rule for each optimiser."""

    role = "gradient clipping"
    rank = 50

    def __init__(self, rule: ClippingRule) -> None:
        if not isinstance(rule, ClippingRule):
            raise ValueError(
                f"rule must be a ClippingRule, got {rule!r}; try NormClip(max_norm=1.0)"
            )
        self.rule = rule
        self._resolved = rule
        self._states: dict[str, RuleState] = {}

    @property
    def needs_horizon(self) -> bool:  # type: ignore[override]
        """A scheduled threshold needs to know where the run ends."""
        return getattr(self.rule, "schedule", None) is not None

    @property
    def norm_type(self) -> float:
        """The order of the norm that the rule reads; 2 where it reads none."""
        return self.rule.measures or 2.0

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

    def on_train_start(self, pipeline: Pipeline) -> None:
        """Converts the durations of a scheduled threshold."""
        horizon = pipeline.clock.horizon
        self._resolved = self.rule if horizon is None else self.rule.resolve(horizon)

    def wants_norms(self, step: OptimizerStep) -> bool:
        """Some rules look at entries or units only."""
        return self.rule.measures is not None

    def clip(self, step: OptimizerStep) -> None:
        """Decides once, and carries it out."""
        label = trainer_access.optimizer_label(step.pipeline.trainer, step.optimizer)
        state = self._states.get(label)
        if state is None:
            state = self._states[label] = self.rule.initial_state()
        context = ClipContext(
            parameters=step.parameters,
            norms=step.norms if self.wants_norms(step) else None,
            optimizer=step.optimizer,
            fraction=step.progress.fraction,
            process_group=trainer_access.shard_group(step.pipeline.trainer),
        )
        step.decision = self._resolved.decide(context, state)
        apply_(step.decision, optimizer=step.optimizer)

    def on_fit_end(self, pipeline: Pipeline) -> None:
        """Takes back what waits for a step that never came."""
        for optimizer in pipeline.trainer.optimizers:
            clear_(getattr(optimizer, "optimizer", optimizer))

    def reset(self) -> None:
        """Forgets every history."""
        self._states = {}

    def state_dict(self) -> dict[str, Any]:
        """The rule's history, an optimiser each."""
        return {"rule": self._states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the histories of a checkpoint."""
        self._states = dict(state["rule"])
