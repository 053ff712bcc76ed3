"""The learning-rate range test: one exponential sweep, after which nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_bigopt import trainer_access, trial_runs
from lightning_bigopt.pipeline import Pipeline
from lightning_bigopt.tuning.curve import RangeTest, exponential_rates
from lightning_bigopt.tuning.rates import BaseRates
from lightning_bigopt.tuning.snapshot import Snapshot
from lightning_bigopt.tuning.sweep import Sweep, companions_of

__all__ = ["LearningRateRangeTest", "learning_rate_range_test"]

Then = Literal["use", "report"]


class LearningRateRangeTest(Callback):
    """Sweeps the learning rate before the training starts, and trains with the rate it found.

    The sweep is ordinary training on the user's loader, with the same precision, accumulation,
    GradientClipping and (its first) batch of a BatchSizeScheduler; no other callback takes part
    and nothing is logged. Parameters, optimizer, gradient scaler, loaders, random states and the
    Trainer's counters are then put back to the bit. A resumed run is not tested again.

    Parameter groups keep their ratios: the rates are the first group's. The rate found becomes the
    base of LearningRateScheduler, of a scheduler of the module's own, or the plain optimizer's
    rate; where the module's ``lr`` or ``learning_rate`` was the old one, it becomes the new.

    Args:
        start: The first rate.
        end: The last rate.
        steps: Updates in the sweep.
        smoothing: Decay of the moving average of the losses, from 0 to below 1.
        skip: First points that no suggestion is made from.
        stop_at: The sweep ends when the smoothed loss is this multiple of its lowest.
        then: ``"use"`` the suggestion, or only ``"report"`` it.

    Attributes:
        result: The :class:`RangeTest`; None before the test.

    Raises:
        ValueError: For an argument out of range; at fit start where the training step returns no
            loss.

    State:
        The sweep's rates and losses.

    Example:
        >>> LearningRateRangeTest(start=1e-6, end=1.0, steps=80).result is None
        True

    References:
        Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, Sec. 3.3.
    """

    def __init__(
        self,
        *,
        start: float = 1e-7,
        end: float = 1.0,
        steps: int = 100,
        smoothing: float = 0.98,
        skip: int = 10,
        stop_at: float = 4.0,
        then: Then = "use",
    ) -> None:
        if not 0.0 < start < end < math.inf:
            raise ValueError(f"start and end must be 0 < start < end, got {start!r} and {end!r}")
        if type(steps) is not int or steps < skip + 3:
            raise ValueError(f"steps must be at least skip + 3 = {skip + 3}, got {steps!r}")
        if type(skip) is not int or skip < 0:
            raise ValueError(f"skip must be a non-negative number of points, got {skip!r}")
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing must be from 0 to below 1, got {smoothing!r}")
        if not stop_at > 1.0:
            raise ValueError(f"stop_at must be above 1, got {stop_at!r}; inf never stops")
        if then not in get_args(Then):
            raise ValueError(f"then must be 'use' or 'report', got {then!r}")
        self.rates = exponential_rates(start, end, steps)
        self.smoothing, self.skip, self.stop_at, self.then = smoothing, skip, stop_at, then
        self.result: RangeTest | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sweeps, restores, and applies what was found."""
        if trainer.ckpt_path is not None or trainer_access.is_fast_dev_run(trainer):
            return
        groups = BaseRates(trainer)
        companions = companions_of(trainer_access.callbacks_of(trainer))
        self.result = self.sweep(trainer, pl_module, groups, companions)
        self.say()
        if self.then == "use" and self.result.suggestion is not None:
            groups.use(self.result.suggestion, trainer, pl_module)

    def sweep(
        self,
        trainer: Trainer,
        module: LightningModule,
        groups: BaseRates,
        companions: list[Any],
    ) -> RangeTest:
        """Runs the sweep beside the Trainer's own loop; nothing else is changed."""
        sweep = Sweep(
            self.rates, groups, smoothing=self.smoothing, stop_at=self.stop_at, skip=self.skip
        )
        with _restored(trainer, module), Pipeline.beside(trainer):
            try:
                for callback in companions:
                    callback.setup(trainer, module, "fit")
                for callback in companions:
                    callback.on_fit_start(trainer, module)
                trial_runs.run_beside(
                    trainer, callbacks=[*companions, sweep], max_steps=len(self.rates)
                )
            finally:
                for callback in companions:
                    callback.teardown(trainer, module, "fit")
        count = len(sweep.losses)
        return RangeTest(
            learning_rates=self.rates[:count],
            losses=tuple(sweep.losses),
            smoothing=self.smoothing,
            skip=self.skip,
            diverged=sweep.diverged,
        )

    def say(self) -> None:
        """Tells the outcome."""
        assert self.result is not None
        if self.result.suggestion is None or self.result.bracket is None:
            rank_zero_warn(
                "The learning-rate range test found no rate at which the loss falls; the learning "
                "rate is left alone. Look at .result.plot(), and give it more steps."
            )
            return
        low, high = self.result.bracket
        rank_zero_info(
            f"Learning-rate range test: {self.result.suggestion:.3g}, "
            f"bracket [{low:.3g}, {high:.3g}]."
        )

    def state_dict(self) -> dict[str, Any]:
        """The sweep, so that a resumed run still knows it."""
        found = self.result
        return {
            "version": 1,
            "learning_rates": [] if found is None else list(found.learning_rates),
            "losses": [] if found is None else list(found.losses),
            "diverged": found is not None and found.diverged,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the sweep of a checkpoint."""
        if state_dict["losses"]:
            self.result = RangeTest(
                learning_rates=tuple(state_dict["learning_rates"]),
                losses=tuple(state_dict["losses"]),
                smoothing=self.smoothing,
                skip=self.skip,
                diverged=state_dict["diverged"],
            )


def learning_rate_range_test(
    trainer: Trainer,
    module: LightningModule,
    train_dataloaders: Any = None,
    *,
    datamodule: Any = None,
    **options: Any,
) -> RangeTest:
    """Runs the range test alone; Trainer and module can then be used as if it had not been.

    Args:
        trainer: Its precision, strategy, accumulation and clipping are those of the test.
        module: The module; trained, then restored.
        train_dataloaders: As for ``trainer.fit``.
        datamodule: As for ``trainer.fit``.
        options: As for :class:`LearningRateRangeTest`; ``then="use"`` sets the module's ``lr`` or
            ``learning_rate``.

    Returns:
        The sweep, with its suggestion, bracket and picture.

    Example:
        >>> from lightning_bigopt.examples.gpt import BytesGPT
        >>> trainer = Trainer(accelerator="cpu", max_steps=1000)  # doctest: +SKIP
        >>> found = learning_rate_range_test(trainer, BytesGPT(), loader)  # doctest: +SKIP
        >>> found.suggestion, found.bracket  # doctest: +SKIP
        (0.0047, (0.0011, 0.0083))
    """
    callback = _Alone(**{"then": "report", **options})
    callback.others = trainer_access.callbacks_of(trainer)
    with isolate_rng(include_cuda=torch.cuda.is_available()):
        trial_runs.fit_quietly(
            trainer, module, train_dataloaders, datamodule=datamodule, callbacks=[callback]
        )
    assert callback.result is not None
    return callback.result


class _Alone(LearningRateRangeTest):
    """Ends the fit after the test."""

    others: list[Callback]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sweeps and leaves."""
        groups = BaseRates(trainer)
        brought = [c for c in trainer_access.callbacks_of(trainer) if c is not self]
        companions = companions_of([*self.others, *brought])
        self.result = self.sweep(trainer, pl_module, groups, companions)
        self.say()
        if self.then == "use" and self.result.suggestion is not None:
            groups.use(self.result.suggestion, trainer, pl_module)
        raise trial_runs.ExitFit


@contextmanager
def _restored(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Puts back whatever a training inside changes."""
    with isolate_rng(include_cuda=torch.cuda.is_available()):
        snapshot = Snapshot(*module.modules(), *trial_runs.what_a_fit_changes(trainer))
        try:
            yield
        finally:
            snapshot.restore()
