"""The schedule of a trunk: budgets, the update at which each branches off, and the warm-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from lightning_bigopt.checks import shown
from lightning_bigopt.durations.duration import Duration
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.engine.stage import LEARNING_RATE, Stages
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import trial_runs
from lightning_bigopt.tuning.paths import changed
from lightning_bigopt.tuning.refusals import SetupError
from lightning_bigopt.tuning.trees import ObjectTree

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "adapt",
    "budgets_in_updates",
    "check_trunk",
    "fork_of",
    "fork_of_run",
    "with_fixed_warmup",
]

_SAME = 1e-9  # relative difference of factors whose rounding depends on the budget
_ADVICE = (
    "write LearningRateScheduler(WarmupStableDecay()), or leave budgets out and train every trial "
    "on its own"
)


def budgets_in_updates(budgets: Any, max_steps: int) -> tuple[int, ...]:
    """Converts budgets into updates, in ascending order.

    Args:
        budgets: Percentages of ``max_steps``, or numbers of updates.
        max_steps: Limit of the Trainer.

    Raises:
        ValueError: If the Trainer has no ``max_steps``, or a budget is not a number of updates.

    Example:
        >>> budgets_in_updates(("25%", "50%", "100%"), 400)
        (100, 200, 400)
    """
    if max_steps <= 0:
        raise ValueError(
            f"max_steps of the Trainer must be positive with budgets, got {max_steps}; write "
            "Trainer(max_steps=...)"
        )
    if isinstance(budgets, (str, int, float)) or not isinstance(budgets, Sequence) or not budgets:
        raise ValueError(
            f"budgets must be a list of shares or updates, got {shown(budgets)}; write "
            "('25%', '50%', '100%')"
        )
    found = []
    for index, budget in enumerate(budgets):
        length = Duration.parse(budget, name=f"budgets[{index}]")
        updates = length.value * max_steps if length.unit == "fraction" else length.value
        if length.unit not in ("fraction", "steps") or round(updates) < 1:
            raise ValueError(
                f"budgets[{index}] must be a share or a number of updates, got {shown(budget)}; "
                "write '25%' or 100"
            )
        found.append(round(updates))
    if len(set(found)) < len(found):
        raise ValueError(f"budgets must be different, got {found}; remove the equal ones")
    return tuple(sorted(found))


def check_trunk(trainer: Trainer, budgets: Sequence[int]) -> None:
    """Raises if the callbacks of a Trainer cannot share a trunk.

    Args:
        trainer: The Trainer.
        budgets: Budgets in updates, in ascending order.
    """
    adapt(trainer, budget=budgets[-1], largest=budgets[-1])
    for schedule in _schedules(_scheduler(trainer)):
        for budget in budgets[:-1]:
            fork_of(schedule, budget, budgets[-1])


def adapt(trainer: Trainer, *, budget: int, largest: int) -> None:
    """Gives a Trainer a budget, and a warm-up whose updates do not depend on it.

    Raises:
        ValueError: If the Trainer has no LearningRateScheduler, or another callback depends on the
            budget: its trunk would be another one for each budget.
    """
    trial_runs.set_max_steps(trainer, budget)
    callbacks = trainer_callbacks.callbacks_of(trainer)
    scheduler = _scheduler(trainer)
    _check_others(callbacks, scheduler)
    if scheduler.settings.budget is not None:
        raise ValueError(
            "budget must be None if trials share a trunk, got "
            f"{scheduler.settings.budget!r}; write Trainer(max_steps=...)"
        )
    values: dict[tuple[str, ...], Any] = {
        ("schedule",): with_fixed_warmup(scheduler.schedule, largest),
        ("on_resume",): "extend",
        ("cooldown",): None,
    }
    for name in ("groups", "optimizers"):
        others: dict[str, Schedule] = getattr(scheduler, name)
        values[(name,)] = {k: with_fixed_warmup(s, largest) for k, s in others.items()} or None
    index = callbacks.index(scheduler)
    callbacks[:] = changed(
        ObjectTree(), callbacks, {(str(index), *keys): value for keys, value in values.items()}
    )
    callbacks.append(_CheckOfModule(_scheduler(trainer)))


class _CheckOfModule(Callback):
    """Checks the callbacks of the module, which a Trainer has when its fit begins.

    Args:
        scheduler: The LearningRateScheduler of the trunk.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises if a callback of the module depends on the budget."""
        callbacks = trainer_callbacks.callbacks_of(trainer)
        found = [c for c in callbacks if isinstance(c, Stages) and c.owns == LEARNING_RATE]
        if found != [self.scheduler]:
            raise SetupError(
                "callbacks of the Trainer must contain the LearningRateScheduler if trials share "
                f"a trunk, got {found} from the module; write Trainer(callbacks=[...])"
            )
        _check_others(callbacks, self.scheduler, error=SetupError)


def _check_others(
    callbacks: Sequence[Any], scheduler: Any, *, error: type[ValueError] = ValueError
) -> None:
    """Raises if a callback other than the scheduler depends on the budget."""
    for callback in callbacks:
        if isinstance(callback, Stages) and callback is not scheduler and callback.needs_horizon:
            raise error(
                "callbacks must not depend on the budget if trials share a trunk, got "
                f"{callback!r}; write its lengths in updates, or leave budgets out"
            )


def with_fixed_warmup(schedule: Schedule, largest: int) -> Schedule:
    """Returns a schedule whose first parts are as many updates as in a run of ``largest`` updates.

    Parts that end with the budget keep their lengths.

    Args:
        schedule: The schedule.
        largest: Updates of the run to which percentages refer.

    Example:
        >>> from lightning_bigopt import WarmupStableDecay
        >>> fixed = with_fixed_warmup(WarmupStableDecay(warmup="5%"), 400)
        >>> str(fixed.warmup), str(fixed.decay)
        ('20 steps', '20%')
    """
    lengths = schedule.first_lengths()
    shares = {n: length.value for n, length in lengths.items() if length.unit == "fraction"}
    # 2.5 % of 40 updates are one update, whatever the rounding of 0.025 * 40.
    steps = {n: round(share * largest, 9) for n, share in shares.items()}
    fixed = {n: Duration(int(s) if s.is_integer() else s, "steps") for n, s in steps.items()}
    return replace(schedule, **fixed) if fixed else schedule


def fork_of(schedule: Schedule, budget: int, largest: int) -> int:
    """Returns the update at which the branch of a budget leaves the trunk.

    Up to there the factors of the two runs are equal; the next one differs.

    Args:
        schedule: The schedule, with lengths of its first parts in updates.
        budget: Updates of the branch.
        largest: Updates of the trunk.

    Raises:
        ValueError: If the schedule has no plateau, or no cooldown after it.

    Example:
        >>> from lightning_bigopt import WarmupStableDecay
        >>> fork_of(WarmupStableDecay(warmup=10, decay="20%"), 100, 400)
        80
    """
    branch = schedule.resolve(Horizon.of_steps(budget))
    trunk = schedule.resolve(Horizon.of_steps(largest))
    warmup = branch.warmup_end() * budget
    for update in range(budget):
        mine, theirs = branch(update / budget), trunk(update / largest)
        if abs(mine - theirs) > _SAME * max(abs(mine), abs(theirs)):
            if update - 1 <= warmup + 1:
                raise _no_plateau(schedule)
            return update - 1
    raise _no_plateau(schedule)


def fork_of_run(trainer: Trainer, budget: int, largest: int) -> int:
    """Returns :func:`fork_of` of the schedules of a Trainer: the earliest of them."""
    return min(fork_of(schedule, budget, largest) for schedule in _schedules(_scheduler(trainer)))


def _no_plateau(schedule: Schedule) -> ValueError:
    return ValueError(
        "schedule must have a plateau and a cooldown that ends with the budget if trials share a "
        f"trunk, got {schedule!r}; {_ADVICE}"
    )


def _scheduler(trainer: Trainer) -> Any:
    """Returns the LearningRateScheduler of a Trainer."""
    callbacks: list[Any] = list(trainer_callbacks.callbacks_of(trainer))
    found = (c for c in callbacks if isinstance(c, Stages) and c.owns == LEARNING_RATE)
    scheduler = next(found, None)
    if scheduler is None:
        raise ValueError(
            f"callbacks must contain a LearningRateScheduler with budgets, got none; {_ADVICE}"
        )
    return scheduler


def _schedules(scheduler: Any) -> list[Schedule]:
    return [
        scheduler.schedule,
        *scheduler.groups.values(),
        *scheduler.optimizers.values(),
    ]
