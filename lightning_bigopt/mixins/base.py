"""The base class of the mixins: it returns callbacks from ``configure_callbacks``.

Lightning attaches a module's callbacks before setup, calls all their hooks (including
``on_exception``, which modules do not have) and saves their state. A mixin therefore runs the code
of its callback and gives the same results bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule

    _Module = LightningModule
else:
    _Module = object

__all__ = ["OwnedCallbackMixin"]

_FROM_MODULE = "_brought_by_module"


class OwnedCallbackMixin(_Module):
    """Adds one callback for each mixin among the base classes of a module.

    Attributes:
        owns: Class of the callback, and name of the module's method that returns either the
            callback or its first argument.
    """

    owns: ClassVar[tuple[type[Capability], str]]

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Returns the callbacks of the mixins and of the other base classes."""
        others = super().configure_callbacks()
        others = list(others) if isinstance(others, Sequence) else [others]
        return [*others, *(self._owned_callback(kind, hook) for kind, hook in self._owns())]

    def on_fit_start(self) -> None:
        """Checks that an overridden ``configure_callbacks`` returned the callbacks of the mixins.

        Raises:
            RuntimeError: If a callback is missing.
        """
        super().on_fit_start()
        for kind, _ in self._owns():
            if not any(
                isinstance(callback, kind)
                for callback in trainer_callbacks.callbacks_of(self.trainer)
            ):
                raise RuntimeError(
                    f"configure_callbacks of {type(self).__name__} must keep the {kind.__name__} "
                    "of its mixin, got a list without it; return "
                    "[*super().configure_callbacks(), ...]"
                )

    def _owns(self) -> Iterator[tuple[type[Capability], str]]:
        for base in type(self).__mro__:
            if "owns" in base.__dict__:
                yield base.__dict__["owns"]

    def _owned_callback(self, kind: type[Any], hook: str) -> Capability:
        """Returns the module's callback of a class; it is made once and used in every fit."""
        # Made on first use: the mixins need no __init__, which a module might not call.
        cache: dict[type, Capability] = self.__dict__.setdefault("_bigopt_callbacks", {})
        owned = cache.get(kind)
        callbacks = trainer_callbacks.callbacks_of(self.trainer)
        # A marked callback belongs to the module of an earlier fit. Lightning replaces it by that
        # of the new module, because both have the same class.
        others = [c for c in callbacks if isinstance(c, kind) and not hasattr(c, _FROM_MODULE)]
        if any(other is not owned for other in others):
            raise ValueError(
                f"callbacks must not contain {kind.__name__} if a mixin of the module adds one, "
                f"got both; remove the callback, or the mixin of {type(self).__name__}"
            )
        if owned is None:
            value = getattr(self, hook)()
            owned = cache[kind] = value if isinstance(value, kind) else kind(value)
            setattr(owned, _FROM_MODULE, True)
        return owned
