"""Branches of one state with several batch sizes, on the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_bigopt.batching.policies.fixed_batch import ConstantBatchSize
from lightning_bigopt.batching.scaling_rules import (
    ScalingRule,
    learning_rate_factor,
    recommended_rule,
)
from lightning_bigopt.callbacks.batch_size.batch_size_scheduler import BatchSizeScheduler
from lightning_bigopt.callbacks.gradient_clipping import GradientClipping
from lightning_bigopt.callbacks.learning_rate import LearningRateScheduler
from lightning_bigopt.checks import shown
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.optimizers.names import part_optimizers
from lightning_bigopt.schedules.decays import Linear
from lightning_bigopt.trainer_access import loaders, strategies
from lightning_bigopt.tuning.branches import Branch, run_branch
from lightning_bigopt.tuning.trial_callbacks import with_policy, with_rule

__all__ = [
    "current_batch_size",
    "run_batch_branches",
    "run_samples",
    "samples_of_batches",
    "scaling_rule_of",
    "updates_of_window",
]


def run_batch_branches(
    fit: Fit,
    *,
    batch_size: int,
    multiples: Sequence[int],
    updates: int,
    rule: ScalingRule,
    cooldown: bool,
    evaluate: int,
    seed: int | None = None,
) -> list[Branch]:
    """Trains a branch for each multiple of the batch size, and restores all state.

    All branches begin with the current learning rate times the factor of the rule, take part in the
    gradient clipping of the run, train on the same samples, and are evaluated on the same batches.

    Args:
        fit: The fit, before its first update or between two accumulation windows.
        batch_size: Global batch size of the branch with multiple 1, in samples.
        multiples: Multiples of the batch size.
        updates: Updates of the branch with multiple 1; a multiple of all ``multiples``.
        rule: Rule that scales the learning rate with the batch size.
        cooldown: Whether the learning rate decays linearly to 0 in each branch.
        evaluate: Loader batches of each process on which a branch is evaluated.
        seed: Seed of the random generators in each branch; None for their current states.

    Returns:
        A branch for each multiple.
    """
    clipping = [c for c in fit.capabilities if isinstance(c, GradientClipping)]
    scheduler = next((c for c in fit.capabilities if isinstance(c, BatchSizeScheduler)), None)
    branches = []
    for multiple in multiples:
        policy = ConstantBatchSize(multiple * batch_size)
        callbacks: list[Any] = [
            BatchSizeScheduler(policy) if scheduler is None else with_policy(scheduler, policy),
            *(with_rule(c, keep_state=True) for c in clipping),
        ]
        if cooldown:
            callbacks.append(LearningRateScheduler(Linear(start=1.0, end=0.0)))
        branches.append(
            run_branch(
                fit.trainer,
                fit.module,
                callbacks=callbacks,
                max_steps=updates // multiple,
                evaluate=evaluate,
                lr_factor=learning_rate_factor(multiple, rule=rule),
                seed=seed,
            )
        )
    return branches


def current_batch_size(fit: Fit) -> int:
    """Returns the global batch size of the next update, in samples.

    Raises:
        ValueError: If the loader has no ``batch_size`` and there is no BatchSizeScheduler.
    """
    for capability in fit.capabilities:
        if isinstance(capability, BatchSizeScheduler):
            return capability.size_at(fit.clock.progress())
    return samples_of_batches(fit, int(fit.trainer.accumulate_grad_batches))


def samples_of_batches(fit: Fit, batches: int) -> int:
    """Returns the samples of a number of loader batches of each process, over all processes.

    Raises:
        ValueError: If the loader has no ``batch_size`` and there is no BatchSizeScheduler.
    """
    scheduler = next((c for c in fit.capabilities if isinstance(c, BatchSizeScheduler)), None)
    given = None if scheduler is None else scheduler.micro_batch_size
    exact = loaders.exact_loader(fit.trainer)
    micro = given or (
        loaders.micro_batch_size(fit.trainer) if exact is None else exact.micro_batch_size
    )
    if micro is None:
        raise ValueError(
            "the training loader must have a batch_size to measure the critical batch size, got "
            f"{shown(loaders.train_loaders(fit.trainer))}; add BatchSizeScheduler("
            "ConstantBatchSize(...), micro_batch_size=samples in a batch of one process)"
        )
    return batches * micro * strategies.data_parallel_size(fit.trainer)


def run_samples(fit: Fit, *, name: str, hint: str) -> float:
    """Returns the samples of the whole run.

    Args:
        fit: The fit, whose clock has started.
        name: Name of the argument that needs them, for the error.
        hint: A value that does not need them.

    Raises:
        ValueError: If they are not known in advance.
    """
    horizon = fit.clock.horizon
    assert horizon is not None  # the capability sets needs_horizon
    samples, batches = horizon.total("samples"), horizon.total("batches")
    if samples is None and batches is not None:  # a batch size of measurements, and max_epochs
        samples = samples_of_batches(fit, round(batches))
    if samples is None:
        raise ValueError(
            f"{name} must be {hint} for a budget in {horizon.clock}, whose samples are not known "
            "in advance, got a share of it; or give the run a limit in epochs or samples"
        )
    return samples


def updates_of_window(
    fit: Fit, window: DurationLike, *, batch_size: int, multiples: Sequence[int], least: int
) -> int:
    """Returns the updates of a window, a multiple of all multiples.

    Args:
        fit: The fit, whose clock has started.
        window: Length of the window.
        batch_size: Global batch size in samples.
        multiples: Multiples of the batch size.
        least: Smallest number of updates with the largest multiple; a shorter window is lengthened.

    Raises:
        ValueError: If the window cannot be converted to samples.
    """
    length = Duration.parse(window, name="window")
    if length.unit == "samples":
        samples = length.value
    else:
        horizon = fit.clock.horizon
        assert horizon is not None  # the capability sets needs_horizon
        fraction = horizon.fraction(length, start=fit.clock.fraction, name="window")
        samples = fraction * run_samples(fit, name="window", hint="'10000 samples'")
    whole = math.lcm(*multiples)
    largest = max(multiples)
    return whole * max(round(samples / (batch_size * whole)), -(-least * largest // whole))


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
