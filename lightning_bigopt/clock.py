"""The Trainer's one clock: what has been consumed, and the budget that it is a share of."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_bigopt import trainer_access
from lightning_bigopt.durations import Clock, Duration, Horizon, Progress, Span

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["BatchCount", "ClockSettings", "OnResume", "TrainingClock"]

BatchCount: TypeAlias = str | Callable[[Any], int | Tensor] | None
OnResume: TypeAlias = Literal["continue", "extend"]
Simulate: TypeAlias = Callable[[Clock, float], Horizon]


@dataclass(frozen=True, kw_only=True)
class ClockSettings:
    """What a callback asks of the one clock; two different answers to one question raise.

    Args:
        budget: An explicit budget such as ``"2e9 tokens"``; None for the Trainer's own limits.
        samples: Counts the samples in a batch: a function, or the name of a field whose first
            dimension is counted; None for the loader's batch size.
        tokens: Counts the tokens in a batch: a function, or the name of a field: a mask is summed,
            ids are counted; None where nobody counts tokens.
        on_resume: ``"continue"`` on the checkpoint's horizon, or ``"extend"`` to the Trainer's.

    Example:
        >>> ClockSettings(budget="1e6 samples").merge(ClockSettings()).budget
        '1e6 samples'
    """

    budget: str | None = None
    samples: BatchCount = None
    tokens: BatchCount = None
    on_resume: OnResume | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            unit = Duration.parse(self.budget, name="budget").unit
            if unit == "fraction":
                raise ValueError(
                    f"budget must be in steps, epochs, samples or tokens, got {self.budget!r}"
                )
            if unit == "tokens" and self.tokens is None:
                raise ValueError(
                    f"tokens must be given with a budget in tokens, got None for {self.budget!r}; "
                    "pass tokens=a function of the batch, or the name of its ids or mask"
                )
        if self.on_resume not in (None, "continue", "extend"):
            raise ValueError(f"on_resume must be 'continue' or 'extend', got {self.on_resume!r}")

    def merge(self, other: ClockSettings) -> ClockSettings:
        """One set of settings out of two.

        Raises:
            ValueError: If both answer a question, differently.
        """
        merged = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine is not None and theirs is not None and mine != theirs:
                raise ValueError(
                    f"{field.name} must be the same on every callback, because there is one clock "
                    f"per Trainer, got {mine!r} and {theirs!r}; give it once"
                )
            merged[field.name] = theirs if mine is None else mine
        return ClockSettings(**merged)


class TrainingClock:
    """Counts what a fit consumes and turns it into :class:`Progress`.

    Optimiser updates are Lightning's own ``global_step``. Batches, samples and tokens are counted
    when a batch has been trained; the batch under way is ``pending`` until then, so that a
    checkpoint written inside a batch does not hold it.
    """

    version = 1

    def __init__(self) -> None:
        self.settings = ClockSettings()
        self.horizon: Horizon | None = None
        self.batches = 0
        self.samples = 0
        self.tokens = 0
        self._pending = (0, 0, 0)
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
        self._pin_samples(trainer)
        restored, self._restored = self._restored, None
        if restored is not None:
            self.batches, self.samples, self.tokens = (
                int(restored[key]) for key in ("batches", "samples", "tokens")
            )
        elif trainer.global_step and not self.batches:
            self._count_from_loop(trainer)
        try:
            own = resolve_horizon(trainer, self.settings.budget, simulate)
        except ValueError:
            if horizon == "required" or self.settings.budget is not None:
                raise
            self.horizon = None
            return
        kept = _horizon_from_state(restored.get("horizon")) if restored is not None else None
        if kept is None or self.settings.on_resume == "extend":
            self.horizon = own
            return
        self.horizon = kept
        if (kept.clock, kept.budget) != (own.clock, own.budget):
            rank_zero_warn(
                f"The checkpoint was trained for {kept.budget:g} {kept.clock}, this Trainer is set "
                f"to {own.budget:g} {own.clock}. on_resume='continue' keeps the checkpoint's "
                "horizon; pass on_resume='extend' to stretch the schedule to the new one."
            )

    def _pin_samples(self, trainer: Trainer) -> None:
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

    def begin_batch(self, trainer: Trainer, batch: Any) -> int:
        """Notes the batch that is about to be trained.

        Returns:
            Its samples on this process.
        """
        if self._pinned_samples is not None:
            mine = self._pinned_samples[int(trainer_access.is_last_batch(trainer))]
        else:
            mine = _count(batch, self.settings.samples, "samples")
        tokens = (
            0 if self.settings.tokens is None else _count(batch, self.settings.tokens, "tokens")
        )
        if tokens and self._world > 1:
            tokens = _sum_over_processes(tokens, trainer)
        else:
            tokens *= self._world
        self._pending = (1, mine * self._world, tokens)
        return mine

    def end_batch(self) -> None:
        """The batch has been trained."""
        batches, samples, tokens = self._pending
        self.batches += batches
        self.samples += samples
        self.tokens += tokens
        self._pending = (0, 0, 0)

    def progress(self) -> Progress:
        """What the next update starts from, the batch under way counted as consumed.

        The fraction is NaN where the horizon is unknown, which only those see who do not need it.
        """
        batches, samples, tokens = (
            done + more
            for done, more in zip(
                (self.batches, self.samples, self.tokens), self._pending, strict=True
            )
        )
        steps = self._global_step()
        consumed = {"steps": steps, "batches": batches, "samples": samples, "tokens": tokens}
        horizon = self.horizon
        each = None if horizon is None else horizon.batches_per_epoch
        return Progress(
            fraction=math.nan if horizon is None else consumed[horizon.clock] / horizon.budget,
            steps=steps,
            batches=batches,
            epochs=batches / each if each else 0.0,
            samples=samples,
            tokens=tokens,
        )

    @property
    def exhausted(self) -> bool:
        """Whether an explicit budget has been consumed."""
        return self.settings.budget is not None and self.progress().fraction >= 1.0

    # --------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Counters and horizon as plain numbers."""
        return {
            "version": self.version,
            "batches": self.batches,
            "samples": self.samples,
            "tokens": self.tokens,
            "horizon": None if self.horizon is None else _horizon_to_state(self.horizon),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps a checkpoint's state until :meth:`start`."""
        self._restored = state


# --------------------------------------------------------------------------------------- helpers


def resolve_horizon(trainer: Trainer, budget: str | None, simulate: Simulate | None) -> Horizon:
    """The budget of a fit: of all its limits, the one that ends first.

    Args:
        trainer: After its loaders are set up.
        budget: An explicit budget, or None.
        simulate: ``(clock, budget) -> Horizon``, which lays the run out update by update; None
            where the plan is not known in advance.

    Raises:
        ValueError: If nothing limits the run, or the limit cannot be counted.
    """
    each = trainer_access.epoch_batches(trainer)
    limits: list[tuple[Clock, float]] = []
    if trainer.max_steps >= 0:
        limits.append(("steps", trainer.max_steps))
    max_epochs = trainer.max_epochs
    if max_epochs is not None and max_epochs >= 0 and each is not None:
        limits.append(("batches", max_epochs * each))
    if budget is not None:
        length = Duration.parse(budget, name="budget")
        if length.unit == "epochs":
            if each is None:
                raise ValueError(
                    f"budget must not be in epochs for a loader without length, got {budget!r}; "
                    "write it in steps or samples"
                )
            limits.append(("batches", length.value * each))
        elif length.unit != "fraction":
            limits.append((length.unit, length.value))
    limits = [(clock, amount) for clock, amount in limits if amount > 0]
    if not limits:
        raise ValueError(
            f"the length of the training must be known for a schedule, got max_steps="
            f"{trainer.max_steps}, max_epochs={max_epochs} and a loader "
            f"{'without length' if each is None else f'of {each} batches'}; set max_steps, or pass "
            "budget='2e6 samples' to the scheduler"
        )
    overlong: Literal["raise", "compress"] = (
        "compress" if trainer_access.is_fast_dev_run(trainer) else "raise"
    )
    if simulate is None:
        if len(limits) > 1:
            names = ", ".join(f"{amount:g} {clock}" for clock, amount in limits)
            raise ValueError(
                f"the limits of the training must be one where the batch size is adaptive, got "
                f"{names}; keep one of them"
            )
        clock, amount = limits[0]
        return Horizon(clock=clock, budget=amount, batches_per_epoch=each, overlong=overlong)
    chosen = min((simulate(clock, amount) for clock, amount in limits), key=_updates)
    return Horizon(
        clock=chosen.clock,
        budget=chosen.budget,
        spans=chosen.spans,
        batches_per_epoch=each,
        overlong=overlong,
    )


def _updates(run: Horizon) -> float:
    # An explicit budget that only counting can compare with the Trainer's limits goes first.
    return run.total("steps") or 0.0


def _count(batch: Any, how: BatchCount, name: str) -> int:
    if how is None:
        return trainer_access.count_rows(batch)
    if callable(how):
        return int(how(batch))
    try:
        field = batch[how]
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{name} must be a function of the batch or the name of one of its fields, got {how!r} "
            f"for a batch of {type(batch).__name__}"
        ) from error
    if name == "samples":
        return trainer_access.count_rows(field)
    is_mask = field.dtype == torch.bool or "mask" in how
    return int(field.sum()) if is_mask else int(field.numel())


def _sum_over_processes(value: int, trainer: Trainer) -> int:
    tensor = torch.tensor(float(value), dtype=torch.float64, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(tensor, reduce_op="sum"))


def _horizon_to_state(horizon: Horizon) -> dict[str, Any]:
    return {
        "clock": horizon.clock,
        "budget": horizon.budget,
        "batches_per_epoch": horizon.batches_per_epoch,
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
