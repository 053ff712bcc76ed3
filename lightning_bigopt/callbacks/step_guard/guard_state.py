"""The state of StepGuard: histories of the detectors, counts of rejections, backoff levels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_bigopt.callbacks.resume_report import report_changed_settings
from lightning_bigopt.checks import as_code
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.gradients.actions import Action, Backoff
from lightning_bigopt.gradients.detectors import NormSpike
from lightning_bigopt.gradients.guard import Detector, DetectorState
from lightning_bigopt.gradients.roll_back import RollBack

__all__ = ["GuardState"]


class GuardState:
    """Histories and counts for each optimizer, and the level of each backoff, as plain numbers.

    Args:
        detectors: The detectors.
        actions: The actions; those that are backoffs of the learning rate have a level.
        roll_back: The RollBack, whose changes are reported.
    """

    def __init__(
        self,
        detectors: Sequence[Detector],
        actions: Sequence[Action],
        roll_back: RollBack | None = None,
    ) -> None:
        self._detectors, self._actions = tuple(detectors), tuple(actions)
        self._roll_back = roll_back
        self._backoffs = [action for action in actions if isinstance(action, Backoff)]
        self._keys = _numbered([type(detector).__name__ for detector in detectors])
        self.reset()

    def reset(self) -> None:
        """Clears all histories, counts and levels."""
        self._guarded: dict[str, dict[str, Any]] = {}
        self._levels = [backoff.initial_state() for backoff in self._backoffs]
        self._saved_settings: dict[str, list[str]] | None = None

    @property
    def has_backoffs(self) -> bool:
        """Whether an action lowers the learning rate."""
        return bool(self._backoffs)

    def of_optimizer(self, label: str) -> dict[str, Any]:
        """Returns the record of one optimizer; it is created on first use."""
        if label not in self._guarded:
            self._guarded[label] = self._new_record()
        return self._guarded[label]

    def histories(self, record: Mapping[str, Any]) -> list[DetectorState]:
        """Returns the histories of a record, in the order of the detectors."""
        return [record["detectors"][key] for key in self._keys]

    def typical_norm(self, record: Mapping[str, Any], norm: float) -> float | None:
        """Returns the typical norm of the first NormSpike that rejects a norm; None without one."""
        for detector, state in zip(self._detectors, self.histories(record), strict=True):
            if isinstance(detector, NormSpike) and detector.check(norm, state) is not None:
                return detector.typical(state)
        return None

    def _new_record(self) -> dict[str, Any]:
        states = (detector.initial_state() for detector in self._detectors)
        return {
            "detectors": dict(zip(self._keys, states, strict=True)),
            "consecutive": 0,
            "overflows": 0,
            "rejected": 0,
            "skipped": 0,
            "detected": {},
            "checkpoint": None,
        }

    # ----------------------------------------------------------------------------- backoffs

    def lower_learning_rate(self) -> None:
        """Lowers the level of every backoff, after a rejection."""
        for backoff, state in zip(self._backoffs, self._levels, strict=True):
            backoff.reject(state)

    def recover_learning_rate(self) -> None:
        """Raises the level of every backoff, after an accepted update."""
        for backoff, state in zip(self._backoffs, self._levels, strict=True):
            backoff.accept(state)

    def apply_backoffs(self, value: float, progress: Progress) -> float:
        """Multiplies a learning rate by the levels of all backoffs; independent of the progress."""
        for state in self._levels:
            value *= state["level"]
        return value

    # ------------------------------------------------------------------------------- counts

    def count_rejection(self, guarded: dict[str, Any], detector: str) -> None:
        """Counts a rejection of an optimizer's update: in total, in a row and by detector."""
        guarded["consecutive"] += 1
        guarded["rejected"] += 1
        guarded["detected"][detector] = guarded["detected"].get(detector, 0) + 1

    def total(self, count: str) -> int:
        """Sums a count over all optimizers: ``"rejected"`` or ``"skipped"``."""
        return sum(record[count] for record in self._guarded.values())

    def detected(self, detector: str) -> int:
        """Returns the number of rejections by a detector, over all optimizers."""
        return sum(record["detected"].get(detector, 0) for record in self._guarded.values())

    # -------------------------------------------------------------------------------- state

    def report_changes(self) -> None:
        """Logs changes of detectors, actions and RollBack since the checkpoint, once."""
        saved, self._saved_settings = self._saved_settings, None
        report_changed_settings(_joined(saved or {}), _joined(self._settings()))

    def _settings(self) -> dict[str, list[str]]:
        return {
            "detectors": [as_code(detector) for detector in self._detectors],
            "actions": [as_code(action) for action in self._actions],
            "roll_back": [] if self._roll_back is None else [as_code(self._roll_back)],
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns the records by optimizer, the level of each backoff, and the settings as code."""
        return {
            "guarded": copy.deepcopy(self._guarded),
            "backoffs": copy.deepcopy(self._levels),
            "settings": self._settings(),
        }

    def rewind(self, state: dict[str, Any]) -> None:
        """Restores the state of this fit before a rollback; the counts of rejections go on."""
        counts = {
            label: {name: record[name] for name in ("rejected", "skipped", "detected")}
            for label, record in self._guarded.items()
        }
        self.load_state_dict(state)
        self._saved_settings = None
        for label, kept in counts.items():
            self.of_optimizer(label).update(kept)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state from a checkpoint.

        A detector gets the history of the equal detector in the checkpoint. If there is none, its
        :meth:`~Detector.carry_over` gets that of the same class. A detector of another class starts
        with an empty history. The rejections of a class are counted again from 0 if one of its
        detectors has changed. If the backoffs differ, all start at level 1.
        """
        self.reset()
        self._saved_settings = saved = state.get("settings")
        settings = self._settings()
        for label, record in state["guarded"].items():
            keys = list(record["detectors"])
            # Earlier versions did not save the arguments: detectors of the same key count as equal.
            before, used = keys, self._keys
            if saved is not None:
                before, used = saved["detectors"], settings["detectors"]
            codes = dict(zip(keys, before, strict=True))
            self._guarded[label] = self._loaded_record(record, codes, used)
        same = saved is None or _backoffs(saved["actions"]) == _backoffs(settings["actions"])
        if same and len(state["backoffs"]) == len(self._levels):
            self._levels = copy.deepcopy(state["backoffs"])

    def _loaded_record(
        self, saved: Mapping[str, Any], before: Mapping[str, str], used: Sequence[str]
    ) -> dict[str, Any]:
        """Returns the record of an optimizer from a checkpoint.

        Args:
            saved: The record in the checkpoint.
            before: The detectors of the checkpoint as code, by their key in the record.
            used: The detectors of this fit as code.
        """
        record = {**self._new_record(), **copy.deepcopy(dict(saved))}
        states, unused = record["detectors"], dict(before)
        histories: dict[str, DetectorState] = {}
        changed: set[str] = set()
        # Equal detectors first, so that no changed detector gets one of their histories.
        for key, code in zip(self._keys, used, strict=True):
            source = next((name for name, other in unused.items() if other == code), None)
            if source is not None:
                histories[key] = states[source]
                del unused[source]
        for key, detector in zip(self._keys, self._detectors, strict=True):
            if key in histories:
                continue
            kind = type(detector).__name__
            changed.add(kind)
            source = next((name for name in unused if _class_of(name) == kind), None)
            if source is None:
                histories[key] = detector.initial_state()
            else:
                histories[key] = detector.carry_over(states[source])
                del unused[source]
        record["detectors"] = {key: histories[key] for key in self._keys}
        record["detected"] = {k: n for k, n in record["detected"].items() if k not in changed}
        return record


def _class_of(key: str) -> str:
    """Returns the class name in a key that :func:`_numbered` has made."""
    return key.split("-", maxsplit=1)[0]


def _backoffs(actions: Sequence[str]) -> list[str]:
    return [action for action in actions if action.startswith(f"{Backoff.__name__}(")]


def _joined(settings: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {f"step guard {name}": ", ".join(codes) for name, codes in settings.items()}


def _numbered(names: Sequence[str]) -> list[str]:
    """Makes names unique: repetitions of a name get the suffixes ``-1``, ``-2``, …."""
    return [
        f"{name}-{names[:index].count(name)}" if name in names[:index] else name
        for index, name in enumerate(names)
    ]
