"""The clock of a Trainer: counts updates, batches, samples and tokens against the budget."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine import budget
from lightning_bigopt.engine.amounts import BatchAmounts, RunAmounts
from lightning_bigopt.engine.clock_settings import ClockSettings
from lightning_bigopt.engine.epoch_position import EpochPosition
from lightning_bigopt.engine.horizon_state import horizon_from_state, horizon_to_state, pair
from lightning_bigopt.engine.training_time import TrainingTime
from lightning_bigopt.trainer_access import loaders, loop

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Clock"]

_COUNTS = ("batches", "samples", "tokens")


class Clock:
    """Counts updates, batches, samples and tokens, and turns them into :class:`Progress`.

    The number of updates is Lightning's ``global_step``. The other amounts are added when a batch
    ends. Until then the amounts of the current batch are pending, so that a checkpoint saved within
    a batch does not contain them.

    Attributes:
        settings: The merged settings of all callbacks.
        horizon: The budget of this fit; None if it is unknown and no capability needs it.
        checkpoint_horizon: The horizon of the checkpoint from which this fit resumed.
        cooldown: Start and length of a cooldown on resume, as fractions of the budget.
        batches: Loader batches of one process that have ended.
        samples: Samples over all processes in these batches, and those left out after them.
        left_out: Samples that were left out and not trained, since this object was created.
        tokens: Tokens over all processes in these batches.
        epoch: The position in the current epoch.
        window_is_open: Whether an accumulation window has begun and not ended.
        samples_are_known: Whether the samples of every batch of the run were counted.
    """

    version = 1

    def __init__(self) -> None:
        self.settings = ClockSettings()
        self.horizon: Horizon | None = None
        self.checkpoint_horizon: Horizon | None = None
        self.cooldown: tuple[float, float] | None = None
        self.batches = self.samples = self.tokens = self.left_out = 0
        self.epoch = EpochPosition()
        self.window_is_open = False
        self.samples_are_known = True
        self._pending = BatchAmounts(0, batches=0)
        self._opened = RunAmounts()  # at the start of the current window
        self._closed: tuple[int, ...] = (0, 0, 0)  # batches, samples, tokens at the last window end
        self._restored: dict[str, Any] | None = None
        self._time = TrainingTime()
        self._trainer: Trainer | None = None

    # ------------------------------------------------------------------------------ lifetime

    def start(
        self,
        trainer: Trainer,
        simulate: budget.Simulate | None,
        *,
        horizon: Literal["required", "optional"] = "required",
    ) -> None:
        """Determines the horizon, and restores the counts of a checkpoint.

        Args:
            trainer: The Trainer, after its loaders are set up.
            simulate: Simulates the run, as for :func:`resolve_horizon`.
            horizon: Whether a capability needs the horizon.

        Raises:
            ValueError: If the horizon is required and unknown.
        """
        self._trainer = trainer
        self.drop_batch()
        kept = self._restore(trainer)
        try:
            own = budget.resolve_horizon(trainer, self.settings.budget, simulate)
        except ValueError:
            if kept is not None and self.settings.on_resume == "cooldown":
                # A Trainer without limits is valid here: the end of the cooldown ends the run.
                self._start_cooldown(kept, None)
                return
            if horizon == "required" or self.settings.budget is not None:
                raise
            self.horizon = None
            return
        if self.settings.on_resume == "cooldown":
            self._start_cooldown(kept or own, own)
            return
        if kept is None or horizon == "optional" or self.settings.on_resume == "extend":
            self.horizon, self.cooldown = own, None
            return
        self.horizon = kept
        if self.cooldown is None:
            ends = self.settings.budget is not None  # the run, see budget_exhausted
            budget.warn_of_other_budget(kept, own, fraction=self.fraction, ends_run=ends)

    def stop(self) -> None:
        """Ends the fit; the counts are kept for a second fit."""
        self.drop_batch()
        self._time.stop()
        self._trainer = None

    def restore_without_training(self) -> None:
        """Restores the counts of a checkpoint in a fit that ends before training starts."""
        restored, self._restored = self._restored, None
        if restored is not None:
            self._load_counts(restored)
            self.horizon = self.checkpoint_horizon

    def _load_counts(self, restored: dict[str, Any], *, of_closed: bool = False) -> None:
        counts = restored["closed"] if of_closed else [restored[name] for name in _COUNTS]
        self.batches, self.samples, self.tokens = map(int, counts)
        self._closed = tuple(map(int, restored["closed"]))
        self.checkpoint_horizon = horizon_from_state(restored["horizon"])
        self.epoch.seen = pair(restored.get("seen_length"))
        self.cooldown = pair(restored.get("cooldown"))

    def _restore(self, trainer: Trainer) -> Horizon | None:
        """Restores the counts of a checkpoint, and returns its horizon."""
        restored, self._restored = self._restored, None
        if restored is not None:
            # A GlobalBatchLoader repeats an interrupted window from its start, while a DataLoader
            # continues with the next batch.
            self._load_counts(restored, of_closed=loaders.exact_loader(trainer) is not None)
        elif trainer.global_step and not self.batches:
            # The checkpoint was written without this package.
            self.batches, samples = loaders.consumed(trainer)
            self.samples, self.samples_are_known = samples or 0, samples is not None
        self.epoch.start_fit(trainer)
        self._time.start_fit(trainer, restored, keep=self.settings.budget is not None)
        self._closed = (self.batches, self.samples, self.tokens)
        self._opened = self.counts()
        return None if restored is None else self.checkpoint_horizon

    @property
    def is_timed(self) -> bool:
        """Whether the budget is a time."""
        return self.horizon is not None and self.horizon.clock == "seconds"

    def _start_cooldown(self, horizon: Horizon, own: Horizon | None) -> None:
        """Starts a cooldown at the current fraction, unless the checkpoint is within one."""
        self.horizon = horizon
        at = self.fraction
        if self.cooldown is None and at > 0:
            length = self.settings.cooldown
            assert length is not None  # checked by ClockSettings
            self.cooldown = at, horizon.fraction(length, start=at, name="cooldown")
        if self.cooldown is not None and own is not None and self.settings.budget is None:
            budget.warn_of_short_limit(own, horizon, self.settings.cooldown, end=sum(self.cooldown))

    # ------------------------------------------------------------------------------ counting

    def end_epoch(self, trainer: Trainer) -> None:
        """Ends an epoch and its window."""
        self.epoch.end(trainer)
        self.drop_batch()

    def begin_batch(self, amounts: BatchAmounts, *, index: int) -> None:
        """Adds the amounts of a batch as pending, and opens a window if none is open.

        ``index`` is the number of batches of this epoch before the batch.
        """
        if not self.epoch.in_samples:
            self.epoch.done = index
        if not self.window_is_open:
            if index >= self.epoch.next_check:
                self.epoch.check_length(index)
            self._opened = self.counts()
            self.window_is_open = True
        self._pending = amounts

    def end_batch(self, *, closes_window: bool) -> None:
        """Adds the pending amounts to the counts, and closes the window after its last batch."""
        self.batches += self._pending.batches
        self.samples += self._pending.samples
        self.left_out += self._pending.left_out
        self.tokens += self._pending.tokens
        self.epoch.done += self._of_epoch(self._pending)
        self._pending = BatchAmounts(0, batches=0)
        if closes_window:
            self.window_is_open = False
            self._closed = (self.batches, self.samples, self.tokens)

    def read_time(self) -> None:
        """Reads the time if it is the budget: a collective operation."""
        if self._trainer is not None and self.is_timed:
            self._time.read(self._trainer)

    def drop_batch(self) -> None:
        """Drops the pending amounts, and closes the window: windows end with the epoch."""
        self._pending = BatchAmounts(0, batches=0)
        self.window_is_open = False

    def counts(self) -> RunAmounts:
        """Returns the amounts consumed; pending amounts are included."""
        trainer, pending = self._trainer, self._pending
        return RunAmounts(
            steps=0 if trainer is None else trainer.global_step,
            batches=self.batches + pending.batches,
            samples=self.samples + pending.samples,
            tokens=self.tokens + pending.tokens,
            epochs=0 if trainer is None else max(self.epoch.ended, loop.processed_epochs(trainer)),
            epoch_done=self.epoch.done + self._of_epoch(pending),
            seconds=self._time.seconds,
            left_out=self.left_out + pending.left_out,
        )

    def _of_epoch(self, amounts: BatchAmounts) -> int:
        return amounts.samples if self.epoch.in_samples else amounts.batches

    @property
    def window(self) -> RunAmounts:
        """The amounts of the current window, including the current batch."""
        return self.counts().since(self._opened)

    # ------------------------------------------------------------------------------ progress

    def progress(self) -> Progress:
        """Returns the progress at which the next update starts; pending amounts are included.

        The fraction is NaN if the horizon is unknown.
        """
        return self.progress_at(self.counts())

    @property
    def window_progress(self) -> Progress:
        """The progress at which the current window began, or else the last one."""
        return self.progress_at(self._opened)

    @property
    def update_progress(self) -> Progress:
        """The progress at which the current update started, or between updates the next starts."""
        return self.window_progress if self.window_is_open else self.progress()

    @property
    def fraction(self) -> float:
        """The fraction of :meth:`progress`."""
        return self._fraction_at(self.counts())

    def progress_at(self, counts: RunAmounts) -> Progress:
        """Returns the progress at other counts of the current epoch."""
        return Progress(
            fraction=self._fraction_at(counts),
            steps=counts.steps,
            batches=counts.batches,
            epochs=self._epochs_at(counts) if self.epoch.length else 0.0,
            samples=counts.samples,
            tokens=counts.tokens,
            seconds=counts.seconds,
        )

    def _fraction_at(self, counts: RunAmounts) -> float:
        horizon = self.horizon
        if horizon is None:
            return math.nan
        share = self._fraction_of(horizon, counts)
        if horizon.others and self.epoch.differs(horizon, counts):
            share = max(share, *(self._fraction_of(other, counts) for other in horizon.others))
        return share

    def _fraction_of(self, limit: Horizon, counts: RunAmounts) -> float:
        if limit.epochs is not None and self.epoch.length:
            return self._epochs_at(counts, of=limit.epochs)
        consumed: float = getattr(counts, limit.clock)
        return consumed / limit.budget

    def _epochs_at(self, counts: RunAmounts, *, of: float = 1.0) -> float:
        """Returns the epochs consumed, as a fraction of a number of epochs."""
        length = self.epoch.length or 1
        # One division, so that equal epochs give the same fraction as the count of all batches.
        done = counts.epochs * length + min(counts.epoch_done, length)
        return done / (of * length)

    @property
    def budget_exhausted(self) -> bool:
        """Whether an explicit budget or ``max_time`` is consumed, or a cooldown has ended."""
        if self.cooldown is not None:
            return self.fraction >= sum(self.cooldown) - budget.ROUNDING
        if self.horizon is None or (self.settings.budget is None and not self.is_timed):
            return False
        limits, counts = (self.horizon, *self.horizon.others), self.counts()
        return any(counts.reach_limit(n.epochs, self._fraction_of(n, counts)) for n in limits)

    def state_dict(self) -> dict[str, Any]:
        """Returns counts, horizon and cooldown as plain numbers."""
        return {
            "version": self.version,
            **{name: getattr(self, name) for name in _COUNTS},
            "closed": list(self._closed),
            "horizon": None if self.horizon is None else horizon_to_state(self.horizon),
            "cooldown": None if self.cooldown is None else list(self.cooldown),
            "seen_length": self.epoch.seen,
            **({"seconds": self._time.now()} if self.is_timed else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stores the state of a checkpoint until :meth:`start`."""
        self._restored = state

    def rewind(self, state: dict[str, Any]) -> None:
        """Restores the counts of an earlier :meth:`state_dict` of this fit; keeps the horizon."""
        self.drop_batch()
        self.batches, self.samples, self.tokens = (int(state[name]) for name in _COUNTS)
        self._closed = (self.batches, self.samples, self.tokens)
        self._opened = self.counts()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_trainer": None}  # copies and pickles must not contain the Trainer
