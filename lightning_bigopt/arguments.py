"""Explains constructor calls with wrong arguments, and specifications used as callbacks."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

from lightning_bigopt.argument_hints import HINTS
from lightning_bigopt.checks import shown

__all__ = ["Specification", "explain_arguments"]

ClassT = TypeVar("ClassT", bound=type)


def explain_arguments(cls: ClassT) -> ClassT:
    """Makes a class explain unknown and surplus arguments of its constructor.

    For an argument of another library the message gives the hint in :data:`HINTS`, for a misspelled
    one the most similar argument of the class.

    Example:
        >>> @explain_arguments
        ... class Step:
        ...     def __init__(self, *, decay=0.1):
        ...         self.decay = decay
        >>> Step(deacy=0.5)
        Traceback (most recent call last):
        TypeError: the arguments of Step must be among decay, got deacy=0.5; did you mean decay?
    """
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]
    _, *parameters = inspect.signature(init).parameters.values()
    named = [p.name for p in parameters]
    positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) > positional or not kwargs.keys() <= set(named):
            _raise(type(self), args[positional:], kwargs, named, named[positional:])
        init(self, *args, **kwargs)

    cls.__init__ = checked_init  # type: ignore[misc]
    return cls


def _raise(
    cls: type,
    surplus: tuple[object, ...],
    keywords: Mapping[str, object],
    named: list[str],
    keyword_only: list[str],
) -> NoReturn:
    """Raises the error for surplus positional arguments, or for the first unknown keyword."""
    listed = ", ".join(named)
    allowed = f"must be among {listed}" if named else "must be none"
    for name, value in keywords.items():
        if name in named:
            continue
        advice = next((hint.text for hint in HINTS if hint.fits(cls, name, named)), None)
        if advice is not None:
            advice = advice.format(value=shown(value), cls=cls.__name__)
        elif similar := difflib.get_close_matches(name, named, n=1, cutoff=0.6):
            advice = f"did you mean {similar[0]}?"
        raise TypeError(
            f"the arguments of {cls.__name__} {allowed}, got {name}={shown(value)}"
            f"{f'; {advice}' if advice else ''}"
        )
    free = next((name for name in keyword_only if name not in keywords), None)
    written = f"{cls.__name__}({free}={shown(surplus[0])})" if free else ""
    raise TypeError(
        f"the arguments of {cls.__name__} {allowed}, got {shown(surplus[0])} without a name"
        f"{f'; name it, for example {written}' if written else ''}"
    )


class Specification:
    """Base class of immutable specifications: schedules, clipping rules, policies and detectors.

    Attributes:
        _used_in: The expression that uses the specification, with ``{}`` in its place; shown if the
            specification itself is passed to the Trainer as a callback.
    """

    _used_in: ClassVar[str]

    if not TYPE_CHECKING:  # for type checkers, an unknown attribute stays an error

        def __getattr__(self, name: str) -> Any:
            if name in _CALLBACK_NAMES or name.startswith("on_"):
                raise AttributeError(
                    f"callbacks must contain callbacks, got {self!r}; write "
                    f"{self._used_in.format(repr(self))}"
                )
            if inspect.getattr_static(type(self), name, None) is not None:
                return object.__getattribute__(self, name)  # raises the error of a property again
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


# The attributes of a callback that Lightning reads first, besides its hooks on_...
_CALLBACK_NAMES = frozenset({"setup", "state_dict", "state_key", "load_state_dict", "teardown"})
