"""find_learning_rate: a learning rate for a whole run, from short branches before it."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_bigopt.checks import (
    check_between,
    check_choice,
    check_count,
    check_positive,
    shown,
)
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.optimizers.private import check_not_private
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import trial_runs
from lightning_bigopt.tuning.base_rates import BaseRates
from lightning_bigopt.tuning.curve import RangeTest, exponential_rates
from lightning_bigopt.tuning.found_learning_rate import FoundLearningRate
from lightning_bigopt.tuning.log_rate_fit import optimum_of, paired_errors
from lightning_bigopt.tuning.rate_branches import (
    highest_useful_rate,
    run_rate_branches,
    scores,
)
from lightning_bigopt.tuning.run_plan import plan
from lightning_bigopt.tuning.sweep import run_sweep
from lightning_bigopt.tuning.trial_callbacks import callbacks_affecting_gradients
from lightning_bigopt.type_checks import check_instance

__all__ = ["find_learning_rate"]

OnResult: TypeAlias = Literal["use", "report"]

SWEEP = 0.12
"""Share of the budget that the range test may use; it places the branches within a factor of 10."""

STOP_SWEEP_AT = 4.0
"""Multiple of the lowest loss at which the sweep ends, as in LearningRateRangeTest."""

BELOW_RISE = 9.0
"""Divides the highest learning rate at which the loss does not rise in the sweep, for the first
branch. A branch was best at 1/4 to 1/25 of it, with Adam and SGD."""

LEAST_SWEEP, LEAST_BRANCH = 12, 10
"""Updates below which a sweep of seven decades, or a branch with warm-up and cooldown, is noise."""

EXPONENT_DEVIATION = 0.15
"""Standard deviation of the exponent between tasks, for the interval of the suggestion."""


def find_learning_rate(
    trainer: Trainer,
    module: LightningModule,
    train_dataloaders: Any = None,
    *,
    datamodule: Any = None,
    budget: DurationLike = "10%",
    branches: int = 5,
    start: float | None = None,
    horizon_exponent: float = 0.32,
    on_result: OnResult = "report",
) -> FoundLearningRate:
    r"""Finds the peak learning rate of a run by short branches before it.

    1. A range test from 1e-6 to 10 finds the highest learning rate at which the loss does not rise.
    2. Branches train from the initial weights on the same batches, with learning rates a factor of
       2.5 apart. The first has a ninth of that learning rate; the others follow the lower loss. A
       branch warms up over its first 10 % and cools down over its last 20 % (1-sqrt). Its score is
       the mean loss of its last 20 % of updates, on batches that it has not trained on.
    3. The best learning rate of the branches is the mean of their logarithms, weighted by how close
       their losses are to the lowest one (:func:`weighted_center`). Longer runs need lower learning
       rates: it is multiplied by :math:`(n / T)^{0.32}` for branches of :math:`n` and a run of
       :math:`T` updates.

    Branches use the Trainer's data, precision, strategy and accumulation, with copies of its
    GradientClipping and, with its first batch size, BatchSizeScheduler. The schedule of the run and
    other callbacks take no part, and nothing is logged. Afterwards the state of Trainer and module
    is restored bit for bit.

    The losses are training losses, so that the method does not notice overfitting; regularization
    changes the best learning rate of a long run, and a branch is too short to show it.

    Args:
        trainer: The Trainer of the run, whose number of updates must be known.
        module: The module; it is trained, then restored. Its training step must return the loss.
        train_dataloaders: As for ``Trainer.fit``.
        datamodule: As for ``Trainer.fit``.
        budget: Updates of range test and branches together, as a share of the run (``"10%"``) or a
            number (``"500 steps"``).
        branches: Number of branches, three or more. More branches are shorter.
        start: Learning rate of the first branch, instead of the range test.
        horizon_exponent: Exponent of the ratio of the lengths of branch and run; 0 for none.
        on_result: ``"report"`` changes nothing; ``"use"`` sets ``lr`` or ``learning_rate`` of the
            module where it equals its learning rate.

    Returns:
        The suggestion, with its interval and the losses of the branches.

    Raises:
        ValueError: If an argument is out of range, the number of updates is unknown, the budget is
            too small, or the training step returns no loss.

    Example:
        >>> from lightning_bigopt.examples.gpt import BytesGPT
        >>> trainer = Trainer(accelerator="cpu", max_steps=5000)  # doctest: +SKIP
        >>> found = find_learning_rate(trainer, BytesGPT(), loader)  # doctest: +SKIP
        >>> found.suggestion, found.interval, found.cost  # doctest: +SKIP

    References:
        Bjorck et al., "Scaling Optimal LR Across Token Horizons", ICLR 2025,
        https://arxiv.org/abs/2409.19913.
    """
    hint = "write find_learning_rate(trainer, module)"
    if not hasattr(trainer, "fit_loop"):
        raise ValueError(f"trainer must be a Trainer, got {shown(trainer)}; {hint}")
    check_instance("module", module, nn.Module, hint=hint)  # perhaps a compiled one
    check_count("branches", branches, minimum=3, of="branches", hint="write 5")
    if start is not None:
        check_positive("start", start, hint="write 1e-3, or None for a range test")
    check_between("horizon_exponent", horizon_exponent, 0, 1, ends="[]", hint="write 0.32")
    check_choice("on_result", on_result, OnResult)
    length = Duration.parse(budget, name="budget")
    run_updates = _updates_of_run(trainer, module, train_dataloaders, datamodule)
    search = _Search(
        run_updates=run_updates,
        budget=_updates_of_budget(length, run_updates, branches=branches, sweeps=start is None),
        branches=branches,
        start=start,
        exponent=horizon_exponent,
        on_result=on_result,
        trainer_callbacks=trainer_callbacks.callbacks_of(trainer),
    )
    with isolate_rng(include_cuda=torch.cuda.is_available()):
        trial_runs.fit_quietly(
            trainer, module, train_dataloaders, datamodule=datamodule, callbacks=[search]
        )
    assert search.found is not None
    _report(search.found)
    return search.found


class _Search(Callback):
    """Searches when a fit starts, and ends the fit."""

    def __init__(
        self,
        *,
        run_updates: int,
        budget: int,
        branches: int,
        start: float | None,
        exponent: float,
        on_result: OnResult,
        trainer_callbacks: list[Callback],
    ) -> None:
        self.run_updates, self.budget, self.branches = run_updates, budget, branches
        self.start, self.exponent, self.on_result = start, exponent, on_result
        # Copied before the fit, which replaces the Trainer's callbacks.
        self.trainer_callbacks = trainer_callbacks
        self.found: FoundLearningRate | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs range test and branches, and ends the fit."""
        check_not_private(
            trainer.optimizers,
            "find_learning_rate",
            "whose privacy budget the branches would spend; set the learning rate by hand",
        )
        groups = BaseRates(trainer)
        of_module = [c for c in trainer_callbacks.callbacks_of(trainer) if c is not self]
        callbacks = [*self.trainer_callbacks, *of_module]
        self.found = self._search(trainer, pl_module, groups, callbacks)
        if self.on_result == "use":
            groups.use(self.found.suggestion, trainer, pl_module)
        raise trial_runs.exit_fit(trainer)

    def _search(
        self,
        trainer: Trainer,
        module: LightningModule,
        groups: BaseRates,
        callbacks: list[Callback],
    ) -> FoundLearningRate:
        sweep, start = None, self.start
        if start is None:
            sweep = self._sweep(trainer, module, groups, callbacks)
            start = highest_useful_rate(sweep) / BELOW_RISE
        swept = 0 if sweep is None else len(sweep.losses)
        updates = (self.budget - swept) // self.branches
        found = run_rate_branches(
            trainer,
            module,
            groups,
            callbacks=lambda: callbacks_affecting_gradients(callbacks),
            start=start,
            count=self.branches,
            updates=updates,
        )
        rates, losses = tuple(found), [scores(branch) for branch in found.values()]
        means = [fmean(each) if each else math.inf for each in losses]
        if not any(map(math.isfinite, means)):
            raise ValueError(
                f"start must be a learning rate at which the loss stays finite, got {start:.3g}, "
                "and every branch diverged; pass a smaller start="
            )
        initial = fmean(branch.losses[0] for branch in found.values())
        optimum = optimum_of(rates, losses, initial=initial)
        ratio = updates / self.run_updates
        factor = ratio**self.exponent
        deviation = math.hypot(optimum.deviation, EXPONENT_DEVIATION * math.log(ratio))
        suggestion, spread = optimum.learning_rate * factor, math.exp(1.645 * deviation)
        return FoundLearningRate(
            suggestion=suggestion,
            interval=(suggestion / spread, suggestion * spread),
            branch_optimum=optimum.learning_rate,
            horizon_factor=factor,
            learning_rates=rates,
            losses=tuple(means),
            standard_errors=paired_errors(losses, means.index(min(means))),
            edge=optimum.edge,
            sweep=sweep,
            branch_updates=updates,
            updates=swept + sum(len(branch.losses) for branch in found.values()),
            run_updates=self.run_updates,
        )

    def _sweep(
        self,
        trainer: Trainer,
        module: LightningModule,
        groups: BaseRates,
        callbacks: list[Callback],
    ) -> RangeTest:
        return run_sweep(
            trainer,
            module,
            groups,
            callbacks_affecting_gradients(callbacks),
            rates=exponential_rates(1e-6, 10.0, _updates_of_sweep(self.budget)),
            smoothing=0.0,
            skip=0,
            stop_at=STOP_SWEEP_AT,
        )


def _updates_of_run(
    trainer: Trainer, module: LightningModule, train_dataloaders: Any, datamodule: Any
) -> int:
    planned = plan(trainer, module, train_dataloaders, datamodule=datamodule, points=2)
    updates = planned.totals.get("updates")
    if updates is None:
        raise ValueError(
            "trainer must have a known number of updates for find_learning_rate, got one whose "
            "budget is in another unit or whose batch size adapts; pass a Trainer with max_steps"
        )
    return int(updates)


def _updates_of_sweep(budget: int) -> int:
    return max(LEAST_SWEEP, int(SWEEP * budget))


def _updates_of_budget(length: Duration, run: int, *, branches: int, sweeps: bool) -> int:
    """Returns the updates of the budget; raises if they are too few."""
    if length.unit not in {"fraction", "steps"}:
        raise ValueError(
            f"budget must be a share or a number of updates, got {str(length)!r}; write '10%' or "
            "'500 steps'"
        )
    updates = int(length.value * run if length.unit == "fraction" else length.value)
    least = branches * LEAST_BRANCH + (LEAST_SWEEP if sweeps else 0)
    if updates < least:
        raise ValueError(
            f"budget must be at least {least} updates for {branches} branches, got "
            f"{str(length)!r} of {run}, which is {updates}; raise it, or set the learning rate by "
            "hand for so short a run"
        )
    return updates


def _report(found: FoundLearningRate) -> None:
    low, high = found.interval
    rank_zero_info(
        f"Learning rate {found.suggestion:.3g} for {found.run_updates} updates (90 % interval "
        f"{low:.2g} to {high:.2g}), found in {found.updates} updates ({found.cost:.1%})."
    )
    if found.edge is not None:
        tried = found.bracket[0] if found.edge == "low" else found.bracket[1]
        rank_zero_warn(
            f"The {found.edge}est learning rate that find_learning_rate tried, {tried:.3g}, was "
            f"the best; the optimum may be past it. Pass start={tried:.1g}, or raise branches and "
            "budget."
        )
