"""What follows the batch when it changes: learning rate, Adam's second decay, weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch.optim import Optimizer

from lightning_bigopt.batching import (
    ScalingRule,
    learning_rate_factor,
    recommended_rule,
    scaled_beta,
    weight_decay_factor,
)
from lightning_bigopt.controllers.learning_rate import LearningRateController
from lightning_bigopt.durations import Duration, DurationLike, Progress
from lightning_bigopt.optimizers import GroupField
from lightning_bigopt.schedules import Constant

if TYPE_CHECKING:
    from lightning_bigopt.pipeline import Pipeline

__all__ = ["BatchCoupling"]

_BETA2, _DECAY = GroupField("betas[1]"), GroupField("weight_decay")


class BatchCoupling:
    """Keeps the hyperparameters right for the batch in force, relative to the run's first batch.

    The factor κ is the batch in force over the first batch of the run. With a re-warm-up the
    learning rate's factor is its mean over the stretch just trained, so a jump of the batch becomes
    a straight line from the old factor to the new one.

    Attributes:
        base: The first global batch of the run, to which κ refers; None before it is known.
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
        for name, value, allowed in (
            ("lr_scaling", lr_scaling, get_args(ScalingRule)),
            ("beta2_scaling", beta2_scaling, ("half-life",)),
            ("weight_decay_scaling", weight_decay_scaling, ("sqrt",)),
        ):
            if value is not None and value not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(map(repr, allowed))} or None, got {value!r}"
                )
        learning_rate_factor(1.0, rule="sqrt", max_kappa=max_kappa)  # refuses a bad cap
        self.rewarmup: Duration | None = None
        if rewarmup is not None:
            self.rewarmup = Duration.parse(rewarmup, name="rewarmup")
            if not self.rewarmup.value:
                raise ValueError(f"rewarmup must be positive or None, got {rewarmup!r}")
            if lr_scaling is None:
                raise ValueError(
                    f"rewarmup must be None without lr_scaling, got {rewarmup!r}; pass "
                    "lr_scaling='sqrt' or 'linear'"
                )
        self.lr_scaling = lr_scaling
        self.beta2_scaling = beta2_scaling
        self.weight_decay_scaling = weight_decay_scaling
        self.max_kappa = max_kappa
        self.base: int | None = None
        self._trail: list[tuple[float, float]] = []
        self._writer: LearningRateController | None = None
        self._restored_writer: dict[str, Any] | None = None
        self._bases: dict[str, list[list[float]]] = {}
        self._restored: dict[str, list[list[float]]] | None = None

    @property
    def is_active(self) -> bool:
        """Whether anything follows the batch."""
        return bool(self.lr_scaling or self.beta2_scaling or self.weight_decay_scaling)

    def _fields(self) -> list[tuple[str, GroupField]]:
        wanted = (
            ("beta2_scaling", self.beta2_scaling, _BETA2),
            ("weight_decay_scaling", self.weight_decay_scaling, _DECAY),
        )
        return [(name, field) for name, rule, field in wanted if rule is not None]

    # --------------------------------------------------------------------------------- hooks

    def on_fit_start(self, pipeline: Pipeline) -> None:
        """Reads the configured values, and finds somebody to write the learning rate."""
        optimizers: Sequence[Optimizer] = pipeline.trainer.optimizers
        self._bases, self._writer = {}, None
        for name, field in self._fields():
            if any(c.role == f"schedule of {field.name}" for c in pipeline.controllers):
                raise ValueError(
                    f"{name} must be None beside HyperparameterScheduler({field.name!r}), got "
                    f"{getattr(self, name)!r}: each writes the field; keep one of them"
                )
            try:
                self._bases[name] = [
                    [field.read(group) for group in optimizer.param_groups]
                    for optimizer in optimizers
                ]
            except ValueError as error:
                kinds = ", ".join(_kind(optimizer) for optimizer in optimizers)
                raise ValueError(
                    f"{name} must be None for {kinds}, whose groups have no {field.name}, got "
                    f"{getattr(self, name)!r}"
                ) from error
        counts_tokens = pipeline.clock.settings.tokens is not None
        if self.rewarmup is not None and self.rewarmup.unit == "tokens" and not counts_tokens:
            raise ValueError(
                f"tokens must be given with rewarmup={str(self.rewarmup)!r}, got None; pass "
                "tokens=a function of the batch, or write rewarmup in samples"
            )
        if self.lr_scaling is None or pipeline.find(LearningRateController) is not None:
            return
        if configs := pipeline.trainer.lr_scheduler_configs:
            names = ", ".join(type(config.scheduler).__name__ for config in configs)
            raise ValueError(
                f"configure_optimizers must not return a scheduler with lr_scaling, got {names}, "
                "which writes the learning rate itself; return the optimizer only and add "
                "LearningRateScheduler(...) to the callbacks"
            )
        self._writer = LearningRateController(Constant())
        pipeline.add(self._writer)

    def on_train_start(self, size: int) -> None:
        """The first batch of the run is known; a checkpoint's wins."""
        if self.base is None:
            self.base = size
        if self._writer is not None and self._restored_writer is not None:
            self._writer.load_state_dict(self._restored_writer)
        self._restored_writer = None
        if self._restored is not None:
            self._bases, self._restored = self._restored, None

    def open_window(self, pipeline: Pipeline, size: int) -> None:
        """Writes what an update on ``size`` samples wants."""
        if not self.is_active:
            return
        self._note(self._factor(size), pipeline.progress)
        for name, field in self._fields():
            for optimizer, bases in zip(
                pipeline.trainer.optimizers, self._bases[name], strict=True
            ):
                groups = optimizer.param_groups
                bases.extend(field.read(group) for group in groups[len(bases) :])
                for group, base in zip(groups, bases, strict=True):
                    field.write(group, self._scaled(name, base, size))

    # --------------------------------------------------------------------------------- rules

    def kappa(self, size: int) -> float:
        """The batch over the run's first batch, not capped."""
        return size / (self.base or size)

    def learning_rate_factor(self, size: int, progress: Progress) -> float:
        """The factor for an update on ``size`` samples that starts at ``progress``."""
        target = self._factor(size)
        if self.rewarmup is None or not self._trail:
            return target
        now, length = progress.consumed(self.rewarmup.unit), self.rewarmup.value
        starts = [-float("inf"), *(start for start, _ in self._trail[1:])]
        stops = [*starts[1:], now]
        mean = 0.0
        for start, stop, (_, factor) in zip(starts, stops, self._trail, strict=True):
            mean += factor * max(0.0, min(stop, now) - max(start, now - length)) / length
        return mean

    def _factor(self, size: int) -> float:
        if self.lr_scaling is None:
            return 1.0
        return learning_rate_factor(
            self.kappa(size), rule=self.lr_scaling, max_kappa=self.max_kappa
        )

    def _scaled(self, name: str, base: float, size: int) -> float:
        kappa = self.kappa(size)
        if name == "beta2_scaling":
            return scaled_beta(base, kappa=kappa, max_kappa=self.max_kappa)
        return base * weight_decay_factor(kappa, max_kappa=self.max_kappa)

    def _note(self, factor: float, progress: Progress) -> None:
        """Remembers where the factor changed, as far back as the re-warm-up looks."""
        if self.rewarmup is None:
            return
        now = progress.consumed(self.rewarmup.unit)
        if not self._trail or self._trail[-1][1] != factor:
            self._trail.append((now, factor))
        while len(self._trail) > 1 and self._trail[1][0] <= now - self.rewarmup.value:
            self._trail.pop(0)

    def advice(self, optimizers: Sequence[Optimizer]) -> str:
        """What to do about the learning rate where nothing follows the batch; may be empty."""
        if self.lr_scaling is not None:
            return ""
        kind = _kind(optimizers[0])
        rule = recommended_rule(kind)
        wanted = "'sqrt' suits Adam and its kin, 'linear' SGD"
        if rule is not None:
            wanted = f"lr_scaling={rule!r} is recommended for {kind}"
        return f" The learning rate does not follow the batch (lr_scaling=None); {wanted}."

    # --------------------------------------------------------------------------------- state

    def reset(self) -> None:
        """Forgets a former run."""
        self.base, self._trail = None, []
        self._restored = self._restored_writer = None

    def state_dict(self) -> dict[str, Any]:
        """First batch, base values, and the factors that the re-warm-up looks back on."""
        return {
            "base": self.base,
            "bases": {name: [list(b) for b in bases] for name, bases in self._bases.items()},
            "trail": [list(point) for point in self._trail],
            "writer": None if self._writer is None else self._writer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave; base values from training start on."""
        self.base = state["base"]
        self._trail = [(float(start), float(factor)) for start, factor in state["trail"]]
        self._restored_writer = state["writer"]
        restored = {name: [list(b) for b in bases] for name, bases in state["bases"].items()}
        if restored.keys() == {name for name, _ in self._fields()}:
            self._restored = restored


def _kind(optimizer: Optimizer) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__
