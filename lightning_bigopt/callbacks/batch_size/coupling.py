"""Scales learning rate, Adam's second beta and weight decay with the batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

from torch.optim import Optimizer

from lightning_bigopt.batching.scaling_rules import (
    ScalingRule,
    learning_rate_factor,
    recommended_rule,
    scaled_beta,
    weight_decay_factor,
)
from lightning_bigopt.checks import as_code, check_choice, shown
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine.clock import Clock
from lightning_bigopt.engine.stage import LEARNING_RATE, Fit
from lightning_bigopt.optimizers.names import part_optimizers
from lightning_bigopt.trainer_access import schedulers

__all__ = ["BatchCoupling"]

_BETA2, _DECAY = "betas[1]", "weight_decay"


class BatchCoupling:
    """Scales hyperparameters with κ, the current global batch size over the first one of the run.

    With a re-warm-up the factor on the learning rate is the mean of the factors over the last
    ``rewarmup`` of training: after a jump of the batch size it changes linearly from the old factor
    to the new one.

    Args:
        lr_scaling: Rule for the learning rate: ``"sqrt"``, ``"linear"`` or None.
        beta2_scaling: Rule for Adam's second beta: ``"half-life"`` or None.
        weight_decay_scaling: Rule for the weight decay: ``"sqrt"`` or None.
        rewarmup: Length of the transition to a new factor on the learning rate; None to jump.
        max_kappa: Upper bound of κ; None for no bound.

    Attributes:
        base: The first global batch size of the run; None before it is known.
    """

    def __init__(
        self,
        *,
        lr_scaling: ScalingRule | None = None,
        beta2_scaling: Literal["half-life"] | None = None,
        weight_decay_scaling: Literal["sqrt"] | None = None,
        rewarmup: DurationLike | None = None,
        max_kappa: float | None = None,
    ) -> None:
        for name, value, choices in (
            ("lr_scaling", lr_scaling, ("sqrt", "linear", None)),
            ("beta2_scaling", beta2_scaling, ("half-life", None)),
            ("weight_decay_scaling", weight_decay_scaling, ("sqrt", None)),
        ):
            check_choice(name, value, choices)
        learning_rate_factor(1.0, rule="sqrt", max_kappa=max_kappa)  # checks max_kappa
        self.rewarmup: Duration | None = None
        if rewarmup is not None:
            self.rewarmup = Duration.parse(rewarmup, name="rewarmup")
            if self.rewarmup.unit == "seconds":
                raise ValueError(
                    "rewarmup must be in steps, epochs, samples, tokens or percent, got "
                    f"{shown(rewarmup)}; write '1%'"
                )
            if not self.rewarmup.value:
                raise ValueError(
                    f"rewarmup must be positive or None, got {shown(rewarmup)}; None jumps"
                )
            if lr_scaling is None:
                raise ValueError(
                    f"rewarmup must be None without lr_scaling, got {shown(rewarmup)}; pass "
                    "lr_scaling='sqrt' or 'linear'"
                )
        self.lr_scaling = lr_scaling
        self.beta2_scaling = beta2_scaling
        self.weight_decay_scaling = weight_decay_scaling
        self.max_kappa = max_kappa
        self.base: int | None = None
        # Changes of the factor: (amount trained, in the unit of the re-warm-up; new factor).
        self._trail: list[tuple[float, float]] = []
        self._planned: list[tuple[float, float]] = []
        self._clock: Clock | None = None

    @property
    def is_active(self) -> bool:
        """Whether any hyperparameter is scaled with the batch size."""
        return bool(self.lr_scaling or self.beta2_scaling or self.weight_decay_scaling)

    def settings(self) -> dict[str, str]:
        """Returns the arguments as code, by name."""
        names = ("lr_scaling", "beta2_scaling", "weight_decay_scaling", "max_kappa")
        values = {name: as_code(getattr(self, name)) for name in names}
        return values | {"rewarmup": str(self.rewarmup)}

    # ------------------------------------------------------------------------------ lifetime

    def check_optimizers(self, fit: Fit) -> None:
        """Claims the fields that are scaled.

        Raises:
            ValueError: If another capability or scheduler writes a field, or a parameter group does
                not have it.
        """
        for name, field in (("beta2_scaling", _BETA2), ("weight_decay_scaling", _DECAY)):
            if getattr(self, name) is not None:
                self._claim(fit, name, field)
        counts_tokens = fit.clock.settings.tokens is not None
        if self.rewarmup is not None and self.rewarmup.unit == "tokens" and not counts_tokens:
            raise ValueError(
                f"tokens must be given with rewarmup={str(self.rewarmup)!r}, got None; pass "
                "tokens=a function of the batch, or write rewarmup in samples"
            )
        if self.lr_scaling is None:
            return
        if LEARNING_RATE not in fit.owners() and fit.trainer.lr_scheduler_configs:
            raise ValueError(
                "configure_optimizers must not return a scheduler with lr_scaling, got "
                f"{schedulers.scheduler_names(fit.trainer)}, which writes the learning rate; "
                "return the optimizer only and add LearningRateScheduler(...) to the callbacks"
            )
        fit.groups.claim("lr")

    def _claim(self, fit: Fit, name: str, field: str) -> None:
        if f"schedule of {field}" in fit.owners():
            raise ValueError(
                f"{name} must be None with HyperparameterScheduler({field!r}), got "
                f"{getattr(self, name)!r}: both write the field; remove one of them"
            )
        try:
            fit.groups.claim(field)
        except ValueError as error:
            kinds = ", ".join(type(optimizer).__name__ for _, optimizer in fit.groups)
            raise ValueError(
                f"{name} must be None for {kinds}, whose groups have no {field}, got "
                f"{getattr(self, name)!r}; remove {name}="
            ) from error

    def start(
        self,
        fit: Fit,
        *,
        size_at: Callable[[Progress], int],
        changes: Sequence[tuple[Progress, int]],
        owner: object,
    ) -> None:
        """Adds the factors to the adjustments of the fields.

        Args:
            fit: The fit.
            size_at: Returns the global batch size of the update that starts at a progress.
            changes: Planned changes of the global batch size of the run; empty if unknown.
            owner: The capability on whose behalf the fields are written.
        """
        if self.base is None:  # else it was restored from a checkpoint
            self.base = size_at(fit.clock.progress())
        self._clock = fit.clock
        if self.rewarmup is not None:
            unit = self.rewarmup.unit
            self._planned = [(at.consumed(unit), self._target(size)) for at, size in changes]
        groups, cap = fit.groups, self.max_kappa
        if self.lr_scaling is not None:
            groups.adjust("lr", lambda value, at: value * self.factor(size_at(at), at), owner=owner)
        if self.beta2_scaling is not None:
            groups.adjust(
                _BETA2,
                lambda beta, at: scaled_beta(beta, kappa=self.kappa(size_at(at)), max_kappa=cap),
                owner=owner,
            )
        if self.weight_decay_scaling is not None:
            groups.adjust(
                _DECAY,
                lambda decay, at: (
                    decay * weight_decay_factor(self.kappa(size_at(at)), max_kappa=cap)
                ),
                owner=owner,
            )

    def open_window(self, size: int, progress: Progress) -> None:
        """Records changes of the factor, as far back as the re-warm-up averages."""
        if self.rewarmup is None:
            return
        now, factor = progress.consumed(self.rewarmup.unit), self._target(size)
        if not self._trail or self._trail[-1][1] != factor:
            self._trail.append((now, factor))
        # The first entry stays in effect until the second one: it is dropped only when the second
        # one is older than the average, too.
        while len(self._trail) > 1 and self._trail[1][0] <= now - self.rewarmup.value:
            self._trail.pop(0)

    # --------------------------------------------------------------------------------- rules

    def kappa(self, size: int) -> float:
        """Returns the global batch size over the first one of the run, without the bound."""
        return size / (self.base or size)

    def factor(self, size: int, progress: Progress) -> float:
        """Returns the factor on the learning rate for an update.

        Args:
            size: Global batch size of the update.
            progress: Progress at the start of the update.
        """
        if self.rewarmup is None or not (trail := self._trail_until(progress)):
            return self._target(size)
        now, length = progress.consumed(self.rewarmup.unit), self.rewarmup.value
        # The mean of a step function over the last `length`. Its first factor also holds before
        # its own change, and its last factor has no end.
        edges = [-math.inf, *(start for start, _ in trail[1:]), math.inf]
        mean = 0.0
        for (start, stop), (_, factor) in zip(pairwise(edges), trail, strict=True):
            mean += factor * max(0.0, min(stop, now) - max(start, now - length)) / length
        return mean

    def _trail_until(self, progress: Progress) -> list[tuple[float, float]]:
        """Returns the recorded changes, and for a future update also the planned ones."""
        if self._clock is None or progress.steps <= self._clock.progress().steps:
            return self._trail
        last = self._trail[-1][0] if self._trail else -math.inf
        return self._trail + [point for point in self._planned if point[0] > last]

    def _target(self, size: int) -> float:
        if self.lr_scaling is None:
            return 1.0
        return learning_rate_factor(
            self.kappa(size), rule=self.lr_scaling, max_kappa=self.max_kappa
        )

    def advice(self, optimizers: Sequence[tuple[str, Optimizer]]) -> str:
        """Returns a sentence of advice if the learning rate is not scaled, else an empty string."""
        if self.lr_scaling is not None:
            return ""
        first = optimizers[0][1]
        parts = list(part_optimizers(first).values()) or [first]
        kinds = list(dict.fromkeys(type(part).__name__ for part in parts))
        rules = {recommended_rule(kind) for kind in kinds}
        hint = "'sqrt' suits Adam and its variants, 'linear' SGD"
        if len(rules) == 1 and None not in rules:
            hint = f"lr_scaling={rules.pop()!r} is recommended for {' and '.join(kinds)}"
        elif len(kinds) > 1:
            hint += f", and one rule applies to all parts ({', '.join(kinds)})"
        return f" The learning rate does not follow the batch (lr_scaling=None); {hint}."

    # --------------------------------------------------------------------------------- state

    def reset(self) -> None:
        """Clears the first batch size and the changes."""
        self.base, self._trail, self._planned, self._clock = None, [], [], None

    def state_dict(self) -> dict[str, Any]:
        """Returns the first batch size and the recorded changes of the factor."""
        return {"base": self.base, "trail": [list(point) for point in self._trail]}

    def load_state_dict(self, state: dict[str, Any], fit: Fit | None) -> None:
        """Restores the state from a checkpoint.

        Args:
            state: The saved state; version 0.1 saved the base values of the fields in it.
            fit: The fit that receives those base values; None outside a fit.
        """
        self.base = state["base"]
        self._trail = [(float(start), float(factor)) for start, factor in state["trail"]]
        fields = {"beta2_scaling": _BETA2, "weight_decay_scaling": _DECAY}
        if fit is not None:
            for name, bases in state.get("bases", {}).items():
                fit.groups.load_state_dict({fields[name]: bases})
