"""The learning-rate range test: an exponential sweep, after which all state is restored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_deprecation, rank_zero_info, rank_zero_warn
from torch import nn

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_between, check_choice, check_count, shown
from lightning_bigopt.fabric_hooks import TrainerOnly
from lightning_bigopt.optimizers.private import check_not_private
from lightning_bigopt.removed import RemovedAttribute
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import loop, trial_runs
from lightning_bigopt.tuning.base_rates import BaseRates
from lightning_bigopt.tuning.curve import RangeTest, exponential_rates
from lightning_bigopt.tuning.sweep import run_sweep
from lightning_bigopt.tuning.trial_callbacks import callbacks_affecting_gradients
from lightning_bigopt.type_checks import check_instance

__all__ = ["LearningRateRangeTest", "learning_rate_range_test"]

OnResult: TypeAlias = Literal["use", "report"]


@explain_arguments
class LearningRateRangeTest(TrainerOnly, Callback):
    """Sweeps the learning rate before training starts, and trains with the suggested rate.

    The sweep trains on the Trainer's loader with its precision and accumulation, with
    GradientClipping, and with the first batch size of a BatchSizeScheduler. It runs no other
    callbacks and logs nothing. Afterwards parameters, optimizers, GradScaler, loaders, random
    states and the Trainer's counters are restored bit for bit. A resumed run is not tested again.

    Learning rates are those of the first parameter group; other groups keep their ratios to it. The
    suggestion becomes the base of LearningRateScheduler, of the module's own scheduler, or of the
    optimizer. The attributes ``lr`` and ``learning_rate`` of the module are replaced if they equal
    the old base.

    Args:
        start: First learning rate.
        end: Last learning rate.
        steps: Number of updates in the sweep.
        smoothing: Decay of the moving average of the losses, in [0, 1).
        skip: Number of first points that the suggestion ignores.
        stop_at: The sweep ends when the smoothed loss exceeds this multiple of its minimum.
        on_result: ``"use"`` trains with the suggestion; ``"report"`` only logs it.
        then: The name of ``on_result`` in version 0.1; deprecated.

    Attributes:
        result: The :class:`RangeTest`; None before the test.

    Raises:
        ValueError: If an argument is out of range, or at fit start if the training step returns no
            loss.

    State:
        Learning rates and losses of the sweep, and whether it diverged.

    Example:
        >>> LearningRateRangeTest(start=1e-6, end=1.0, steps=80).result is None
        True

    References:
        Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, Sec. 3.3.
    """

    say = RemovedAttribute("0.2", "read .result")

    def __init__(
        self,
        *,
        start: float = 1e-7,
        end: float = 1.0,
        steps: int = 100,
        smoothing: float = 0.98,
        skip: int = 10,
        stop_at: float = 4.0,
        on_result: OnResult = "use",
        then: OnResult | None = None,
    ) -> None:
        # Within these bounds the ratio of two learning rates is a float.
        check_between("start", start, 1e-100, 1e100, ends="[)", hint="write 1e-7")
        hint = f"write a learning rate above start={shown(start)}"
        check_between("end", end, start, 1e100, ends="(]", hint=hint)
        check_count("skip", skip, minimum=0, of="points")
        check_count("steps", steps, minimum=skip + 3, of="updates", hint="it must exceed skip")
        check_between("steps", steps, skip, 1_000_000, ends="(]", hint="100 are enough")
        check_between("smoothing", smoothing, 0, 1, ends="[)")
        check_between("stop_at", stop_at, 1, math.inf, ends="(]", hint="inf never stops")
        if then is not None:
            check_choice("then", then, OnResult)
            rank_zero_deprecation(
                "LearningRateRangeTest(then=) is renamed to on_result= in lightning_bigopt 0.2; "
                f"write LearningRateRangeTest(on_result={then!r})"
            )
            on_result = then
        check_choice("on_result", on_result, OnResult)
        self.rates = exponential_rates(start, end, steps)
        self.smoothing, self.skip, self.stop_at = smoothing, skip, stop_at
        self.on_result = on_result
        self.result: RangeTest | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the sweep, restores all state, and applies the suggestion."""
        if trainer.ckpt_path is not None or loop.is_fast_dev_run(trainer):
            return
        groups = BaseRates(trainer)
        copies = callbacks_affecting_gradients(trainer_callbacks.callbacks_of(trainer))
        self.result = self.sweep(trainer, pl_module, groups, copies)
        self.report()
        if self.on_result == "use" and self.result.suggestion is not None:
            groups.use(self.result.suggestion, trainer, pl_module)

    def sweep(
        self,
        trainer: Trainer,
        module: LightningModule,
        groups: BaseRates,
        callbacks: Sequence[Callback],
    ) -> RangeTest:
        """Runs the sweep in a separate loop, and restores all state.

        Args:
            trainer: The Trainer, from ``on_fit_start`` on.
            module: The module to train.
            groups: Writes the learning rates.
            callbacks: The callbacks that take part in the sweep.

        Returns:
            The result of the sweep.

        Raises:
            ValueError: If an optimizer is from Opacus.
        """
        check_not_private(
            trainer.optimizers,
            "LearningRateRangeTest",
            "whose privacy budget the test would spend; set the learning rate by hand",
        )
        return run_sweep(
            trainer,
            module,
            groups,
            callbacks,
            rates=self.rates,
            smoothing=self.smoothing,
            skip=self.skip,
            stop_at=self.stop_at,
        ).result()

    def report(self) -> None:
        """Logs the suggestion and the two further ones, or a warning if there is none."""
        assert self.result is not None
        if self.result.suggestion is None or self.result.bracket is None:
            rank_zero_warn(
                "The learning-rate range test found no learning rate at which the loss falls, and "
                "does not change the learning rate. Inspect .result.plot(), and raise steps."
            )
            return
        low, high = self.result.bracket
        rank_zero_info(
            f"Learning-rate range test: {self.result.suggestion:.3g}, where the loss falls fastest."
            " Two other rules (the middle of the longest descent, and a tenth of the learning rate"
            f" at the minimum) suggest {low:.3g} and {high:.3g}."
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns learning rates and losses of the sweep, and whether it diverged."""
        result = self.result
        return {
            "version": 1,
            "learning_rates": [] if result is None else list(result.learning_rates),
            "losses": [] if result is None else list(result.losses),
            "diverged": result is not None and result.diverged,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :attr:`result` from a checkpoint."""
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
    """Runs the learning-rate range test without training afterwards.

    The state of Trainer and module is restored.

    Args:
        trainer: The Trainer; the test uses its precision, strategy, accumulation and clipping.
        module: The module; it is trained, then restored.
        train_dataloaders: As for ``Trainer.fit``.
        datamodule: As for ``Trainer.fit``.
        options: Arguments of :class:`LearningRateRangeTest`, but with ``on_result="report"`` by
            default; ``"use"`` sets ``lr`` or ``learning_rate`` of the module.

    Returns:
        The result of the sweep.

    Example:
        >>> from lightning_bigopt.examples.gpt import BytesGPT
        >>> trainer = Trainer(accelerator="cpu", max_steps=1000)  # doctest: +SKIP
        >>> found = learning_rate_range_test(trainer, BytesGPT(), loader)  # doctest: +SKIP
        >>> found.suggestion, found.bracket  # doctest: +SKIP
        (0.0047, (0.0011, 0.0083))
    """
    callback = _RangeTestOnly(**{"on_result": "report", **options})
    hint = "write learning_rate_range_test(trainer, module)"
    if not hasattr(trainer, "fit_loop"):
        raise ValueError(f"trainer must be a Trainer, got {shown(trainer)}; {hint}")
    check_instance("module", module, nn.Module, hint=hint)  # perhaps a compiled one
    callback.trainer_callbacks = trainer_callbacks.callbacks_of(trainer)
    trial_runs.fit_quietly(
        trainer, module, train_dataloaders, datamodule=datamodule, callbacks=[callback]
    )
    assert callback.result is not None
    return callback.result


class _RangeTestOnly(LearningRateRangeTest):
    """Runs the test and ends the fit.

    ``fit_quietly`` replaces the Trainer's callbacks: they are passed in :attr:`trainer_callbacks`.
    """

    trainer_callbacks: list[Callback]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the sweep, and ends the fit by :func:`trial_runs.exit_fit`."""
        groups = BaseRates(trainer)
        of_module = [c for c in trainer_callbacks.callbacks_of(trainer) if c is not self]
        copies = callbacks_affecting_gradients([*self.trainer_callbacks, *of_module])
        self.result = self.sweep(trainer, pl_module, groups, copies)
        self.report()
        if self.on_result == "use" and self.result.suggestion is not None:
            groups.use_in_next_fit(self.result.suggestion, trainer, pl_module)
        raise trial_runs.exit_fit(trainer)
