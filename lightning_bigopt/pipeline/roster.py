"""The controllers of one fit, in the order in which they act."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from lightning_bigopt.controllers.base import Controller

__all__ = ["Roster"]

ControllerT = TypeVar("ControllerT", bound=Controller)


class Roster:
    """Controllers by rank, at most one of a role; iterated over in that order.

    Example:
        >>> class Second(Controller):
        ...     role, rank = "second", 2
        >>> class First(Controller):
        ...     role, rank = "first", 1
        ...
        ...     def clip(self, step): ...
        >>> roster = Roster()
        >>> for controller in (Second(), First()):
        ...     roster.add(controller)
        >>> [controller.role for controller in roster]
        ['first', 'second']
        >>> [controller.role for controller in roster.doing("clip")]
        ['first']
    """

    def __init__(self) -> None:
        self._members: list[Controller] = []
        self._doing: dict[str, list[Controller]] = {}
        self._found: dict[type[Controller], Any] = {}

    def __iter__(self) -> Iterator[Controller]:
        return iter(self._members)

    def add(self, controller: Controller) -> None:
        """Gives a controller its place."""
        self._members.append(controller)
        self._members.sort(key=lambda c: c.rank)
        self._doing, self._found = {}, {}

    def refuse_twin(self, controller: Controller) -> None:
        """Refuses a second controller of one role.

        Raises:
            ValueError: If there is one of its role already.
        """
        twin = next((c for c in self._members if c.role == controller.role), None)
        if twin is not None and twin is not controller:
            raise ValueError(
                f"callbacks must hold at most one owner of the {controller.role}, got two; remove "
                "one of them (a mixin of the module counts as one)"
            )

    def find(self, kind: type[ControllerT]) -> ControllerT | None:
        """The controller of a class, where there is one; asked many times a step."""
        if kind not in self._found:
            self._found[kind] = next((c for c in self._members if isinstance(c, kind)), None)
        found: ControllerT | None = self._found[kind]
        return found

    def doing(self, hook: str) -> list[Controller]:
        """The controllers that do something in a hook; asked many times a step."""
        listeners = self._doing.get(hook)
        if listeners is None:
            listeners = self._doing[hook] = [
                controller
                for controller in self._members
                if getattr(type(controller), hook) is not getattr(Controller, hook)
            ]
        return listeners
