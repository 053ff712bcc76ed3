"""The base class of the mixins: it returns callbacks from ``configure_callbacks``.

Lightning attaches a module's callbacks before setup, calls all their hooks (including
``on_exception``, which modules do not have) and saves their state. A mixin therefore runs the code
of its callback and gives the same results bit for bit.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.fabric_hooks import fabric_error
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access.packages import classes

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule

    _Module = LightningModule
else:
    _Module = object

__all__ = ["OwnedCallbackMixin"]

_Configure = Callable[[Any], "Sequence[Callback] | Callback"]
_CHECKED: set[object] = set()  # the configure_callbacks functions that need no (further) check
_FROM_MODULE = "_brought_by_module"


class OwnedCallbackMixin(_Module):
    """Adds the callbacks of the mixins among the base classes of a module.

    Raises:
        TypeError: If a class lists LightningModule, or a subclass of it, before a mixin.

    Attributes:
        owns: Class of the callback, and name of the module's method that returns the callback,
            several callbacks of this class, or the callback's first argument.
    """

    owns: ClassVar[tuple[type[Capability], str]]

    def __init_subclass__(cls, **options: Any) -> None:
        """Checks the order of the base classes, and what ``configure_callbacks`` returns."""
        super().__init_subclass__(**options)
        _check_order(cls)
        # Not only methods in the body of the class: cls.configure_callbacks may also come from
        # another base class that precedes the mixin and does not call super().
        if cls.configure_callbacks not in _CHECKED:
            cls.configure_callbacks = _checking(cls.configure_callbacks)  # type: ignore[method-assign, assignment]

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Returns the callbacks of the mixins and of the other base classes."""
        owned = [callback for pair in self._owns() for callback in self._owned_callbacks(*pair)]
        return [*_as_list(super().configure_callbacks()), *owned]

    _CHECKED.add(configure_callbacks)

    def on_after_setup(self, **arguments: Any) -> None:
        """Raises in Fabric if the module will be trained: without a Trainer mixins do nothing."""
        if self.optimizers():  # none for evaluation
            bases = (base for kind, _ in self._owns() for base in kind.__mro__)
            raise fabric_error(type(self).__name__, [base.__name__ for base in bases])

    def _owns(self) -> Iterator[tuple[type[Capability], str]]:
        for base in type(self).__mro__:
            if "owns" in base.__dict__:
                yield base.__dict__["owns"]

    def _owned_callbacks(self, kind: type[Any], hook: str) -> list[Capability]:
        """Returns the module's callbacks of a class; they are made once and used in every fit."""
        # Made on first use: the mixins need no __init__, which a module might not call.
        cache: dict[type, list[Capability]] = self.__dict__.setdefault("_bigopt_callbacks", {})
        owned = cache.get(kind, [])
        callbacks = trainer_callbacks.callbacks_of(self.trainer)
        # A marked callback belongs to the module of an earlier fit. Lightning replaces it by that
        # of the new module, because both have the same class.
        others = [c for c in callbacks if isinstance(c, kind) and not hasattr(c, _FROM_MODULE)]
        if any(all(other is not mine for mine in owned) for other in others):
            raise ValueError(
                f"callbacks must not contain {kind.__name__} if a mixin of the module adds one, "
                f"got both; remove the callback, or the mixin of {type(self).__name__}"
            )
        if not owned:
            owned = cache[kind] = self._make_callbacks(kind, getattr(self, hook)())
            for callback in owned:
                setattr(callback, _FROM_MODULE, True)
        return owned

    def _make_callbacks(self, kind: type[Any], value: Any) -> list[Capability]:
        """Makes the callbacks from what the module's method returned."""
        return [value if isinstance(value, kind) else kind(value)]


def _check_order(cls: type[OwnedCallbackMixin]) -> None:
    """Raises if LightningModule precedes a mixin, whose ``configure_callbacks`` is never called."""
    modules = classes("LightningModule")
    after_module = itertools.dropwhile(lambda base: base not in modules, cls.__mro__)
    hidden = [base for base in after_module if "owns" in base.__dict__]
    if hidden:
        bases = sorted(cls.__bases__, key=lambda base: not issubclass(base, OwnedCallbackMixin))
        right = ", ".join(base.__name__ for base in bases)
        raise TypeError(
            f"the bases of {cls.__name__} must list {hidden[0].__name__} before LightningModule, "
            f"got the reverse order; write class {cls.__name__}({right})"
        )


def _checking(configure_callbacks: _Configure) -> _Configure:
    """Wraps ``configure_callbacks`` so that it raises if it leaves out a callback of a mixin."""

    @functools.wraps(configure_callbacks)
    def checked(self: OwnedCallbackMixin) -> Sequence[Callback] | Callback:
        callbacks = _as_list(configure_callbacks(self))
        for kind, _ in self._owns():
            if not any(isinstance(callback, kind) for callback in callbacks):
                raise RuntimeError(
                    f"configure_callbacks of {type(self).__name__} must keep the {kind.__name__} "
                    "of its mixin, got a list without it; return "
                    "[*super().configure_callbacks(), ...]"
                )
        return callbacks

    _CHECKED.add(checked)
    return checked


def _as_list(callbacks: Sequence[Callback] | Callback) -> list[Callback]:
    return list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
