"""The base class of the callbacks of this package, which adds the engine to the Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from lightning_bigopt.engine.engine import Engine
from lightning_bigopt.engine.fit_setup import check_version
from lightning_bigopt.engine.stage import Stages
from lightning_bigopt.fabric_hooks import TrainerOnly
from lightning_bigopt.removed import RemovedAttribute
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Capability"]

_Setup = Callable[[Any, "Trainer", "LightningModule", str], None]
_ADDS_ENGINE: set[object] = set()  # the setup functions that already add the engine


class Capability(TrainerOnly, Stages, Callback):
    """A callback that implements stages of a fit.

    A capability implements stages (:class:`~lightning_bigopt.engine.stage.Stages`) instead of
    Lightning's hooks for batches. The engine has those hooks; the first capability adds it to the
    Trainer's callbacks, directly after itself. A subclass may override any hook of Lightning, with
    or without calling ``super()``. It must set :attr:`owns` and :attr:`rank`; ``setup`` raises a
    ValueError otherwise.
    """

    version = 2

    def __init_subclass__(cls, **options: Any) -> None:
        """Wraps ``setup`` of a subclass, so that it adds the engine even without ``super()``."""
        super().__init_subclass__(**options)
        # Not only methods in the body of the class: cls.setup may also come from a mixin of the
        # user that precedes this class in the method resolution order. A setup that is wrapped
        # already, such as one inherited from another capability, is left unchanged.
        if cls.setup not in _ADDS_ENGINE:
            cls.setup = _adding_engine(cls.setup)  # type: ignore[method-assign, assignment]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adds the engine to the Trainer's callbacks, unless they contain one."""
        _add_engine(trainer, self)

    _ADDS_ENGINE.add(setup)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state after the last update that ``global_step`` counts.

        Subclasses override :meth:`saved_state` instead of this method.
        """
        # At a resume LearningRateFinder and BatchSizeFinder save a checkpoint before training
        # starts: the loaded state has not been applied yet, and must be saved unchanged.
        loaded = vars(self).get("_loaded_state")
        if loaded is not None:
            return dict(loaded)
        if self.fit is not None:
            self.fit.finish_batch()
        return {"version": self.version, **self.saved_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stores the state of a checkpoint until training starts; applies it at once after that.

        Raises:
            ValueError: If the state has an unknown version.
        """
        # Not applied here: Lightning's finders load their own checkpoint after a trial, sometimes
        # without training afterwards, and FSDP loads callback states after on_fit_start.
        check_version(type(self).__name__, state_dict, (1, self.version))
        vars(self)["_loaded_state"] = dict(state_dict)
        if self.fit is not None and self.fit.has_started:
            loaded = self.take_loaded_state()
            assert loaded is not None  # stored above
            self.load_saved_state(loaded)

    def take_loaded_state(self) -> dict[str, Any] | None:
        """Returns the loaded state that has not been applied yet, and clears it."""
        loaded: dict[str, Any] | None = vars(self).pop("_loaded_state", None)
        if loaded is not None:
            loaded.pop("version")
        return loaded

    controller = RemovedAttribute(
        "0.2",
        "write callback.x instead of callback.controller.x, and callback.saved_state() instead of "
        "callback.controller.state_dict()",
    )

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles must not contain the Trainer, nor the bound methods of the module that
        # Lightning sets on every callback as log and log_dict.
        # ``run`` is kept: a copy in another Trainer is reset, like the original would be.
        excluded = ("fit", "log", "log_dict")
        return {name: value for name, value in vars(self).items() if name not in excluded}


def _adding_engine(setup: _Setup) -> _Setup:
    """Wraps a ``setup`` function so that it adds the engine first."""

    @functools.wraps(setup)
    def add_and_setup(
        self: Capability, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        _add_engine(trainer, self)
        setup(self, trainer, pl_module, stage)

    _ADDS_ENGINE.add(add_and_setup)
    return add_and_setup


def _add_engine(trainer: Trainer, capability: Capability) -> None:
    for name, example in (("owns", '"my statistics"'), ("rank", "90")):
        if not hasattr(capability, name):
            raise ValueError(
                f"{name} must be an attribute of every capability, got none in "
                f"{type(capability).__name__}; write {name} = {example} in the class"
            )
    callbacks = trainer_callbacks.callbacks_of(trainer)
    engine = trainer_callbacks.find_callback(trainer, Engine)
    is_listed = any(callback is capability for callback in callbacks)
    if engine is None:
        engine = Engine()
        if is_listed:
            # Lightning is iterating over this list: it calls setup of the inserted engine next.
            place = next(i for i, callback in enumerate(callbacks) if callback is capability) + 1
        else:
            # A callback of the user calls the hooks of this capability. Checkpoint callbacks stay
            # last, so that they save the state after an update.
            place = trainer_callbacks.first_checkpoint_callback(trainer)
        callbacks.insert(place, engine)
    if not is_listed:
        engine.add_unlisted(capability)
