"""The position of the fit loop: batch, accumulation window, update, logger step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_bigopt.trainer_access.packages import classes, own

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Timer

__all__ = [
    "batch_is_processed",
    "batches_that_stepped",
    "begin_next_epoch",
    "check_has_limit",
    "closes_window",
    "continues_ended_epoch",
    "current_hook",
    "epoch_batches",
    "epoch_is_exhausted",
    "epochs_before_fit",
    "fetched_batches",
    "has_trained_batches",
    "is_current",
    "is_fast_dev_run",
    "is_last_batch",
    "is_unlimited",
    "max_seconds",
    "next_logger_step",
    "processed_batches",
    "processed_epochs",
    "reached_limit",
    "ready_batches",
    "restarts_within_epoch",
    "resumed_batches",
    "should_log",
    "timer_seconds",
    "uses_dataloader_iter",
]


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Returns whether the Trainer runs with ``fast_dev_run``."""
    return bool(getattr(trainer, "fast_dev_run", False))


def is_unlimited(trainer: Trainer) -> bool:
    """Returns whether the Trainer has no limit; Lightning then sets ``max_epochs=1000``."""
    timers = _timers(trainer)
    return trainer.fit_loop.max_epochs is None and trainer.max_steps == -1 and not timers


def check_has_limit(trainer: Trainer, user: str) -> None:
    """Raises if the Trainer has no limit: what the user computes from it would be arbitrary.

    Raises:
        ValueError: If Lightning would set ``max_epochs=1000``.
    """
    if is_unlimited(trainer):
        raise ValueError(
            f"trainer must have a limit for {user}, got one without max_steps, max_epochs and "
            "max_time, which Lightning ends after 1000 epochs; write Trainer(max_steps=...)"
        )


def max_seconds(trainer: Trainer) -> float | None:
    """Returns the training time after which a Timer ends the fit; None without such a Timer.

    A Timer with ``interval="epoch"`` ends it at the end of an epoch, which is no time.
    """
    timers = [timer for timer in _timers(trainer) if timer._interval == "step"]
    limits = [timer._duration for timer in timers if timer._duration is not None]
    return min(limits, default=None)


def timer_seconds(trainer: Trainer) -> float:
    """Returns the training time that a Timer has restored from a checkpoint; 0 without a Timer."""
    return max((timer.time_elapsed() for timer in _timers(trainer)), default=0.0)


def reached_limit(trainer: Trainer) -> str | None:
    """Returns the name of a limit of the Trainer that the fit has reached; None for no limit."""
    remaining = [timer.time_remaining() for timer in _timers(trainer)]
    epochs = trainer.max_epochs
    if any(seconds is not None and seconds <= 0 for seconds in remaining):
        return "max_time"
    if epochs is not None and 0 <= epochs <= processed_epochs(trainer):
        return "max_epochs"
    return "max_steps" if 0 <= trainer.max_steps <= trainer.global_step else None


def _timers(trainer: Trainer) -> list[Timer]:
    kinds = classes("callbacks.Timer")
    return [callback for callback in trainer.callbacks if isinstance(callback, kinds)]  # type: ignore[attr-defined]


def uses_dataloader_iter(trainer: Trainer) -> bool:
    """Returns whether ``training_step`` takes ``dataloader_iter`` and fetches batches itself.

    The hooks before ``training_step`` then receive the batch before, or None. Valid from
    ``on_train_start`` on.
    """
    kinds = classes("loops.fetchers._DataLoaderIterDataFetcher")
    return isinstance(trainer.fit_loop._data_fetcher, kinds)


def ready_batches(trainer: Trainer) -> int:
    """Returns the batches of this epoch that were fetched, including the current one."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def has_trained_batches(trainer: Trainer) -> bool:
    """Returns whether a batch of the run was trained, in this fit or before it."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return bool(progress.processed)


def restarts_within_epoch(trainer: Trainer) -> bool:
    """Returns whether a resume continues within an epoch; valid in ``on_train_start``."""
    return bool(trainer.fit_loop.restarted_mid_epoch)


def is_current(trainer: Trainer) -> Callable[[], bool]:
    """Returns a function that is False while a trial runs in another loop of the Trainer."""
    own_loop = trainer.fit_loop
    return lambda: trainer.fit_loop is own_loop


def begin_next_epoch(trainer: Trainer) -> None:
    """Begins an epoch after a resume from the last batch of one; call it in ``on_train_start``.

    Lightning 2.6 continues with the next epoch as if it had begun before the checkpoint: it does
    not call ``on_train_epoch_start`` and does not count the epoch. A checkpoint of that epoch then
    looks like one between two epochs, and a resume from it begins the epoch again.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.total
    if trainer.fit_loop.restarted_mid_epoch and epochs.processed == epochs.started:
        trainer.fit_loop.reset_restart_stage()
        _begin_next_iteration(trainer)


def _begin_next_iteration(trainer: Trainer) -> None:
    """Begins the next iteration of torchdata's StatefulDataLoader, which has yielded all batches.

    Lightning counts the batches and does not ask for one more. The saved loader then continues with
    the end of its iteration, and the next epoch of Lightning has no batches.
    """
    loaders = own(trainer, "utilities.CombinedLoader")(trainer.train_dataloader).flattened
    names = {kind.__name__ for loader in loaders for kind in type(loader).__mro__}
    if "StatefulDataLoader" in names:
        fetcher: Any = trainer.fit_loop._data_fetcher
        iter(fetcher)


def resumed_batches(trainer: Trainer) -> int:
    """Returns the batches trained in an epoch that a resume continues; 0 if it begins an epoch."""
    # At the end of an epoch the counts of its batches are kept until the next one begins. Lightning
    # continues even an epoch that has ended, if the new loader is longer.
    done = processed_batches(trainer)
    continues = trainer.fit_loop.epoch_loop.restarting and done < trainer.num_training_batches
    return done if continues else 0


def resumes_at_end_of_epoch(trainer: Trainer) -> bool:
    """Returns whether a resume ends an epoch whose batches are trained, but which is not counted.

    So after a checkpoint of the validation behind an epoch's last batch.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    is_trained: bool = batches.is_last_batch and batches.current.completed == batches.current.ready
    is_resumed = trainer.fit_loop.epoch_loop.restarting
    return is_resumed and is_trained and epochs.processed < epochs.started


def continues_ended_epoch(trainer: Trainer) -> bool:
    """Returns whether a resume continues an epoch that had ended, and so loses an epoch.

    Lightning 2.6 does so after a checkpoint of ``on_train_epoch_start``, and with ``max_steps``
    after one of ``on_train_epoch_end``.
    """
    loop = trainer.fit_loop
    if not (loop.restarted_on_epoch_start or loop.restarted_on_epoch_end):
        return False
    if epoch_batches(trainer) is None:
        # Lightning trains the whole next epoch in its place, but nothing before a validation.
        progress: Any = loop.epoch_loop.batch_progress
        return bool(progress.is_last_batch and loop.epoch_loop._should_check_val_epoch())
    return processed_batches(trainer) >= trainer.num_training_batches


def processed_epochs(trainer: Trainer) -> int:
    """Returns the epochs that Lightning has ended, including the current one in its end hooks."""
    # Not current_epoch, which is one behind in on_train_epoch_end.
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)


def epochs_before_fit(trainer: Trainer) -> int:
    """Returns the epochs that have ended before this fit; call it before the first batch.

    Lightning counts an epoch whose last batch had ended when the checkpoint was saved just before
    ``on_train_start``. It fetches a batch of a loader without a length earlier.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.total
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    # The condition in _FitLoop.reset.
    is_counted_later = (
        trainer.ckpt_path is not None
        and trainer.fit_loop.restarting
        and batches.is_last_batch
        and batches.total.completed == batches.total.processed - 1
        and epochs.completed == epochs.processed == epochs.started - 1
    )
    return processed_epochs(trainer) + is_counted_later


def fetched_batches(trainer: Trainer, each: int) -> int:
    """Returns the batches of all epochs that were fetched, if every epoch has ``each``."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    # Between epochs, as after a resume from the end of one, the counts of its batches are kept.
    inside = 0 if epochs.started == epochs.processed else ready_batches(trainer)
    return int(epochs.processed) * each + inside


def processed_batches(trainer: Trainer) -> int:
    """Returns the batches of this epoch that Lightning has trained or skipped."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(progress.processed)


def batch_is_processed(trainer: Trainer) -> bool:
    """Returns whether Lightning has processed every batch that it has started.

    A batch for which ``on_train_batch_start`` returns -1 counts as processed, but not as started.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.started == progress.processed)


def epoch_is_exhausted(trainer: Trainer, batches: int) -> bool:
    """Returns whether the loader has ended an epoch in which ``batches`` batches were trained."""
    # If on_train_batch_start returned -1, one more batch was fetched.
    is_limited = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
    return ready_batches(trainer) == batches and not is_limited


def is_last_batch(trainer: Trainer) -> bool:
    """Returns whether the current batch is the last of its epoch; valid before it is trained."""
    return bool(trainer.is_last_batch) or ready_batches(trainer) >= trainer.num_training_batches


def closes_window(trainer: Trainer) -> bool:
    """Returns whether the current batch is the last of its accumulation window."""
    # Lightning's own rule. A WindowLength computes the remainder relative to its first batch.
    length: int = trainer.accumulate_grad_batches
    return ready_batches(trainer) % length == 0 or is_last_batch(trainer)


def current_hook(trainer: Trainer) -> str | None:
    """Returns the innermost hook that Lightning currently calls; None outside hooks."""
    hook: str | None = trainer.lightning_module._current_fx_name
    return hook


def epoch_batches(trainer: Trainer) -> int | None:
    """Returns the batches of one process in an epoch, limits applied; None without a length."""
    batches = trainer.num_training_batches
    return None if math.isinf(batches) else int(batches)


def batches_that_stepped(trainer: Trainer) -> int:
    """Returns the step at which Lightning logs the training metrics of the current update."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def next_logger_step(trainer: Trainer) -> int:
    """Returns :func:`batches_that_stepped` of the next update; call it in ``on_train_start``."""
    loop = trainer.fit_loop.epoch_loop
    fetcher: Any = trainer.fit_loop._data_fetcher
    # Lightning saves a checkpoint before it counts the update, and adds the missing one after
    # on_train_start: in _TrainingEpochLoop.reset, whose condition this is, or after a checkpoint of
    # a validation in a first pass of the loop, which trains nothing.
    is_behind = (
        loop.restarting
        and closes_window(trainer)
        and (
            loop.restarted_on_train_batch_end
            or not loop.restarted_on_last
            or loop._should_check_val_fx(fetcher)
        )
    )
    return batches_that_stepped(trainer) + is_behind


def should_log(trainer: Trainer) -> bool:
    """Returns whether Lightning logs the current update."""
    # The rule of Lightning's should_update_logs, which reads the counters of the active loop: in a
    # validation during training these are not the fit loop's.
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    if is_fast_dev_run(trainer):
        return True
    return every > 0 and (
        (batches_that_stepped(trainer) + 1) % every == 0 or bool(trainer.should_stop)
    )
