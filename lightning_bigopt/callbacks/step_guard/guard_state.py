"""The state of StepGuard: histories of the detectors, counts of rejections, backoff levels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_bigopt.gradients.actions import Backoff
from lightning_bigopt.gradients.detectors import NormSpike
from lightning_bigopt.gradients.guard import Detector, DetectorState

__all__ = ["GuardState"]


class GuardState:
    """Histories and counts for each optimizer, and the level of each backoff, as plain numbers.

    Args:
        detectors: The detectors.
        backoffs: The backoffs of the learning rate.
    """

    def __init__(self, detectors: Sequence[Detector], backoffs: Sequence[Backoff]) -> None:
        self._detectors, self._backoffs = tuple(detectors), tuple(backoffs)
        self._keys = _numbered([type(detector).__name__ for detector in detectors])
        self.reset()

    def reset(self) -> None:
        """Clears all histories, counts and levels."""
        self._guarded: dict[str, dict[str, Any]] = {}
        self._levels = [backoff.initial_state() for backoff in self._backoffs]

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

    def apply_backoffs(self, value: float) -> float:
        """Multiplies a learning rate by the levels of all backoffs."""
        for state in self._levels:
            value *= state["level"]
        return value

    # ------------------------------------------------------------------------------- counts

    def total(self, count: str) -> int:
        """Sums a count over all optimizers: ``"rejected"`` or ``"skipped"``."""
        return sum(record[count] for record in self._guarded.values())

    def detected(self, detector: str) -> int:
        """Returns the number of rejections by a detector, over all optimizers."""
        return sum(record["detected"].get(detector, 0) for record in self._guarded.values())

    # -------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Returns the records by optimizer, and the level of each backoff."""
        return {"guarded": copy.deepcopy(self._guarded), "backoffs": copy.deepcopy(self._levels)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state from a checkpoint.

        A detector that is not in the checkpoint starts with an empty history. If the number of
        backoffs differs, all start at level 1.
        """
        self.reset()
        for label, saved in state["guarded"].items():
            fresh = self._new_record()
            known = {k: v for k, v in saved["detectors"].items() if k in fresh["detectors"]}
            detectors = {**fresh["detectors"], **copy.deepcopy(known)}
            self._guarded[label] = {**fresh, **saved, "detectors": detectors}
        if len(state["backoffs"]) == len(self._levels):
            self._levels = copy.deepcopy(state["backoffs"])


def _numbered(names: Sequence[str]) -> list[str]:
    """Makes names unique: repetitions of a name get the suffixes ``-1``, ``-2``, …."""
    return [
        f"{name}-{names[:index].count(name)}" if name in names[:index] else name
        for index, name in enumerate(names)
    ]
