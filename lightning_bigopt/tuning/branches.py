"""Branches: short trainings from the current state of a fit, after which all state is restored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_bigopt.batching.randomness import preserve_random_state, seed_generators
from lightning_bigopt.engine.engine import Engine
from lightning_bigopt.engine.optimizer_modes import train_optimizers
from lightning_bigopt.engine.stage import BATCH_SIZE
from lightning_bigopt.optimizers.group_field import GroupField
from lightning_bigopt.optimizers.object_snapshot import ObjectSnapshot
from lightning_bigopt.trainer_access import loop, separate_loop, strategies, trial_runs

__all__ = ["Branch", "RecordLosses", "run_branch", "state_restored"]


@dataclass(frozen=True, kw_only=True)
class Branch:
    """The losses of a branch, averaged over all processes.

    Args:
        losses: Training loss of each update, before the update.
        evaluation: Losses of the batches after the last update, with the final weights; empty if
            the branch has diverged.
        diverged: Whether the branch ended early, because a loss was not finite.
        batches: Number of loader batches of each process that were trained.
        steps: Number of optimizer steps; several for each loss with several optimizers.
    """

    losses: tuple[float, ...]
    evaluation: tuple[float, ...]
    diverged: bool
    batches: int = 0
    steps: int = 0


class RecordLosses(Callback):
    """Records the loss of each update, and ends the loop if one is not finite.

    Args:
        evaluate: Number of batches that are evaluated after the last update.

    Attributes:
        losses: Loss of each update, averaged over its micro-batches and over all processes.
        evaluation: Losses of the batches after the last update, averaged over all processes.
        diverged: Whether the loop ended early.
        batches: Number of loader batches of this process that were trained.
        steps: Number of optimizer steps.
    """

    def __init__(self, *, evaluate: int = 0) -> None:
        self.evaluate = evaluate
        self.losses: list[float] = []
        self.evaluation: list[float] = []
        self.diverged = False
        self.batches = self.steps = 0
        self._window: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the mean loss when an accumulation window ends."""
        self.batches += 1
        self.steps = trainer.global_step
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if loss is not None:
            # Lightning's outputs hold the loss divided by the accumulation.
            parts = int(trainer.accumulate_grad_batches) if pl_module.automatic_optimization else 1
            self._window.append(loss.detach() * parts)
        elif not pl_module.automatic_optimization:
            raise ValueError(
                "training_step must return the loss for a trial run with manual optimization, got "
                f"{outputs!r}; return it"
            )
        if not loop.closes_window(trainer) or not self._window:
            return
        mean = torch.stack(self._window).mean()
        self._window = []
        self.losses.append(float(trainer.strategy.reduce(mean, reduce_op="mean")))
        if self.should_stop():
            self.diverged = trainer.should_stop = True
        elif self.evaluate and trainer.global_step >= trainer.max_steps:
            losses = separate_loop.next_losses(trainer, pl_module, self.evaluate)
            mean_losses: Any = trainer.strategy.reduce(losses, reduce_op="mean")
            self.evaluation = mean_losses.tolist()

    def should_stop(self) -> bool:
        """Returns whether the loop ends early, after a loss was recorded."""
        return not math.isfinite(self.losses[-1])


@contextmanager
def state_restored(trainer: Trainer, module: LightningModule) -> Iterator[ObjectSnapshot]:
    """Restores module, optimizers, Trainer and random states when the block ends.

    Args:
        trainer: The Trainer, from ``on_fit_start`` on, at the start of a fit or between two
            accumulation windows.
        module: The module.

    Yields:
        The snapshot, which may be restored within the block, too; random states are not.
    """
    with preserve_random_state(trainer.strategy.root_device):
        strategies.reshard(module)
        snapshot = ObjectSnapshot(*module.modules(), *separate_loop.objects_changed_by_fit(trainer))
        try:
            yield snapshot
        finally:
            strategies.reshard(module)  # the evaluation has no backward pass
            snapshot.restore()


def run_branch(
    trainer: Trainer,
    module: LightningModule,
    *,
    callbacks: Sequence[Callback],
    max_steps: int,
    evaluate: int = 0,
    lr_factor: float = 1.0,
    seed: int | None = None,
    whole_windows: int = 1,
) -> Branch:
    """Trains a branch from the current state, and restores all state.

    The branch trains on the beginning of an epoch of the training loader. Branches that start from
    the same state and consume equal numbers of batches train on the same data, and are evaluated on
    the same batches.

    Args:
        trainer: The Trainer, as for :func:`state_restored`.
        module: The module.
        callbacks: The callbacks that take part; an engine is added for those of this package.
        max_steps: Number of updates.
        evaluate: Number of batches to evaluate after the last update, without gradients; needs
            automatic optimization.
        lr_factor: Factor on the learning rate of every parameter group. The product becomes the
            base of a LearningRateScheduler among the callbacks.
        seed: Seed of the random generators, so that a branch after a resume, which does not restore
            them, is the same; None for their current states.
        whole_windows: As for :func:`run_separate_loop`.

    Returns:
        The losses.
    """
    recorder = RecordLosses(evaluate=evaluate)
    with state_restored(trainer, module), trial_runs.silent_information():
        if seed is not None:
            seed_generators(seed)
        train_optimizers(trainer)
        # A BatchSizeScheduler among the callbacks sets it, and needs 1 before.
        if any(getattr(callback, "owns", None) == BATCH_SIZE for callback in callbacks):
            trainer.accumulate_grad_batches = 1
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                _scale_(group, lr_factor)
        separate_loop.run_separate_loop(
            trainer,
            module,
            callbacks=[*callbacks, Engine(), recorder],
            max_steps=max_steps,
            whole_windows=whole_windows,
        )
    return Branch(
        losses=tuple(recorder.losses),
        evaluation=tuple(recorder.evaluation),
        diverged=recorder.diverged,
        batches=recorder.batches,
        steps=recorder.steps,
    )


def _scale_(group: dict[str, Any], factor: float) -> None:
    field = GroupField("lr")
    group["initial_lr"] = field.write(group, field.read(group) * factor)
