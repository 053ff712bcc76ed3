"""Branches of one state with several batch sizes, on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning.pytorch import Callback
from torch.optim import Optimizer

from lightning_bigopt.batching.scaling_rules import (
    ScalingRule,
    learning_rate_factor,
    recommended_rule,
)
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.optimizers.names import part_optimizers
from lightning_bigopt.trainer_access import loaders
from lightning_bigopt.tuning.branches import Branch, run_branch
from lightning_bigopt.tuning.critical_batch import MeasurementError

__all__ = [
    "run_batch_branches",
    "run_samples",
    "scaling_rule_of",
    "updates_of_window",
]


def run_batch_branches(
    fit: Fit,
    *,
    callbacks: Callable[[int], Sequence[Callback]],
    multiples: Sequence[int],
    updates: int,
    batches: int,
    rule: ScalingRule,
    evaluate: int,
    seed: int | None = None,
) -> list[Branch]:
    """Trains a branch for each multiple of the batch size, and restores all state.

    All branches begin with the current learning rate times the factor of the rule, train on the
    same samples, and are evaluated on the same batches.

    Args:
        fit: The fit, before its first update or between two accumulation windows.
        callbacks: Returns the callbacks of the branch of a multiple, which set its batch size.
        multiples: Multiples of the batch size.
        updates: Updates of the branch with multiple 1; a multiple of all ``multiples``.
        batches: Loader batches of each process in an update of multiple 1.
        rule: Rule that scales the learning rate with the batch size.
        evaluate: Loader batches of each process on which a branch is evaluated.
        seed: Seed of the random generators in each branch; None for their current states.

    Returns:
        A branch for each multiple.

    Raises:
        MeasurementError: If the branches have not trained on the same batches.
    """
    branches = [
        run_branch(
            fit.trainer,
            fit.module,
            callbacks=callbacks(multiple),
            max_steps=updates // multiple,
            evaluate=evaluate,
            lr_factor=learning_rate_factor(multiple, rule=rule),
            seed=seed,
            whole_windows=batches * math.lcm(*multiples),
        )
        for multiple in multiples
    ]
    trained = {branch.batches for branch in branches if not branch.diverged}
    # A GlobalBatchLoader makes other batches of the same samples.
    if len(trained) > 1 and loaders.exact_loader(fit.trainer) is None:
        raise MeasurementError(
            "window must end before the epoch with a loader without a length, because accumulation "
            f"windows end with an epoch, got branches of {sorted(trained)} batches; write a "
            "shorter window="
        )
    return branches


def run_samples(fit: Fit, *, micro_batch: int, name: str, hint: str) -> float:
    """Returns the samples of the whole run.

    Args:
        fit: The fit, whose clock has started.
        micro_batch: Samples in a loader batch of each process, over all processes.
        name: Name of the argument that needs them, for the error.
        hint: A value that does not need them.

    Raises:
        ValueError: If they are not known in advance.
    """
    horizon = fit.clock.horizon
    assert horizon is not None  # the capability sets needs_horizon
    samples, batches = horizon.total("samples"), horizon.total("batches")
    if samples is None and batches is not None:  # a batch size of measurements, and max_epochs
        samples = micro_batch * batches
    if samples is None:
        raise ValueError(
            f"{name} must be {hint} for a budget in {horizon.clock}, whose samples are not known "
            "in advance, got a share of it; or give the run a limit in epochs or samples"
        )
    return samples


def updates_of_window(
    fit: Fit,
    window: DurationLike,
    *,
    batch_size: int,
    micro_batch: int,
    multiples: Sequence[int],
    least: int,
) -> int:
    """Returns the updates of a window, a multiple of all multiples.

    Args:
        fit: The fit, whose clock has started.
        window: Length of the window.
        batch_size: Global batch size in samples.
        micro_batch: Samples in a loader batch of each process, over all processes.
        multiples: Multiples of the batch size.
        least: Smallest number of updates with the largest multiple; a shorter window is lengthened.

    Raises:
        ValueError: If the window cannot be converted to samples, or is longer than an epoch.
    """
    length = Duration.parse(window, name="window")
    if length.unit == "samples":
        samples = length.value
    else:
        horizon = fit.clock.horizon
        assert horizon is not None  # the capability sets needs_horizon
        fraction = horizon.fraction(length, start=fit.clock.fraction, name="window")
        hint = "'10000 samples'"
        samples = fraction * run_samples(fit, micro_batch=micro_batch, name="window", hint=hint)
    exact = loaders.exact_loader(fit.trainer)
    if exact is not None:  # its windows end with the epoch
        samples = min(samples, exact.samples)
    whole = math.lcm(*multiples)
    largest = max(multiples)
    updates = whole * max(int(samples / (batch_size * whole)), -(-least * largest // whole))
    if exact is not None and updates * batch_size > exact.samples:
        raise ValueError(
            f"an epoch must have at least {updates * batch_size} samples for {least} updates of "
            f"{largest * batch_size} with a GlobalBatchLoader, got {exact.samples}; try smaller "
            "multiples, or a DataLoader"
        )
    return updates


def scaling_rule_of(optimizers: Sequence[tuple[str, Optimizer]]) -> ScalingRule:
    """Returns the rule for the learning rate that is recommended for all optimizers.

    Raises:
        ValueError: If none is known, or the optimizers need different ones.
    """
    kinds = [
        type(part).__name__
        for _, optimizer in optimizers
        for part in part_optimizers(optimizer).values() or (optimizer,)
    ]
    rules = {recommended_rule(kind) for kind in kinds}
    rule = rules.pop() if len(rules) == 1 else None
    if rule is None:
        raise ValueError(
            f"lr_scaling must be given for {' and '.join(dict.fromkeys(kinds))}, got None; write "
            "'sqrt' for Adam and its variants, 'linear' for SGD"
        )
    return rule
