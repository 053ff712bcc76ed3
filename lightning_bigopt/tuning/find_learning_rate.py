"""find_learning_rate: a learning rate for a whole run, from short branches before it."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_bigopt.checks import (
    check_between,
    check_choice,
    check_count,
    check_positive,
    shown,
)
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import loop, trial_runs
from lightning_bigopt.tuning.found_learning_rate import FoundLearningRate
from lightning_bigopt.tuning.rate_search import LEAST_BRANCH, LEAST_SWEEP, RateSearch
from lightning_bigopt.tuning.run_plan import plan
from lightning_bigopt.tuning.trial_callbacks import callbacks_affecting_gradients
from lightning_bigopt.type_checks import check_instance

__all__ = ["find_learning_rate"]

OnResult: TypeAlias = Literal["use", "report"]


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

    The method compares training losses, so it does not measure overfitting. It does not measure the
    effect of regularization on a long run, either.

    Args:
        trainer: The Trainer of the run, whose number of updates must be known.
        module: The module; it is trained, then restored. Its training step must return the loss.
        train_dataloaders: As for ``Trainer.fit``.
        datamodule: As for ``Trainer.fit``.
        budget: Updates of range test and branches together, as a share of the run (``"10%"``) or a
            number (``"500 steps"``).
        branches: Number of branches, three or more. More branches are shorter.
        start: Learning rate of the first branch, instead of the range test. The initial loss is
            then measured in 12 updates with learning rates near 0.
        horizon_exponent: Exponent of the ratio of the lengths of branch and run; 0 for none.
        on_result: ``"report"`` changes nothing; ``"use"`` sets the attribute or hyperparameter
            ``lr`` or ``learning_rate`` of the module if it equals its learning rate, and warns if
            there is none.

    Returns:
        The suggestion, with its interval and the losses of the branches.

    Raises:
        ValueError: If an argument is out of range, the number of updates is unknown, the budget is
            too small, the training step returns no finite loss, or no branch lowers the loss.

    Example:
        >>> from lightning_bigopt.examples.gpt import BytesGPT
        >>> trainer = Trainer(accelerator="cpu", max_steps=5000)  # doctest: +SKIP
        >>> found = find_learning_rate(trainer, BytesGPT(), loader)  # doctest: +SKIP
        >>> found.suggestion, found.interval, found.cost  # doctest: +SKIP
        >>> module.lr *= found.factor  # doctest: +SKIP

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
    search = RateSearch(
        run_updates=run_updates,
        budget=_updates_of_budget(length, run_updates, branches=branches),
        branches=branches,
        start=start,
        exponent=horizon_exponent,
        uses_result=on_result == "use",
        trainer_callbacks=trainer_callbacks.callbacks_of(trainer),
        copies=callbacks_affecting_gradients,
    )
    trial_runs.fit_quietly(
        trainer, module, train_dataloaders, datamodule=datamodule, callbacks=[search]
    )
    assert search.found is not None
    _report(search.found)
    return search.found


def _updates_of_run(
    trainer: Trainer, module: LightningModule, train_dataloaders: Any, datamodule: Any
) -> int:
    loop.check_has_limit(trainer, "find_learning_rate")
    planned = plan(trainer, module, train_dataloaders, datamodule=datamodule, points=2)
    updates = planned.totals.get("updates")
    if updates is None:
        raise ValueError(
            "trainer must have a known number of updates for find_learning_rate, got one whose "
            "budget is in another unit or whose batch size adapts; pass a Trainer with max_steps, "
            "and BatchSizeScheduler(ConstantBatchSize(...)) in place of a batch size that adapts"
        )
    return int(updates)


def _updates_of_budget(length: Duration, run: int, *, branches: int) -> int:
    """Returns the updates of the budget; raises if they are too few."""
    if length.unit not in {"fraction", "steps"}:
        raise ValueError(
            f"budget must be a share or a number of updates, got {str(length)!r}; write '10%' or "
            "'500 steps'"
        )
    updates = int(length.value * run if length.unit == "fraction" else length.value)
    least = branches * LEAST_BRANCH + LEAST_SWEEP
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
            f"the best; the best one may be {found.edge}er. Pass start={tried:.1g}, or raise "
            "branches and budget."
        )
