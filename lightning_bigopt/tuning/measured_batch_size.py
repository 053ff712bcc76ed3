"""MeasuredBatchSize: doubles the global batch size when the measured critical batch allows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.batching.exact_loader import GlobalBatchLoader
from lightning_bigopt.batching.policies.batch_size_policy import BatchContext, BatchSizePolicy
from lightning_bigopt.batching.randomness import mixed_seed
from lightning_bigopt.batching.scaling_rules import ScalingRule
from lightning_bigopt.callbacks.batch_size.batch_size_scheduler import BatchSizeScheduler
from lightning_bigopt.checks import check_count, check_positive, shown
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine.batch_contents import BatchCount, BatchWeight
from lightning_bigopt.engine.stage import Batch, Fit
from lightning_bigopt.tuning.batch_branches import scaling_rule_of
from lightning_bigopt.tuning.batch_measurement import BatchMeasurement, learns
from lightning_bigopt.tuning.critical_batch import CriticalBatchSize, MeasurementError
from lightning_bigopt.tuning.trial_callbacks import branch_callbacks, samples_of_batches

__all__ = ["MeasuredBatchSize"]

_ROUNDING = 1e-9


@dataclass(frozen=True)
class _CurrentSize(BatchSizePolicy):
    """Keeps the current global batch size, which MeasuredBatchSize changes.

    Args:
        low: Global batch size of the first update, in samples.
        high: Largest global batch size, in samples.
    """

    adaptive: ClassVar[bool] = True
    needs_noise_scale: ClassVar[bool] = False

    low: int
    high: int

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Returns the current size, or the first one before the first update."""
        current = None if context is None else context.global_batch_size
        return self.low if current is None else current

    @property
    def explicit_sizes(self) -> dict[str, int]:
        """``low`` and ``high``."""
        return {"low": self.low, "high": self.high}


@explain_arguments
class MeasuredBatchSize(BatchSizeScheduler):
    """Doubles the global batch size when the measured critical batch allows it.

    At every ``check_every`` of the budget two branches are trained from the current state on the
    same samples: one with the current global batch size, and one with twice that size and the
    scaled learning rate. In both the learning rate decays to 0. If the loss of the second branch is
    at most ``tolerance`` higher, including two standard errors of the paired difference, the batch
    size is doubled. All state is restored before training continues. The samples of the branches
    are not samples of the run.

    It is a :class:`BatchSizeScheduler` whose policy is measured, and takes its place. It needs
    automatic optimization and a DataLoader, and the length of the run must be known: give the
    Trainer ``max_epochs``, or ``budget="2e6 samples"`` here.

    Args:
        low: Global batch size of the first update, in samples.
        high: Largest global batch size, in samples: ``low`` times a power of 2.
        check_every: Part of the budget between two measurements, in percent or in the unit of the
            budget; the first one is after it.
        window: Length of each branch, in percent of the run, in samples, or in the unit of the
            budget. At least four updates of the doubled batch.
        tolerance: Largest difference of the losses that allows a larger batch, in units of the
            loss. The difference after such a short branch is about two to four times that at the
            end of the run.
        evaluate: Loader batches of each process on which a branch is evaluated; at most those of an
            epoch.
        lr_scaling: Factor on the learning rate for κ times the first batch: ``"sqrt"`` for Adam and
            its variants, ``"linear"`` for SGD.
        beta2_scaling: As for BatchSizeScheduler.
        weight_decay_scaling: As for BatchSizeScheduler.
        rewarmup: As for BatchSizeScheduler.
        max_kappa: As for BatchSizeScheduler.
        weight: As for BatchSizeScheduler.
        micro_batch_size: As for BatchSizeScheduler.
        max_micro_batch_size: As for BatchSizeScheduler.
        budget: As for BatchSizeScheduler.
        samples: As for BatchSizeScheduler.
        tokens: As for BatchSizeScheduler.

    Attributes:
        measurements: For each measurement the samples of the run before it, and the result. After a
            resume only the new ones.

    Raises:
        ValueError: If an argument is invalid, and as BatchSizeScheduler; at train start if the
            samples of the run are not known.

    Logs:
        ``batch/planned_size``, ``batch/lr_factor``, ``batch/branch_samples`` (samples of all
        branches so far), and ``batch/doubling_cost`` (the last difference of the losses).

    State:
        That of BatchSizeScheduler, the fraction of the budget at the last measurement, and the
        samples of the branches.

    Example:
        >>> from lightning_bigopt import MeasuredBatchSize
        >>> MeasuredBatchSize(32, high=256, check_every="10%")
        MeasuredBatchSize(low=32, high=256)

    References:
        Merrill et al., "Critical Batch Size Revisited", 2025 (arXiv 2505.23971), Sec. 3 and 5.
    """

    def __init__(
        self,
        low: int,
        *,
        high: int,
        check_every: DurationLike = "20%",
        window: DurationLike = "0.5%",
        tolerance: float = 0.02,
        evaluate: int = 16,
        lr_scaling: ScalingRule = "sqrt",
        beta2_scaling: Literal["half-life"] | None = None,
        weight_decay_scaling: Literal["sqrt"] | None = None,
        rewarmup: DurationLike | None = None,
        max_kappa: float | None = None,
        weight: BatchWeight = None,
        micro_batch_size: int | None = None,
        max_micro_batch_size: int | None = None,
        budget: str | None = None,
        samples: BatchCount = None,
        tokens: BatchCount = None,
    ) -> None:
        check_count("low", low, of="samples", hint="write an int such as 32")
        check_count("high", high, of="samples", hint="write an int such as 256")
        doublings = (high // low).bit_length() - 1
        if high <= low or low * 2**doublings != high:
            raise ValueError(
                f"high must be low times a power of 2, such as {4 * low}, got {high} for "
                f"low={low}; the batch size is doubled"
            )
        if lr_scaling is None:
            raise ValueError(
                "lr_scaling must be 'sqrt' or 'linear', got None; write 'sqrt' for Adam and its "
                "variants"
            )
        interval = Duration.parse(check_every, name="check_every")
        check_positive("check_every", interval.value, hint="write '5%'")
        super().__init__(
            _CurrentSize(low, high),
            lr_scaling=lr_scaling,
            beta2_scaling=beta2_scaling,
            weight_decay_scaling=weight_decay_scaling,
            rewarmup=rewarmup,
            max_kappa=max_kappa,
            weight=weight,
            micro_batch_size=micro_batch_size,
            max_micro_batch_size=max_micro_batch_size,
            budget=budget,
            samples=samples,
            tokens=tokens,
        )
        self.needs_horizon = True
        self.low, self.high, self.check_every = low, high, interval
        self.measurement = BatchMeasurement(
            multiples=(1, 2),
            tolerance=tolerance,
            window=window,
            evaluate=evaluate,
            lr_scaling=lr_scaling,
        )
        self._every = 1.0
        self._clear()

    def _clear(self) -> None:
        self.measurements: list[tuple[int, CriticalBatchSize]] = []
        self._last = 0.0  # fraction of the budget at the last measurement
        self._branch_samples = 0
        self._cost: float | None = None

    def loader_ready(self, fit: Fit, loader: Any) -> None:
        """Raises for a GlobalBatchLoader, which needs the batch sizes in advance."""
        if isinstance(loader, GlobalBatchLoader):
            raise ValueError(
                "the training loader must be a DataLoader with MeasuredBatchSize, got "
                "GlobalBatchLoader, which plans the batches of an epoch in advance; pass a "
                "DataLoader, or write the sizes in BatchSizeScheduler(BatchSizeSteps({...}))"
            )
        super().loader_ready(fit, loader)

    def start(self, fit: Fit) -> None:
        """Converts the interval to a fraction of the budget, and plans the first update."""
        horizon = fit.clock.horizon
        assert horizon is not None  # needs_horizon
        self._every = horizon.fraction(self.check_every, name="check_every")
        super().start(fit)
        self._check_rule(fit)
        # Raises now, and not in the middle of the run.
        micro_batch = samples_of_batches(fit, 1)
        self.measurement.updates(fit, batch_size=self.low, micro_batch=micro_batch)

    def begin_batch(self, batch: Batch) -> None:
        """Measures if it is due, and begins the batch."""
        # Not in end_window: a checkpoint ends a window, too, on one process only.
        if batch.opens_window:
            self._measure_if_due(batch.fit)
        super().begin_batch(batch)

    def _measure_if_due(self, fit: Fit) -> None:
        progress = fit.clock.update_progress
        is_due = progress.fraction - self._last >= self._every - _ROUNDING
        assert self._planner is not None  # set in start
        size = self.size_at(progress)
        if not is_due or 2 * size > self.high or not learns(fit):
            return
        self._last = progress.fraction
        try:
            found = self.measurement.run(
                fit,
                batch_size=size,
                micro_batch=samples_of_batches(fit, 1),
                callbacks=branch_callbacks,
                seed=mixed_seed(0, progress.steps),
            )
        except MeasurementError as error:
            rank_zero_warn(f"MeasuredBatchSize keeps the batch of {size}: {error}.")
            return
        self.measurements.append((progress.samples, found))
        self._branch_samples += found.samples
        self._cost = found.differences[-1]
        if found.verdicts[-1] == "within":
            self._planner.change_size(2 * size)
            fit.rewrite_groups()
        rank_zero_info(
            f"Twice the global batch of {size} costs {found.differences[-1]:+.4f} ± "
            f"{found.standard_errors[-1]:.4f} of loss over {found.window} samples: the batch is "
            + (f"doubled to {2 * size}." if found.verdicts[-1] == "within" else "kept.")
        )

    def _check_rule(self, fit: Fit) -> None:
        """Warns if another rule is recommended for the optimizers."""
        try:
            recommended = scaling_rule_of(fit.groups.optimizers)
        except ValueError:  # none is known, or several are
            return
        if recommended != self.measurement.lr_scaling:
            rank_zero_warn(
                f"MeasuredBatchSize has lr_scaling={self.measurement.lr_scaling!r}, and "
                f"{recommended!r} is recommended for {type(fit.groups.optimizers[0][1]).__name__}."
            )

    def metrics(self, fit: Fit) -> Mapping[str, float | Tensor]:
        """Returns batch size, factor on the learning rate, and cost and samples of the branches."""
        values = dict(super().metrics(fit))
        if values and self._cost is not None:
            values["batch/branch_samples"] = float(self._branch_samples)
            values["batch/doubling_cost"] = self._cost
        return values

    def settings_as_code(self) -> dict[str, str]:
        """Returns the settings of BatchSizeScheduler and of the measurement."""
        every = {"check_every": str(self.check_every), "measurement": shown(self.measurement)}
        return super().settings_as_code() | every

    def reset(self) -> None:
        """Clears the measurements, and the state of BatchSizeScheduler."""
        super().reset()
        self._clear()

    def saved_state(self) -> dict[str, Any]:
        """Returns the state of BatchSizeScheduler, the last measurement and its cost."""
        measured = {"last": self._last, "samples": self._branch_samples, "cost": self._cost}
        return super().saved_state() | {"measured": measured}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the state from a checkpoint."""
        super().load_saved_state(state)
        measured = state.get("measured", {"last": 0.0, "samples": 0, "cost": None})
        self._last, self._cost = measured["last"], measured["cost"]
        self._branch_samples = measured["samples"]

    def __repr__(self) -> str:
        return f"MeasuredBatchSize(low={self.low}, high={self.high})"
