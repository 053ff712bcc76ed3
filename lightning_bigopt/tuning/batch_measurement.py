"""How the critical batch size is measured: branches of one state with several batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_bigopt.batching.scaling_rules import ScalingRule
from lightning_bigopt.checks import check_choice, check_count, check_positive, shown
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.optimizers.group_field import GroupField
from lightning_bigopt.trainer_access import strategies
from lightning_bigopt.tuning.batch_branches import (
    run_batch_branches,
    scaling_rule_of,
    updates_of_window,
)
from lightning_bigopt.tuning.critical_batch import CriticalBatchSize, check_multiples
from lightning_bigopt.type_checks import check_instance

__all__ = ["BatchMeasurement", "check_supported", "learns"]

_LEAST_UPDATES = 4


class BranchCallbacks(Protocol):
    """A function that returns the callbacks of a branch."""

    def __call__(self, fit: Fit, batch_size: int, *, cooldown: bool) -> list[Any]: ...


@dataclass(frozen=True, kw_only=True)
class BatchMeasurement:
    """How the critical batch size is measured; the arguments of :func:`critical_batch_size`."""

    multiples: Sequence[int] = (1, 2, 4, 8)
    tolerance: float = 0.01
    window: DurationLike = "5%"
    evaluate: int = 64
    cooldown: bool = True
    lr_scaling: ScalingRule | None = None

    def __post_init__(self) -> None:
        check_multiples(self.multiples)
        check_positive("tolerance", self.tolerance, hint="write 0.01")
        length = Duration.parse(self.window, name="window")
        if not length.value or length.unit == "seconds":
            raise ValueError(
                f"window must be positive, and no time, got {shown(self.window)}; write '5%'"
            )
        check_count("evaluate", self.evaluate, minimum=2, of="batches", hint="write 64")
        check_instance("cooldown", self.cooldown, bool, hint="write True")
        check_choice("lr_scaling", self.lr_scaling, ("sqrt", "linear", None))

    def updates(self, fit: Fit, *, batch_size: int, micro_batch: int) -> int:
        """Returns the updates of the branch with multiple 1.

        Args:
            fit: The fit, whose clock has started.
            batch_size: Global batch size of the current update, in samples.
            micro_batch: Samples in a loader batch of each process, over all processes.

        Raises:
            ValueError: If the window cannot be converted to samples.
        """
        return updates_of_window(
            fit,
            self.window,
            batch_size=batch_size,
            micro_batch=micro_batch,
            multiples=tuple(self.multiples),
            least=_LEAST_UPDATES,
        )

    def run(
        self,
        fit: Fit,
        *,
        batch_size: int,
        micro_batch: int,
        callbacks: BranchCallbacks,
        seed: int | None = None,
    ) -> CriticalBatchSize:
        """Measures at the current state of a fit, and restores all state.

        Args:
            fit: The fit, before its first update or between two accumulation windows.
            batch_size: Global batch size of the current update, in samples.
            micro_batch: Samples in a loader batch of each process, over all processes.
            callbacks: Returns the callbacks of a branch for its batch size.
            seed: Seed of the random generators in the branches; None for their current states.

        Raises:
            ValueError: If the module, the strategy or the learning rate cannot be measured.
            MeasurementError: If the branches cannot be compared.
        """
        check_supported(fit)
        multiples = tuple(self.multiples)
        updates = self.updates(fit, batch_size=batch_size, micro_batch=micro_batch)
        branches = run_batch_branches(
            fit,
            callbacks=lambda k: callbacks(fit, k * batch_size, cooldown=self.cooldown),
            multiples=multiples,
            updates=updates,
            batches=max(1, batch_size // micro_batch),
            rule=self.lr_scaling or scaling_rule_of(fit.groups.optimizers),
            evaluate=self.evaluate,
            seed=seed,
        )
        window = updates * batch_size
        return CriticalBatchSize(
            batch_size=batch_size,
            multiples=multiples,
            losses=tuple(branch.evaluation for branch in branches),
            tolerance=self.tolerance,
            window=window,
            samples=sum(
                len(branch.losses) * multiple * batch_size + len(branch.evaluation) * micro_batch
                for multiple, branch in zip(multiples, branches, strict=True)
            ),
            updates=sum(len(branch.losses) for branch in branches),
        )


def check_supported(fit: Fit) -> None:
    """Raises unless branches with other batch sizes can be trained and evaluated.

    Raises:
        ValueError: For manual optimization, DeepSpeed, and learning rates of 0.
    """
    if not fit.module.automatic_optimization:
        raise ValueError(
            "automatic_optimization must be True to measure the critical batch size, got False; "
            "let Lightning optimize"
        )
    if strategies.is_deepspeed(fit.trainer):
        raise ValueError(
            "strategy must not be DeepSpeed to measure the critical batch size, got "
            f"{type(fit.trainer.strategy).__name__}, which accumulates itself; use FSDP2"
        )
    if not learns(fit):
        raise ValueError(
            "the learning rate must be positive to measure the critical batch size, got 0 in every "
            "parameter group; pass ckpt_path= of a checkpoint after the warm-up"
        )


def learns(fit: Fit) -> bool:
    """Returns whether the next update has a learning rate above 0 in a parameter group."""
    field = GroupField("lr")
    return any(field.read(g) for _, optimizer in fit.groups for g in optimizer.param_groups)
