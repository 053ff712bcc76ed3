"""Counts what a fit consumes, across checkpoints, and says what share of the budget it is."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_warn

from lightning_bigopt import trainer_access
from lightning_bigopt.clock.limits import Simulate, resolve_horizon
from lightning_bigopt.clock.settings import ClockSettings
from lightning_bigopt.counting import count
from lightning_bigopt.durations import Horizon, Progress, Span

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Counts", "TrainingClock"]

Counts: TypeAlias = tuple[int, int, int, int]
"""Steps, batches, samples and tokens."""

_ROUNDING = 1e-12
_UNITS = {"steps": 0, "batches": 1, "samples": 2, "tokens": 3}


class TrainingClock:
    """Counts what a fit consumes and turns it into :class:`Progress`.

    Optimizer updates are Lightning's own ``global_step``. Batches, samples and tokens are counted
    when a batch has been trained; the batch under way is ``pending`` until then, so that a
    checkpoint written inside a batch does not hold it.

    Attributes:
        settings: What the callbacks ask of it.
        horizon: The budget of this fit; None where it is unknown and nobody needs it.
        checkpoint_horizon: That of the checkpoint which this fit goes on from.
        cooldown: Where a cooldown on resume starts and how long it is, as shares of the budget.
    """

    version = 1

    def __init__(self) -> None:
        self.settings = ClockSettings()
        self.horizon: Horizon | None = None
        self.checkpoint_horizon: Horizon | None = None
        self.cooldown: tuple[float, float] | None = None
        self.batches = 0
        self.samples = 0
        self.tokens = 0
        self._pending = (0, 0, 0)
        self._closed = (0, 0, 0)
        self._restored: dict[str, Any] | None = None
        self._global_step: Callable[[], int] = int
        self._world = 1
        self._pinned_samples: tuple[int, int] | None = None

    # ------------------------------------------------------------------------------ lifetime

    def start(
        self,
        trainer: Trainer,
        simulate: Simulate | None,
        *,
        horizon: Literal["required", "optional"] = "required",
    ) -> None:
        """Fixes the horizon and takes over what a checkpoint held; called in ``on_train_start``.

        Raises:
            ValueError: If the horizon is required and cannot be known.
        """
        self._world = trainer_access.data_parallel_size(trainer)
        self.forget_batch()
        self.pin_samples(trainer)
        kept = self._take_over(trainer)
        try:
            own = resolve_horizon(trainer, self.settings.budget, simulate)
        except ValueError:
            if kept is not None and self.settings.on_resume == "cooldown":
                self._branch(kept, None)  # the end of the cooldown is limit enough
                return
            if horizon == "required" or self.settings.budget is not None:
                raise
            self.horizon = None
            return
        if self.settings.on_resume == "cooldown":
            self._branch(kept or own, own)
            return
        if kept is None or self.settings.on_resume == "extend":
            self.horizon, self.cooldown = own, None
            return
        self.horizon = kept
        if self.cooldown is None and (kept.clock, kept.budget) != (own.clock, own.budget):
            rank_zero_warn(
                f"The checkpoint was trained for {kept.budget:g} {kept.clock}, this Trainer is set "
                f"to {own.budget:g} {own.clock}. on_resume='continue' keeps the checkpoint's "
                "horizon; pass on_resume='extend' to stretch the schedule to the new one."
            )

    def _take_over(self, trainer: Trainer) -> Horizon | None:
        """Goes on from a checkpoint's counts; gives its horizon."""
        restored, self._restored = self._restored, None
        if restored is not None:
            counts = [restored[key] for key in ("batches", "samples", "tokens")]
            if trainer_access.exact_loader(trainer) is not None:
                counts = restored["closed"]  # it serves an open window again, from its start
            self.batches, self.samples, self.tokens = map(int, counts)
            self.checkpoint_horizon = _horizon_from_state(restored["horizon"])
            cooldown = restored.get("cooldown")
            self.cooldown = None if cooldown is None else (cooldown[0], cooldown[1])
        elif trainer.global_step and not self.batches:
            self._count_from_loop(trainer)
        self.close_window()
        return None if restored is None else self.checkpoint_horizon

    def _branch(self, horizon: Horizon, own: Horizon | None) -> None:
        """Starts the cooldown here, unless the checkpoint is in one already."""
        self.horizon = horizon
        at = self.progress().fraction
        if self.cooldown is None and at > 0:
            length = self.settings.cooldown
            assert length is not None  # ClockSettings
            self.cooldown = at, horizon.fraction(length, start=at, name="cooldown")
        if self.cooldown is None or own is None or own.clock != horizon.clock:
            return
        end = sum(self.cooldown) * horizon.budget
        if self.settings.budget is None and own.budget < end - _ROUNDING * end:
            rank_zero_warn(
                f"The Trainer stops at {own.budget:g} {own.clock}, before the cooldown ends at "
                f"{end:g}; raise its limit, or shorten the cooldown of {self.settings.cooldown!r}."
            )

    def pin_samples(self, trainer: Trainer) -> None:
        """Asks the loader what a full and the last batch hold; loaders may be made anew."""
        full, last = trainer_access.micro_batch_size(trainer), None
        if self.settings.samples is None and full is not None:
            last = trainer_access.last_batch_samples(trainer)
        self._pinned_samples = None if full is None or last is None else (full, last)

    def _count_from_loop(self, trainer: Trainer) -> None:
        """A checkpoint written without this package: Lightning's own progress is all there is."""
        each = trainer_access.epoch_batches(trainer) or 0
        self.batches = trainer.current_epoch * each + trainer_access.ready_batches(trainer)
        full = trainer_access.micro_batch_size(trainer) or 0
        self.samples = self.batches * full * self._world

    def bind(self, trainer: Trainer) -> None:
        """Reads updates from this Trainer, which the clock does not keep alive."""
        reference = weakref.ref(trainer)

        def global_step() -> int:
            trainer = reference()
            return 0 if trainer is None else trainer.global_step

        self._global_step = global_step

    # ------------------------------------------------------------------------------ counting

    @property
    def looks_at_batches(self) -> bool:
        """Whether :meth:`begin_batch` must see each batch, at the same time on every process."""
        is_counted = self._pinned_samples is None or self.settings.tokens is not None
        return is_counted or self._world > 1

    def begin_batch(
        self, trainer: Trainer, batch: Any, *, served: tuple[int, int] | None = None
    ) -> int:
        """Notes the batch that is about to be trained.

        Args:
            trainer: The Trainer.
            batch: What the loader gave.
            served: Its samples on this process and on all of them, where the loader knows.

        Returns:
            Its samples on this process.
        """
        if served is not None:
            mine, everywhere = served
        elif self._pinned_samples is not None:
            full, last = self._pinned_samples
            differs = last != full or self._world > 1
            is_last = differs and trainer_access.is_last_batch(trainer)
            mine = last if is_last else full
            everywhere = mine * self._world
            if is_last:  # shards that the user cut may differ by a sample
                everywhere = round(trainer_access.sum_over_data(trainer, mine))
        else:
            # Processes that counted differently would open different windows, and wait for ever.
            mine = count(batch, self.settings.samples, name="samples")
            everywhere = (
                mine if self._world == 1 else round(trainer_access.sum_over_data(trainer, mine))
            )
        tokens = 0
        if self.settings.tokens is not None:
            own = count(batch, self.settings.tokens, name="tokens") if mine else 0
            tokens = round(trainer_access.sum_over_data(trainer, own))
        self._pending = (1, everywhere, tokens)
        return mine

    def end_batch(self) -> None:
        """The batch has been trained."""
        batches, samples, tokens = self._pending
        self.batches += batches
        self.samples += samples
        self.tokens += tokens
        self.forget_batch()

    def forget_batch(self) -> None:
        """The batch under way never ends: an error or the module cut it off."""
        self._pending = (0, 0, 0)

    def close_window(self) -> None:
        """An update has been trained: an exact loader goes on from here after a resume."""
        self._closed = (self.batches, self.samples, self.tokens)

    def progress(self) -> Progress:
        """What the next update starts from, the batch under way counted as consumed.

        The fraction is NaN where the horizon is unknown, which only those see who do not need it.
        """
        return self.progress_at(self.counts())

    def counts(self) -> Counts:
        """What :meth:`progress` is made of, for who may never ask for it."""
        batches, samples, tokens = self._pending
        return (
            self._global_step(),
            self.batches + batches,
            self.samples + samples,
            self.tokens + tokens,
        )

    def progress_at(self, counts: Counts) -> Progress:
        """:meth:`progress` as it was when the counts were these."""
        steps, batches, samples, tokens = counts
        horizon = self.horizon
        epochs = 0.0
        if horizon is not None and horizon.samples_per_epoch:
            epochs = samples / horizon.samples_per_epoch
        elif horizon is not None and horizon.batches_per_epoch:
            epochs = batches / horizon.batches_per_epoch
        return Progress(
            fraction=self.fraction_at(counts),
            steps=steps,
            batches=batches,
            epochs=epochs,
            samples=samples,
            tokens=tokens,
        )

    @property
    def fraction(self) -> float:
        """``progress().fraction``, for who needs no more and asks once an update."""
        horizon = self.horizon
        if horizon is not None and horizon.clock == "steps":
            return self._global_step() / horizon.budget
        return self.fraction_at(self.counts())

    def fraction_at(self, counts: Counts) -> float:
        """:attr:`fraction` as it was when the counts were these."""
        horizon = self.horizon
        return math.nan if horizon is None else counts[_UNITS[horizon.clock]] / horizon.budget

    @property
    def exhausted(self) -> bool:
        """Whether an explicit budget has been consumed, or a cooldown on resume has ended."""
        if self.cooldown is not None:
            return self.progress().fraction >= sum(self.cooldown) - _ROUNDING
        return self.settings.budget is not None and self.progress().fraction >= 1.0

    # --------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Counters and horizon as plain numbers."""
        return {
            "version": self.version,
            "batches": self.batches,
            "samples": self.samples,
            "tokens": self.tokens,
            "closed": list(self._closed),
            "horizon": None if self.horizon is None else _horizon_to_state(self.horizon),
            "cooldown": None if self.cooldown is None else list(self.cooldown),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps a checkpoint's state until :meth:`start`."""
        self._restored = state


def _horizon_to_state(horizon: Horizon) -> dict[str, Any]:
    return {
        "clock": horizon.clock,
        "budget": horizon.budget,
        "batches_per_epoch": horizon.batches_per_epoch,
        "samples_per_epoch": horizon.samples_per_epoch,
        "spans": [[s.updates, s.batches, s.samples, s.tokens] for s in horizon.spans],
    }


def _horizon_from_state(state: dict[str, Any] | None) -> Horizon | None:
    if state is None:
        return None
    spans = tuple(
        Span(updates=updates, batches=batches, samples=samples, tokens=tokens)
        for updates, batches, samples, tokens in state["spans"]
    )
    return Horizon(**{**state, "spans": spans})
