"""How a module owns a capability: it brings the callback through ``configure_callbacks``.

Lightning attaches a module's callbacks before anything is set up, calls every hook of theirs
(``on_exception`` included, which modules do not have) and saves their state. A mixin so drives the
very code of the callback, and trains to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from lightning_bigopt import trainer_access
from lightning_bigopt.callbacks.base import OptimizationCallback

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule

    _Module = LightningModule
else:
    _Module = object

__all__ = ["OwnedCallbackMixin"]


class OwnedCallbackMixin(_Module):
    """Brings a callback for every mixin among the bases.

    Attributes:
        owns: The callback's class, and the hook in which the module says what it wants: the
            callback's first argument, or the whole callback.
    """

    owns: ClassVar[tuple[type[OptimizationCallback], str]]

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Adds the owned callbacks to those of the other bases."""
        others = super().configure_callbacks()
        others = list(others) if isinstance(others, Sequence) else [others]
        return [*others, *(self._owned(kind, hook) for kind, hook in self._owns())]

    def on_fit_start(self) -> None:
        """Refuses to train where an overridden ``configure_callbacks`` left a callback out."""
        super().on_fit_start()
        for kind, _ in self._owns():
            if not any(
                isinstance(callback, kind) for callback in trainer_access.callbacks_of(self.trainer)
            ):
                raise RuntimeError(
                    f"configure_callbacks of {type(self).__name__} must keep the {kind.__name__} "
                    "of its mixin, got a list without it; return "
                    "[*super().configure_callbacks(), ...]"
                )

    def _owns(self) -> Iterator[tuple[type[OptimizationCallback], str]]:
        for base in type(self).__mro__:
            if "owns" in base.__dict__:
                yield base.__dict__["owns"]

    def _owned(self, kind: type[OptimizationCallback], hook: str) -> OptimizationCallback:
        """The module's callback of a class, built at the first fit and kept for the next."""
        owned: dict[type, OptimizationCallback] = self.__dict__.setdefault("_bigopt_callbacks", {})
        mine = owned.get(kind)
        if any(
            isinstance(c, kind) and c is not mine for c in trainer_access.callbacks_of(self.trainer)
        ):
            raise ValueError(
                f"callbacks must not hold {kind.__name__} where the module owns one, got both; "
                f"remove the callback, or the mixin of {type(self).__name__}"
            )
        if mine is None:
            wanted = getattr(self, hook)()
            mine = owned[kind] = wanted if isinstance(wanted, kind) else kind(wanted)
        return mine
