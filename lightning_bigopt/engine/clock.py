"""The clock of a Trainer: counts updates, batches, samples and tokens against the budget."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine.budget import Simulate, resolve_horizon
from lightning_bigopt.engine.clock_settings import ClockSettings
from lightning_bigopt.engine.horizon_state import horizon_from_state, horizon_to_state
from lightning_bigopt.trainer_access import loaders, loop, strategies

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["BatchAmounts", "Clock"]

_ROUNDING = 1e-12  # tolerance of comparisons with the end of a cooldown


class BatchAmounts(NamedTuple):
    """The amounts that one loader batch consumes.

    Attributes:
        samples: Samples over all processes.
        tokens: Tokens over all processes; 0 if they are not counted.
        batches: Loader batches of one process.
    """

    samples: int
    tokens: int = 0
    batches: int = 1


class _Counts(NamedTuple):
    steps: int = 0
    batches: int = 0
    samples: int = 0
    tokens: int = 0


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
        samples: Samples over all processes in these batches.
        tokens: Tokens over all processes in these batches.
        window_is_open: Whether an accumulation window has begun and not ended.
    """

    version = 1

    def __init__(self) -> None:
        self.settings = ClockSettings()
        self.horizon: Horizon | None = None
        self.checkpoint_horizon: Horizon | None = None
        self.cooldown: tuple[float, float] | None = None
        self.batches = self.samples = self.tokens = 0
        self.window_is_open = False
        self._pending = BatchAmounts(0, batches=0)
        self._opened = _Counts()  # at the start of the current window
        self._closed: tuple[int, ...] = (0, 0, 0)  # batches, samples, tokens at the last window end
        self._restored: dict[str, Any] | None = None
        self._trainer: Trainer | None = None

    # ------------------------------------------------------------------------------ lifetime

    def start(
        self,
        trainer: Trainer,
        simulate: Simulate | None,
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
            own = resolve_horizon(trainer, self.settings.budget, simulate)
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
        if self.cooldown is None and (kept.clock, kept.budget) != (own.clock, own.budget):
            rank_zero_warn(
                f"The checkpoint was trained for {kept.budget:g} {kept.clock}, this Trainer is set "
                f"to {own.budget:g} {own.clock}. on_resume='continue' keeps the checkpoint's "
                "horizon; pass on_resume='extend' to stretch the schedule to the new one."
            )

    def stop(self) -> None:
        """Ends the fit; the counts are kept for a second fit."""
        self.drop_batch()
        self._trainer = None

    def restore_without_training(self) -> None:
        """Restores the counts of a checkpoint in a fit that ends before training starts."""
        restored, self._restored = self._restored, None
        if restored is not None:
            self._load_counts(restored, [restored[k] for k in ("batches", "samples", "tokens")])
            self.horizon = self.checkpoint_horizon

    def _load_counts(self, restored: dict[str, Any], counts: list[int]) -> None:
        self.batches, self.samples, self.tokens = map(int, counts)
        self._closed = tuple(map(int, restored["closed"]))
        self.checkpoint_horizon = horizon_from_state(restored["horizon"])
        cooldown = restored.get("cooldown")
        self.cooldown = None if cooldown is None else (cooldown[0], cooldown[1])

    def _restore(self, trainer: Trainer) -> Horizon | None:
        """Restores the counts of a checkpoint, and returns its horizon."""
        restored, self._restored = self._restored, None
        if restored is not None:
            counts = [restored[key] for key in ("batches", "samples", "tokens")]
            if loaders.exact_loader(trainer) is not None:
                # A GlobalBatchLoader repeats an interrupted window from its start, while a
                # DataLoader continues with the next batch.
                counts = restored["closed"]
            self._load_counts(restored, counts)
        elif trainer.global_step and not self.batches:
            self._count_from_loop(trainer)
        self._closed = (self.batches, self.samples, self.tokens)
        self._opened = self._counts()
        return None if restored is None else self.checkpoint_horizon

    def _count_from_loop(self, trainer: Trainer) -> None:
        """Sets the counts from Lightning's, for a checkpoint written without this package."""
        each = loop.epoch_batches(trainer) or 0
        self.batches = loop.fetched_batches(trainer, each)
        full = loaders.micro_batch_size(trainer) or 0
        self.samples = self.batches * full * strategies.data_parallel_size(trainer)

    def _start_cooldown(self, horizon: Horizon, own: Horizon | None) -> None:
        """Starts a cooldown at the current fraction, unless the checkpoint is within one."""
        self.horizon = horizon
        at = self.fraction
        if self.cooldown is None and at > 0:
            length = self.settings.cooldown
            assert length is not None  # checked by ClockSettings
            self.cooldown = at, horizon.fraction(length, start=at, name="cooldown")
        if self.cooldown is None or own is None or own.clock != horizon.clock:
            return
        end = sum(self.cooldown) * horizon.budget
        if self.settings.budget is None and own.budget < end - _ROUNDING * end:
            rank_zero_warn(
                f"The Trainer stops at {own.budget:g} {own.clock}, before the cooldown ends at "
                f"{end:g}; raise its limit, or shorten the cooldown of {self.settings.cooldown!r}."
            )

    # ------------------------------------------------------------------------------ counting

    def begin_batch(self, amounts: BatchAmounts) -> None:
        """Adds the amounts of the current batch as pending, and opens a window if none is open."""
        if not self.window_is_open:
            self._opened = self._counts()
            self.window_is_open = True
        self._pending = amounts

    def end_batch(self, *, closes_window: bool) -> None:
        """Adds the pending amounts to the counts, and closes the window after its last batch."""
        self.batches += self._pending.batches
        self.samples += self._pending.samples
        self.tokens += self._pending.tokens
        self._pending = BatchAmounts(0, batches=0)
        if closes_window:
            self.window_is_open = False
            self._closed = (self.batches, self.samples, self.tokens)

    def drop_batch(self) -> None:
        """Drops the pending amounts, and closes the window: windows end with the epoch."""
        self._pending = BatchAmounts(0, batches=0)
        self.window_is_open = False

    def _counts(self) -> _Counts:
        steps = 0 if self._trainer is None else self._trainer.global_step
        batches, samples = self.batches + self._pending.batches, self.samples
        return _Counts(
            steps, batches, samples + self._pending.samples, self.tokens + self._pending.tokens
        )

    @property
    def window_samples(self) -> int:
        """Samples over all processes in the current window, including the current batch."""
        return self.samples + self._pending.samples - self._opened.samples

    @property
    def window_batches(self) -> int:
        """Batches of one process in the current window, including the current batch."""
        return self.batches + self._pending.batches - self._opened.batches

    # ------------------------------------------------------------------------------ progress

    def progress(self) -> Progress:
        """Returns the progress at which the next update starts; pending amounts are included.

        The fraction is NaN if the horizon is unknown.
        """
        return self._progress_at(self._counts())

    @property
    def window_progress(self) -> Progress:
        """The progress at which the current window began, or else the last one."""
        return self._progress_at(self._opened)

    @property
    def update_progress(self) -> Progress:
        """The progress at which the current update started, or between updates the next starts."""
        return self.window_progress if self.window_is_open else self.progress()

    @property
    def fraction(self) -> float:
        """The fraction of :meth:`progress`."""
        return self._fraction_at(self._counts())

    def _progress_at(self, counts: _Counts) -> Progress:
        horizon, epochs = self.horizon, 0.0
        if horizon is not None and horizon.samples_per_epoch:
            epochs = counts.samples / horizon.samples_per_epoch
        elif horizon is not None and horizon.batches_per_epoch:
            epochs = counts.batches / horizon.batches_per_epoch
        return Progress(
            fraction=self._fraction_at(counts),
            steps=counts.steps,
            batches=counts.batches,
            epochs=epochs,
            samples=counts.samples,
            tokens=counts.tokens,
        )

    def _fraction_at(self, counts: _Counts) -> float:
        if self.horizon is None:
            return math.nan
        consumed: int = getattr(counts, self.horizon.clock)
        return consumed / self.horizon.budget

    @property
    def budget_exhausted(self) -> bool:
        """Whether an explicit budget has been consumed, or a cooldown on resume has ended."""
        if self.cooldown is not None:
            return self.fraction >= sum(self.cooldown) - _ROUNDING
        return self.settings.budget is not None and self.fraction >= 1.0

    # --------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Returns counts, horizon and cooldown as plain numbers."""
        return {
            "version": self.version,
            "batches": self.batches,
            "samples": self.samples,
            "tokens": self.tokens,
            "closed": list(self._closed),
            "horizon": None if self.horizon is None else horizon_to_state(self.horizon),
            "cooldown": None if self.cooldown is None else list(self.cooldown),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stores the state of a checkpoint until :meth:`start`."""
        self._restored = state

    def rewind(self, state: dict[str, Any]) -> None:
        """Restores the counts of an earlier :meth:`state_dict` of this fit; keeps the horizon."""
        self.drop_batch()
        self.batches, self.samples, self.tokens = (
            int(state[key]) for key in ("batches", "samples", "tokens")
        )
        self._closed = (self.batches, self.samples, self.tokens)
        self._opened = self._counts()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_trainer": None}  # copies and pickles must not contain the Trainer
