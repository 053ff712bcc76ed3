"""Who has already handed an event over."""

from __future__ import annotations

__all__ = ["Rounds"]


class Rounds:
    """Finds the first caller of an event; the others of the same round find it done.

    A new round of an event begins when a caller that has already called comes again, which needs no
    counter of Lightning's and holds for manual optimization, several optimizers and closures that
    run more than once.

    Example:
        >>> rounds, one, other = Rounds(), "one", "other"
        >>> [rounds.is_first("step", caller) for caller in (one, other, one, other)]
        [True, False, True, False]
    """

    def __init__(self) -> None:
        self._callers: dict[str, set[int]] = {}

    def is_first(self, event: str, caller: object) -> bool:
        """Whether nobody has handed this event over before; asked at every hook."""
        callers = self._callers.get(event)
        if callers is None:
            callers = self._callers[event] = set()
        caller_id = id(caller)
        if caller_id in callers:
            callers.clear()
        first = not callers
        callers.add(caller_id)
        return first

    def forget(self, *events: str) -> None:
        """Begins new rounds: there may be other callers."""
        for event in events:
            self._callers.pop(event, None)
