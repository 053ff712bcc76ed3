"""``critical_batch_size()``: measures the critical batch size at the start of a run or later."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_bigopt.batching.scaling_rules import ScalingRule
from lightning_bigopt.checks import shown
from lightning_bigopt.durations.duration import DurationLike
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.optimizers.object_snapshot import ObjectSnapshot
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import loop, loop_counters, trial_runs
from lightning_bigopt.tuning.batch_measurement import BatchMeasurement
from lightning_bigopt.tuning.critical_batch import CriticalBatchSize
from lightning_bigopt.tuning.trial_callbacks import (
    branch_callbacks,
    current_batch_size,
    new_copy,
    samples_of_batches,
)
from lightning_bigopt.type_checks import check_instance

__all__ = ["critical_batch_size"]


def critical_batch_size(
    trainer: Trainer,
    module: LightningModule,
    train_dataloaders: Any = None,
    *,
    datamodule: Any = None,
    ckpt_path: Any = None,
    multiples: Sequence[int] = (1, 2, 4, 8),
    tolerance: float = 0.01,
    window: DurationLike = "5%",
    evaluate: int = 64,
    cooldown: bool = True,
    lr_scaling: ScalingRule | None = None,
) -> CriticalBatchSize:
    r"""Measures the critical batch size at the start of a run, or at a checkpoint.

    From one state a branch is trained for each multiple of the current batch size, all on the same
    samples: the learning rate is multiplied by :math:`\sqrt k` or :math:`k`. The branches are
    evaluated on the same batches after them, without gradients. The critical batch size is where
    the loss is ``tolerance`` above that of multiple 1. Afterwards weights, counters of the Trainer,
    loaders and random states are as before, also with ``ckpt_path``.

    In a branch the counters of the Trainer begin at 0, and the module's hooks of a fit are called.
    A ``training_step`` that reads ``global_step`` or ``current_epoch`` is measured with other
    values. State that a dataset changes when it is read, such as a generator of its own, is not
    restored.

    By default the learning rate of each branch decays to 0. Without that, a larger batch lowers the
    noise of the weights at once, which hides that it makes less progress; Merrill et al. measure
    without a decay. GradientClipping of the Trainer takes part with its state; schedules, other
    callbacks and loggers do not.

    Args:
        trainer: The Trainer with its callbacks.
        module: The module.
        train_dataloaders: As for ``Trainer.fit``.
        datamodule: As for ``Trainer.fit``.
        ckpt_path: Checkpoint of the run at which to measure; None for its start. At the start the
            learning rate must not be 0, as in a warm-up.
        multiples: Multiples of the current global batch size, ascending from 1.
        tolerance: Largest accepted increase of the loss over that of multiple 1, in units of the
            loss.
        window: Length of each branch, in percent of the run, in samples, or in another unit that is
            known in advance; rounded down to whole updates of all multiples, and at least four
            updates of the largest one. With a GlobalBatchLoader at most an epoch.
        evaluate: Loader batches of each process on which the branches are evaluated; at most those
            of an epoch.
        cooldown: Whether the learning rate of each branch decays linearly to 0.
        lr_scaling: Factor on the learning rate of multiple k: ``"sqrt"`` or ``"linear"``; None for
            the rule of the optimizer.

    Returns:
        The result; ``print`` shows it as a table.

    Raises:
        ValueError: If an argument is invalid, the learning rate is 0, the samples of the run are
            not known in advance, or for manual optimization and DeepSpeed.

    Example:
        >>> from lightning_bigopt.examples import BytesGPT, SourceText
        >>> trainer = Trainer(accelerator="cpu", max_steps=1000)  # doctest: +SKIP
        >>> critical_batch_size(
        ...     trainer, BytesGPT(), datamodule=SourceText(micro_batch_size=8)
        ... )  # doctest: +SKIP

    References:
        Merrill et al., "Critical Batch Size Revisited", 2025 (arXiv 2505.23971), Sec. 3.
    """
    hint = "write critical_batch_size(trainer, module)"
    if not hasattr(trainer, "fit_loop"):
        raise ValueError(f"trainer must be a Trainer, got {shown(trainer)}; {hint}")
    check_instance("module", module, nn.Module, hint=hint)
    measures = _Measures(
        BatchMeasurement(
            multiples=multiples,
            tolerance=tolerance,
            window=window,
            evaluate=evaluate,
            cooldown=cooldown,
            lr_scaling=lr_scaling,
        )
    )
    averages = trainer_callbacks.find_lightning_callback(trainer, "WeightAveraging")
    loop.check_has_limit(trainer, "critical_batch_size")
    if ckpt_path is not None and averages is not None:
        raise ValueError(
            "callbacks must not contain WeightAveraging with ckpt_path, got "
            f"{type(averages).__name__}, whose checkpoints hold the average and not the weights "
            "that are trained; write ModelAveraging(EMA('1%')) instead of it"
        )
    callbacks = trainer_callbacks.callbacks_of(trainer)
    copies = [new_copy(c) for c in callbacks if isinstance(c, Capability)]
    with (
        _before_checkpoint(trainer, module) if ckpt_path is not None else nullcontext(),
        warnings.catch_warnings(),
    ):
        # The other callbacks of the checkpoint, such as ModelCheckpoint, are not needed.
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        trial_runs.fit_quietly(
            trainer,
            module,
            train_dataloaders,
            datamodule=datamodule,
            callbacks=[*copies, measures],
            ckpt_path=ckpt_path,
        )
    if measures.result is None:  # Lightning has ended the fit before its start
        made = f"one that has made {trainer.global_step} updates"
        raise ValueError(
            "trainer must have updates left to measure the critical batch size, got "
            f"{made if ckpt_path is None else f'the checkpoint {str(ckpt_path)!r} at the end'} "
            f"with max_steps={trainer.max_steps}; use an earlier checkpoint or a new Trainer, or "
            "raise its limit"
        )
    rank_zero_info(str(measures.result))
    return measures.result


@contextmanager
def _before_checkpoint(trainer: Trainer, module: nn.Module) -> Iterator[None]:
    """Restores weights and counters, which a checkpoint replaces, when the block ends."""
    snapshot, counters = ObjectSnapshot(*module.modules()), loop_counters.counters(trainer)
    try:
        yield
    finally:
        snapshot.restore()
        loop_counters.restore_counters(trainer, counters)


class _Measures(Capability):
    """Measures at the start of a fit, and ends the fit."""

    owns = "critical batch size"
    rank: ClassVar[int] = 1000
    needs_horizon = True

    def __init__(self, measurement: BatchMeasurement) -> None:
        self.measurement = measurement
        self.result: CriticalBatchSize | None = None

    def start(self, fit: Fit) -> None:
        """Measures after all other capabilities have started, and ends the fit."""
        fit.groups.write(fit.clock.progress())
        self.result = self.measurement.run(
            fit,
            batch_size=current_batch_size(fit),
            micro_batch=samples_of_batches(fit, 1),
            callbacks=branch_callbacks,
        )
        raise trial_runs.exit_fit(fit.trainer)
