"""Explains constructor calls with wrong arguments, and specifications used as callbacks."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from numbers import Number
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from lightning_bigopt.argument_hints import EXAMPLES, HINTS
from lightning_bigopt.checks import shown
from lightning_bigopt.config_values import check_convertible, python_value
from lightning_bigopt.fabric_hooks import fabric_error

__all__ = ["Specification", "explain_arguments", "record_arguments", "recorded_arguments"]

ClassT = TypeVar("ClassT", bound=type)


def explain_arguments(cls: ClassT) -> ClassT:
    """Makes a class explain unknown and surplus arguments of its constructor.

    NumPy scalars are converted to Python numbers: results would have their precision otherwise.
    Lists and dictionaries of omegaconf, which Hydra passes, are converted to those of Python.
    For an argument of another library the message gives the hint in :data:`HINTS`, for a misspelled
    one the most similar argument of the class. :func:`recorded_arguments` returns the arguments of
    a callback.

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
    names = [p.name for p in parameters]
    positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    is_callback = hasattr(cls, "setup") and hasattr(cls, "teardown")
    required = {p.name for p in parameters if p.default is p.empty}

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) > positional or not kwargs.keys() <= set(names):
            raise _wrong_argument(type(self), names, args[positional:], kwargs)
        if missing := sorted(required - set(names[: len(args)]) - kwargs.keys()):
            got = ", ".join([*map(shown, args), *(f"{k}={shown(v)}" for k, v in kwargs.items())])
            raise TypeError(
                f"the arguments of {type(self).__name__} must contain {', '.join(missing)}, got "
                f"{got or 'none'}{_example(type(self))}"
            )
        keywords = {name: _plain(name, value) for name, value in kwargs.items()}
        values = tuple(map(_plain, names, args))
        # Not those that a subclass passes on.
        if is_callback and type(self).__init__ is checked_init:
            record_arguments(self, (), dict(zip(names, values, strict=False)) | keywords)
        init(self, *values, **keywords)

    cls.__init__ = checked_init  # type: ignore[misc]
    return cls


def record_arguments(made: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Stores the constructor arguments of an object, unless they are stored already.

    Args:
        made: The object.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    vars(made).setdefault("constructor_arguments", (args, dict(kwargs)))


def recorded_arguments(made: object) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Returns the constructor arguments of an object; None if they were not recorded.

    Args:
        made: The object.

    Example:
        >>> from lightning_bigopt import GradientNoiseScale
        >>> recorded_arguments(GradientNoiseScale(decay=0.9))
        ((), {'decay': 0.9})
    """
    found = getattr(made, "__dict__", {}).get("constructor_arguments")
    return None if found is None else (found[0], dict(found[1]))


def _plain(name: str, value: Any) -> Any:
    """Returns a NumPy scalar or an object of omegaconf as a value of Python, others unchanged."""
    is_numpy = type(value).__module__ == "numpy" and isinstance(value, Number)
    return value.item() if is_numpy else python_value(name, value)


def _wrong_argument(
    cls: type, names: list[str], surplus: tuple[object, ...], keywords: Mapping[str, object]
) -> TypeError:
    """Returns the error for surplus positional arguments, or for the first unknown keyword."""
    allowed = f"the arguments of {cls.__name__} must be "
    allowed += f"among {', '.join(names)}" if names else "none"
    unknown = next((name for name in keywords if name not in names), None)
    if unknown is not None:
        value = keywords[unknown]
        advice = _advice(cls, unknown, names, value)
        if not advice and (similar := difflib.get_close_matches(unknown, names, n=1)):
            advice = f"; did you mean {similar[0]}?"
        return TypeError(f"{allowed}, got {unknown}={shown(value)}{advice}")
    advice = _example(cls) or "; write the name of the argument before its value"
    if hasattr(surplus[0], "param_groups"):
        advice = "; remove it: the callback uses the optimizers of the Trainer"
    return TypeError(f"{allowed}, got {shown(surplus[0])} without a name{advice}")


def _example(cls: type) -> str:
    found = next((EXAMPLES[base.__name__] for base in cls.__mro__ if base.__name__ in EXAMPLES), "")
    return found and f"; write them as in {found}"


def _advice(cls: type, name: str, parameters: list[str], value: object = None) -> str:
    text = next((hint.text for hint in HINTS if hint.fits(cls, name, parameters)), None)
    return "" if text is None else "; " + text.format(value=shown(value), cls=cls.__name__)


class Specification:
    """Base class of immutable specifications: schedules, clipping rules, policies and detectors.

    Attributes:
        _used_in: The expression that uses the specification, with ``{}`` in its place; shown if the
            specification itself is passed to the Trainer as a callback.
    """

    _used_in: ClassVar[str]

    if not TYPE_CHECKING:  # for type checkers, an unknown attribute stays an error

        def __getattr__(self, name: str) -> Any:
            if name in ("on_after_setup", "on_after_optimizer_step"):
                # Not an AttributeError, which Fabric ignores.
                raise fabric_error(repr(self), [self._used_in.partition("(")[0]])
            if name in _CALLBACK_NAMES or name.startswith("on_"):
                raise AttributeError(
                    f"callbacks must contain Callback objects, got {self!r}; write "
                    f"{self._used_in.format(repr(self))}"
                )
            if name == "__args__":  # read by omegaconf before it puts a dataclass into a list
                check_convertible(self)
            if inspect.getattr_static(type(self), name, None) is not None:
                return object.__getattribute__(self, name)  # raises the error of a property again
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


# The attributes of a callback that Lightning reads first, besides its hooks on_...
_CALLBACK_NAMES = frozenset({"setup", "state_dict", "state_key", "load_state_dict", "teardown"})
