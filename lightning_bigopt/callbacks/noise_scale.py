"""GradientNoiseScale: measures the gradient noise scale from gradients that training computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import as_code
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Batch, Fit
from lightning_bigopt.engine.update import Update
from lightning_bigopt.gradients.local_gradient_norm import LocalGradientNorm
from lightning_bigopt.gradients.measure import measure
from lightning_bigopt.gradients.noise_scale import (
    NoiseScaleEstimator,
    NoiseScaleReport,
    noise_scale_terms,
)
from lightning_bigopt.gradients.norm_kernels import accumulation_dtype
from lightning_bigopt.trainer_access import ddp_hooks, loop, precision, strategies

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["GradientNoiseScale"]

_ONE_SIZE = (
    "an update of one micro-batch, on one process or with a sharded model, gives the gradient at "
    "one batch size only; accumulate at least two micro-batches, or train with DDP"
)


class _Part(NamedTuple):
    """The gradient of a part of an update, on this process.

    Attributes:
        square: Squared norm, of shape ``()``.
        samples: Samples in the part.
        weight: Factor on the loss of the part.
    """

    square: Tensor
    samples: float
    weight: float


@explain_arguments
class GradientNoiseScale(Capability):
    """Measures the gradient noise scale, an estimate of the critical batch size.

    It compares squared gradient norms at two batch sizes. If an update accumulates, these are the
    norms of its first micro-batch and of the update (one process, DDP, FSDP2; it costs one more
    norm per update). If DDP reduces a single micro-batch, these are the norms on each process
    before and after the reduction (a communication hook; it costs one norm per bucket). Noise and
    signal are averaged separately and then divided. Costs one small transfer to the host per
    update.

    The noise scale predicts the critical batch size within a factor of 2 to 6.

    Args:
        decay: Decay of the weights of the running means per update, in [0, 1).
        minimum_updates: Number of measured updates before anything is reported; at least 2.

    Raises:
        ValueError: At fit start with manual optimization, DeepSpeed, or another DDP communication
            hook.

    Logs:
        ``noise_scale/simple``, ``noise_scale/standard_error``, ``noise_scale/noise`` and
        ``noise_scale/signal``. If the error is too large, none of them, and the reason once.

    State:
        ``estimator``: weighted sums, as plain numbers.

    Example:
        >>> from lightning_bigopt import GradientNoiseScale
        >>> GradientNoiseScale().report.reason
        'too few updates measured (0 of 16)'

    References:
        McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, App. A.1.
    """

    owns = "noise scale"
    rank = 60
    needs_samples = "required"
    logs_without_monitor = True

    def __init__(self, *, decay: float = 0.99, minimum_updates: int = 16) -> None:
        self.estimator = NoiseScaleEstimator(decay=decay, minimum_updates=minimum_updates)
        self._report = self.estimator.report()
        self._local: LocalGradientNorm | None = None
        self._batch: Batch | None = None
        self._part: _Part | None = None
        self._whole: Tensor | None = None
        self._has_logged = False

    @property
    def report(self) -> NoiseScaleReport:
        """The current estimate."""
        return self._report

    @property
    def noise_scale(self) -> float | None:
        """The noise scale in samples; None if its error is too large."""
        return self._report.noise_scale

    # ------------------------------------------------------------------------------- stages

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adds the engine, and shares DDP's communication hook with a hook of the user."""
        super().setup(trainer, pl_module, stage)
        ddp_hooks.share_user_hook(trainer, stage)

    def check_fit(self, fit: Fit) -> None:
        """Raises for manual optimization and DeepSpeed; uses the communication hook of DDP."""
        if not fit.module.automatic_optimization:
            raise ValueError(
                "automatic_optimization must be True with GradientNoiseScale, got False; call "
                "NoiseScaleEstimator.update in your training_step"
            )
        if strategies.is_deepspeed(fit.trainer):
            raise ValueError(
                "strategy must not be DeepSpeed with GradientNoiseScale, got "
                f"{type(fit.trainer.strategy).__name__}, which does not expose gradients; remove "
                "GradientNoiseScale"
            )
        hook = ddp_hooks.communication_hook(fit.trainer, "GradientNoiseScale")
        if hook is not None:
            self._local = LocalGradientNorm()
            hook.measure(self._local)

    def start(self, fit: Fit) -> None:
        """Starts without an open window."""
        self._clear_window()
        self._has_logged = False

    def begin_epoch(self, fit: Fit) -> None:
        """Clears the window: windows end with the epoch."""
        self._clear_window()

    def _clear_window(self) -> None:
        self._batch = self._part = self._whole = None

    def begin_batch(self, batch: Batch) -> None:
        """Measures the gradient of the first micro-batch when the second one begins."""
        first = self._batch
        if batch.opens_window:
            self._clear_window()
        elif first is not None and first.opens_window:
            # The gradients hold the first micro-batch only. Lightning has divided its loss by the
            # length of the window, and the GradScaler has multiplied it by the loss scale.
            fit = batch.fit
            parameters = [
                pair for _, one in fit.groups for pair in fit.optimizer_info(one).parameters
            ]
            norm = measure(parameters, process_group=fit.shard_group).total.double()
            length = int(fit.trainer.accumulate_grad_batches)
            square = (norm * length / precision.loss_scale(fit.trainer)) ** 2
            self._part = _Part(square, float(first.counted_samples), float(first.loss_factor))
        # When a window accumulates, DDP reduces the sum over its micro-batches: the hook does not
        # see the gradient of a single one.
        if self._local is not None and not batch.opens_window:
            self._local.clear()
        self._batch = batch

    def needs_norms(self, update: Update) -> bool:
        """Returns whether there is a part to compare the update with."""
        if self._part is not None:
            return True
        return self._local is not None and self._batch is not None and self._batch.opens_window

    def rescale(self, update: Update) -> None:
        """Stores the norm of the update, before clipping."""
        if update.is_approximate:
            self._log_once(
                "The gradient noise scale is not measured while TopK or PowerSGD compresses the "
                "gradients, because their norm is not that of the mean gradient."
            )
            return
        if not self.needs_norms(update):
            self._log_unless_measured_later()
            return
        self._whole = update.norms.total
        if update.norms.norm_type != 2:
            self._whole = measure(update.parameters, process_group=update.shard_group).total

    def observe(self, update: Update) -> None:
        """Compares the update with its part; a collective."""
        whole, part, batch = self._whole, self._part, self._batch
        if whole is None or batch is None or update.rejection is not None:
            return
        trainer = batch.fit.trainer
        if part is None:
            assert self._local is not None  # needs_norms
            square = self._local.take() / precision.loss_scale(trainer) ** 2
            part = _Part(square, float(batch.counted_samples), float(batch.loss_factor))
        self._part = self._whole = None
        self._update(batch.fit, part, whole)

    def _update(self, fit: Fit, part: _Part, whole: Tensor) -> None:
        trainer = fit.trainer
        world = strategies.data_parallel_size(trainer)
        square, samples, weight = part
        # Sharded strategies average every backward pass over the processes: the part is then the
        # mean over the first micro-batches of all processes. Otherwise each process has its own.
        pooled = strategies.shards_gradients(trainer)
        if not pooled:
            square = square / weight**2 if weight else square * 0
        inverse = 1 / samples if samples and weight else 0.0
        rest = torch.tensor([inverse, samples, weight, float(inverse > 0)], dtype=torch.float64)
        device = trainer.strategy.root_device
        dtype = accumulation_dtype(device)
        sums = torch.cat(
            [
                square.reshape(1).to(device, dtype),
                whole.reshape(1).to(device, dtype) ** 2,
                rest.to(device, dtype),
            ]
        )
        totals = strategies.sum_over_data_(trainer, sums).tolist()
        square_sum, whole_sum, inverse_sum, sample_sum, weight_sum, parts = totals
        if not parts or not weight_sum:
            return
        if pooled:
            small_square = square_sum / world / (weight_sum / world) ** 2
            small_size = sample_sum
        else:
            # E|g|² = |G|² + tr Σ / b for each part of b samples: the mean over the parts holds for
            # the harmonic mean of their sizes.
            small_square, small_size = square_sum / parts, parts / inverse_sum
        size = float(fit.clock.window.trained_samples)
        if not small_size < size:
            return
        big_square = whole_sum / world
        noise = signal = math.nan  # of a gradient that is not finite: it is counted and ignored
        if math.isfinite(small_square) and math.isfinite(big_square):
            noise, signal = noise_scale_terms(
                small_square, big_square=big_square, small=small_size, big=size
            )
        self.estimator.update(noise, signal=signal)
        self._report = self.estimator.report()
        if self._report.reason and self.estimator.updates >= self.estimator.minimum_updates:
            self._log_once(f"The gradient noise scale is not logged: {self._report.reason}.")

    def end_batch(self, batch: Batch) -> None:
        """Clears a window that has ended."""
        if batch.closes_window:
            self._clear_window()
            if self._local is not None:
                self._local.clear()

    def end(self, fit: Fit) -> None:
        """Stops measuring."""
        self._clear_window()
        if self._local is not None:
            self._local.stop()  # DDP has no way to remove a communication hook
            self._local = None
        ddp_hooks.restore_user_hook(fit.trainer)

    def metrics(self, fit: Fit) -> Mapping[str, float]:
        """Returns noise scale, standard error, noise and signal; nothing if the error is large."""
        report = self._report
        if report.noise_scale is None:
            return {}
        values = {
            "simple": report.noise_scale,
            "standard_error": report.standard_error,
            "noise": report.noise,
            "signal": report.signal,
        }
        return {f"noise_scale/{name}": v for name, v in values.items() if v is not None}

    def _log_unless_measured_later(self) -> None:
        """Says that no update can be measured, unless one was or an update of the plan can be."""
        assert self.fit is not None  # set by the engine
        horizon = self.fit.clock.horizon
        accumulates_later = horizon is not None and any(span.batches > 1 for span in horizon.spans)
        is_short = loop.is_fast_dev_run(self.fit.trainer)
        if not (self.estimator.updates or accumulates_later or is_short):
            self._log_once(f"The gradient noise scale cannot be measured here: {_ONE_SIZE}.")

    def _log_once(self, text: str) -> None:
        """Logs a message once per fit."""
        if not self._has_logged:
            self._has_logged = True
            rank_zero_info(text)

    # ------------------------------------------------------------------------------- state

    def reset(self) -> None:
        """Clears the estimator."""
        self.estimator.reset()
        self._report = self.estimator.report()

    def settings_as_code(self) -> dict[str, str]:
        """Returns all arguments."""
        names = ("decay", "minimum_updates")
        return {name: as_code(getattr(self.estimator, name)) for name in names}

    def saved_state(self) -> dict[str, Any]:
        """Returns the sums of the estimator."""
        return {"estimator": self.estimator.state_dict()}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the sums of the estimator."""
        self.estimator.load_state_dict(state["estimator"])
        self._report = self.estimator.report()

    def __repr__(self) -> str:
        return f"GradientNoiseScale(decay={self.estimator.decay!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_local": None, "_batch": None}
