"""Trials of an Optuna study: asked for, told, counted, and repeated if their process has died."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from lightning_bigopt.reporting.study import Direction, StudyTrial, TrialState
from lightning_bigopt.tuning.optuna_parts import (
    FIRST,
    NOT_DRAWN,
    REPEATS,
    make_pruner,
    make_sampler,
)
from lightning_bigopt.tuning.optuna_storage import open_study, suggest
from lightning_bigopt.tuning.trial import Outcome

if TYPE_CHECKING:
    from optuna.study import Study as OptunaStudy
    from optuna.trial import FrozenTrial, Trial

__all__ = ["OptunaSession"]

_STATES: Mapping[str, TrialState] = {
    "COMPLETE": "complete",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "running",
}
_ID = "id"  # of the study: its name and its file may be those of a study that was deleted
_ATTEMPTS = 3  # values with which the machine runs out of memory end their process every time
_DIED = f"its process has ended {_ATTEMPTS} times with these values"
_TRIALS_PER_FIELD = 5  # fewer complete ones say little about the importance of a field


class OptunaSession:
    """Asks Optuna for the values of trials and tells it the outcomes; in process 0 only.

    Args:
        distributions: The distribution of each field by path.
        trials: Number of trials after which the study has ended: complete and pruned ones, those
            of earlier starts and of other processes included.
        storage: As for :func:`~lightning_bigopt.tuning.optuna_storage.make_storage`.
        name: Name of the study in the storage.
        direction: ``"minimize"`` or ``"maximize"``.
        sampler: As for :func:`make_sampler`.
        pruner: As for :func:`make_pruner`.
        seed: Seed of the study.

    Attributes:
        study: The study of Optuna.
    """

    def __init__(
        self,
        *,
        distributions: Mapping[str, Any],
        trials: int,
        storage: Any,
        name: str,
        direction: Direction,
        sampler: Any,
        pruner: Any,
        seed: int,
    ) -> None:
        self.distributions, self.trials = dict(distributions), trials
        self._asked: dict[int, Trial] = {}
        self._has_ended = False
        self.study: OptunaStudy = open_study(
            storage,
            sampler=make_sampler(
                sampler, seed=seed, all_trials=lambda: self.study.get_trials(deepcopy=False)
            ),
            pruner=make_pruner(pruner),
            study_name=name,
            direction=direction,
        )
        # A sampler of a finite grid calls it after its last point; Optuna's own raises outside of
        # Study.optimize.
        self.study.stop = self._stop  # type: ignore[method-assign]
        self._check_storage(direction)
        if _ID not in self.study.user_attrs:
            self.study.set_user_attr(_ID, token_hex(8))

    def _check_storage(self, direction: str) -> None:
        """Raises if the study in the storage is another one."""
        name, kept = self.study.study_name, self.study.direction.name.lower()
        if kept != direction:
            raise ValueError(
                f"direction must be that of the study in the storage, got {direction!r} for "
                f"{name!r}, which was made with {kept!r}; pass another name="
            )
        trials, own = self.study.get_trials(deepcopy=False), set(self.distributions)
        paths = {path for trial in trials for path in trial.params}
        # A process may have ended while it drew the values of a trial.
        has_all = any(trial.state.name in ("COMPLETE", "PRUNED") for trial in trials)
        if paths - own or (has_all and paths != own):
            raise ValueError(
                "space must have the paths of the study in the storage, got "
                f"{sorted(self.distributions)} for {name!r}, which was made with {sorted(paths)}; "
                "pass another name="
            )
        self._check_ranges()

    def _check_ranges(self) -> None:
        """Raises if the trials in the storage were drawn from other ranges."""
        for trial in self.study.get_trials(deepcopy=False):
            for path, stored in trial.distributions.items():
                if stored != self.distributions[path]:
                    raise ValueError(
                        f"space must be that of the stored study {self.study.study_name!r}, which "
                        f"has {stored} for {path!r}, got {self.distributions[path]}; pass another "
                        "name= or storage="
                    )

    def _stop(self) -> None:
        self._has_ended = True

    def ask(self) -> Trial | None:
        """Returns the next trial, or None if there are enough finished and running ones."""
        from optuna.trial import TrialState

        if self._has_ended:
            return None
        self.repeat_dead_trials()
        discarded, trials = self._discarded(), self.study.get_trials(deepcopy=False)
        states = [trial.state.name for trial in trials if trial.number not in discarded]
        if sum(state in ("COMPLETE", "PRUNED", "RUNNING") for state in states) >= self.trials:
            return None
        trial = self._next_trial()
        try:
            # First: a trial of which no process is known would count as running for ever.
            for key, value in _this_process().items():
                trial.set_user_attr(key, value)
            for path, distribution in self.distributions.items():
                suggest(trial, path, distribution)
        except BaseException:
            trial.set_user_attr(NOT_DRAWN, value=True)
            self.study.tell(trial.number, state=TrialState.FAIL)
            raise
        self._asked[trial.number] = trial
        return trial

    def _next_trial(self) -> Trial:
        """Asks Optuna for a trial, which fails if the sampler raises; Optuna leaves it running."""
        from optuna.trial import TrialState

        known = {trial.number for trial in self.study.get_trials(deepcopy=False)}
        try:
            return self.study.ask()
        except BaseException:
            for trial in self.study.get_trials(deepcopy=False):
                is_new = trial.number not in known and "pid" not in trial.user_attrs
                if is_new and trial.state == TrialState.RUNNING:
                    self.study.tell(trial.number, state=TrialState.FAIL)
            raise

    def folder_name(self, trial: Trial) -> str:
        """Returns a name that only a trial and its repetitions have."""
        first = trial.user_attrs.get(FIRST, trial.number)
        return f"{self.study.user_attrs[_ID]}-{first}"

    def has_trained(self) -> bool:
        """Returns whether any trial has trained an update."""
        trials = self.study.get_trials(deepcopy=False)
        return any(trial.user_attrs.get("updates", 0) for trial in trials)

    def discard_refused(self) -> None:
        """Lets no trial count if all were refused for one reason: their values are not it."""
        trials = self.study.get_trials(deepcopy=False)
        ended = [trial for trial in trials if trial.state.name not in ("FAIL", "WAITING")]
        reasons = {str(trial.user_attrs.get("reason", "")) for trial in ended}
        if len(reasons) == 1 and reasons.pop().startswith("refused: "):
            # The state of a trial that has ended cannot be changed.
            self.study.set_user_attr("discarded", [trial.number for trial in ended])

    def _discarded(self) -> set[int]:
        return set(self.study.user_attrs.get("discarded", ()))

    def repeat_dead_trials(self) -> None:
        """Marks the trials whose process has died as failed; their values are tried again first."""
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING" and _is_dead(trial.user_attrs):
                self.repeat(trial.number, reason="its process has ended")

    def repeat(self, number: int, *, reason: str) -> None:
        """Marks a trial as failed, and lets its values be tried again before all others.

        Values that have ended their process three times are not tried again.

        Args:
            number: Number of the trial.
            reason: Why it has failed.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        self._asked.pop(number, None)
        try:
            trial = self.study.tell(number, state=TrialState.FAIL)
        except (ValueError, UpdateFinishedTrialError):
            return  # another process has found it at the same time, and repeats it
        attempts = int(trial.user_attrs.get("attempts", 0)) + 1
        if attempts < _ATTEMPTS:
            attributes = {
                FIRST: trial.user_attrs.get(FIRST, number),
                REPEATS: number,
                "repeats_because": reason,
                "attempts": attempts,
            }
            # Values of a trial that has ended while it drew them are all drawn again.
            values = trial.params if trial.params.keys() == self.distributions.keys() else {}
            self.study.enqueue_trial(values, user_attrs=attributes)

    def tell(self, number: int, outcome: Outcome) -> None:
        """Records the outcome of a trial of this process.

        Args:
            number: Number of the trial.
            outcome: How it has ended.
        """
        from optuna.trial import TrialState

        trial = self._asked.pop(number)
        trial.set_user_attr("updates", outcome.updates)
        trial.set_user_attr("updates_saved", outcome.updates_saved)
        if outcome.state == "complete":
            self.study.tell(number, outcome.loss)
            return
        trial.set_user_attr("reason", outcome.reason)
        self.study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """Records that a trial of this process has failed by an error of the user's code."""
        from optuna.trial import TrialState

        self._asked.pop(number).set_user_attr("reason", reason)
        self.study.tell(number, state=TrialState.FAIL)

    def records(self) -> Iterator[StudyTrial]:
        """Returns all trials as plain data, without those that were repeated or wait."""
        all_trials = self.study.get_trials(deepcopy=False)
        discarded = self._discarded()
        repeated = {trial.user_attrs.get(REPEATS) for trial in all_trials}
        for trial in all_trials:
            state = _STATES.get("FAIL" if trial.number in discarded else trial.state.name)
            if state is None or trial.number in repeated:
                continue
            attributes, ended = trial.user_attrs, trial.datetime_complete
            begun = trial.datetime_start
            yield StudyTrial(
                number=trial.number,
                state=state,
                values=trial.params,
                loss=trial.value if _was_compared(trial) else None,
                reason=attributes.get("reason", "" if state != "failed" else _DIED),
                updates=attributes.get("updates", 0),
                updates_saved=attributes.get("updates_saved", 0),
                seconds=0.0 if ended is None or begun is None else (ended - begun).total_seconds(),
                curve=tuple(sorted(trial.intermediate_values.items())),
            )

    def importance(self) -> dict[str, float] | None:
        """Returns the share of each field in the variance; None with too few complete trials."""
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        complete = [t for t in self.study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
        searched = [n for n, d in self.distributions.items() if not d.single()]
        if len(complete) < _TRIALS_PER_FIELD * len(searched) or not searched:
            return None
        if len({trial.value for trial in complete}) == 1:
            return None  # every trial has the same loss
        return dict(
            get_param_importances(
                self.study, evaluator=PedAnovaImportanceEvaluator(), params=searched
            )
        )


def _was_compared(trial: FrozenTrial) -> bool:
    """Returns whether the last value of a trial says how good it is; not if it has diverged."""
    reason = str(trial.user_attrs.get("reason", ""))
    return trial.state.name != "PRUNED" or not reason or reason.startswith("the pruner")


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def _is_dead(attributes: Mapping[str, Any]) -> bool:
    """Returns whether the process of a trial has ended; False if it ran on another machine."""
    if attributes.get("host") != socket.gethostname() or "pid" not in attributes:
        return False
    pid = int(attributes["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it exists, and belongs to another user
        return False
    # The number of a process that has ended may be given to another one.
    return bool(attributes.get("started") != _start_of(pid))


def _start_of(pid: int) -> str:
    """Returns when a process was started, in ticks since the boot; "" where that is unknown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    state, *rest = text.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]  # a dead one of which its parent knows nothing yet
