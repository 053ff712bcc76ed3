"""HyperparameterScheduler: schedules a numeric field of the parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.callbacks.resume_report import is_resumed, report_changes, with_adopted
from lightning_bigopt.callbacks.schedules import GroupSchedules
from lightning_bigopt.checks import as_code, check_choice
from lightning_bigopt.engine.batch_contents import BatchCount
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.clock_settings import ClockSettings, OnResume
from lightning_bigopt.engine.stage import LEARNING_RATE, Fit
from lightning_bigopt.optimizers.field_claim import BaseOwner
from lightning_bigopt.optimizers.group_field import GroupField
from lightning_bigopt.schedules.base import Schedule

__all__ = ["HyperparameterScheduler"]


@explain_arguments
class HyperparameterScheduler(Capability):
    """Schedules a numeric field of the parameter groups, other than the learning rate.

    Each group's configured value is its base. Add one callback for each field.

    Args:
        field: ``"weight_decay"``, ``"momentum"``, ``"betas[0]"``, ``"betas[1]"``, ``"eps"`` or any
            other numeric field of the parameter groups. Groups of a combined optimizer without it
            are left out.
        schedule: Factor on the base over the budget, dimensionless.
        groups: Other schedules for parameter groups, as for :class:`LearningRateScheduler`.
        budget: As for :class:`LearningRateScheduler`; all callbacks of a Trainer share one clock.
        samples: Counts the samples of a batch: a function, or the name of a field.
        tokens: Counts the tokens of a batch: a function, or the name of an ids or mask field.
        on_resume: ``"continue"`` with the horizon of the checkpoint, or ``"extend"`` to the horizon
            of this Trainer.
        base: Base values to use after a resume: those of the ``"checkpoint"`` or those of the
            ``"config"``. What has changed since the checkpoint is logged.

    Raises:
        ValueError: If an argument is invalid; at fit start if a parameter group does not have the
            field; at train start if the length of the training is unknown, or a duration does not
            fit into it.

    State:
        ``schedule`` and ``groups`` as code, so that a resumed run can report changes. The base
        values are in the state of the engine.

    Example:
        >>> from lightning_bigopt import HyperparameterScheduler, Linear
        >>> HyperparameterScheduler("weight_decay", Linear(start=1.0, end=2.0))
        HyperparameterScheduler('weight_decay', Linear(...))
    """

    rank = 25
    needs_samples = None

    def __init__(
        self,
        field: str,
        schedule: Schedule,
        *,
        groups: Mapping[str, Schedule] | None = None,
        budget: str | None = None,
        samples: BatchCount = None,
        tokens: BatchCount = None,
        on_resume: OnResume | None = None,
        base: BaseOwner = "checkpoint",
    ) -> None:
        self.field = GroupField(field).name
        if field == "lr":
            raise ValueError(
                "field must not be 'lr', got 'lr'; use LearningRateScheduler for learning rates"
            )
        check_choice("base", base, BaseOwner)
        self._schedules = GroupSchedules(schedule, groups, hint="Linear(end=0.1)")
        self.needs_horizon = self._schedules.need_horizon
        self.owns = f"schedule of {field}"  # one callback for each field is allowed
        self.schedule = schedule
        self.groups = dict(groups or {})
        self.base = base
        self.settings = ClockSettings(
            budget=budget, samples=samples, tokens=tokens, on_resume=on_resume
        )
        self._saved: dict[str, Any] | None = None
        self._before: dict[tuple[int, int], float] = {}

    @property
    def state_key(self) -> str:
        """The key of the callback in checkpoints; it contains the field."""
        return f"HyperparameterScheduler[{self.field}]"

    def check_optimizers(self, fit: Fit) -> None:
        """Claims the field; the configured values become the bases."""
        fit.groups.claim(self.field, base=self.base)
        if fit.has_started:  # the optimizers were replaced, and may have other groups
            self._follow(fit)

    def start(self, fit: Fit) -> None:
        """Resolves the schedules on the horizon, and applies them to the field."""
        # On a resume these are the values of the checkpoint: Lightning has restored the optimizers,
        # and the engine has not written the groups yet.
        self._before = self._values(fit)
        self._follow(fit)

    def _follow(self, fit: Fit) -> None:
        self._schedules.resolve(fit)
        fit.groups.follow(self.field, self._schedules.schedule_of, owner=self)

    def announce(self, fit: Fit) -> None:
        """Logs the differences between a resumed run and its checkpoint."""
        saved, self._saved = self._saved, None
        if not is_resumed(fit):
            return
        restored = fit.restored_bases.get(self.field)
        bases, adopted = fit.groups.bases(self.field), fit.groups.adopted(self.field)
        used: dict[str, Any] = {"bases": bases}
        now = self._values(fit)
        values = [(self._before[at], now[at]) for at in now if at not in adopted]
        if saved is None or "schedule" in saved:
            used |= self.saved_state()
        else:
            values = []  # version 0.1 did not save the schedule, and wrote values later
        schedulers = [c for c in fit.capabilities if isinstance(c, HyperparameterScheduler)]
        report_changes(
            None
            if saved is None or restored is None
            else self._named({**saved, "bases": with_adopted(restored, bases, adopted)}),
            self._named(used),
            clock=fit.clock,
            values=values,
            scheduler=f"HyperparameterScheduler({self.field!r})",
            quantity=self.field,
            bases=f"{self.field} bases",
            with_budget=LEARNING_RATE not in fit.owners() and schedulers[0] is self,
        )

    def _named(self, state: dict[str, Any]) -> dict[str, Any]:
        return {f"{self.field} {key}": value for key, value in state.items()}

    def _values(self, fit: Fit) -> dict[tuple[int, int], float]:
        """Returns the values by position: optimizer and group."""
        field = GroupField(self.field)
        return {
            (index, position): value
            for index, (_, optimizer) in enumerate(fit.groups)
            for position, value in enumerate(field.read_all(optimizer.param_groups))
            if value is not None
        }

    def specification(self) -> str:
        """Returns the schedule as code."""
        return repr(self.schedule)

    def settings_as_code(self) -> dict[str, str]:
        """Returns the schedules of the groups, and the owner of the base values."""
        return {name: as_code(getattr(self, name)) for name in ("groups", "base")}

    def saved_state(self) -> dict[str, Any]:
        """Returns the schedules as code."""
        groups = {name: repr(schedule) for name, schedule in self.groups.items()}
        return {"schedule": repr(self.schedule), "groups": groups}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Stores the schedules of the checkpoint for the report in :meth:`announce`.

        Version 0.1 saved the base values in this callback's state.
        """
        self._saved = {name: value for name, value in state.items() if name != "bases"}
        if self.fit is not None and "bases" in state:
            self.fit.restored_bases[self.field] = state["bases"]
            self.fit.groups.load_state_dict({self.field: state["bases"]})

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Does nothing: the schedules do not change within a fit."""

    def __repr__(self) -> str:
        return f"HyperparameterScheduler({self.field!r}, {type(self.schedule).__name__}(...))"
