"""The state of a capability: what a checkpoint saves, and what a rollback restores."""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = ["SavedState"]


class SavedState:
    """The methods through which the state of a capability is saved and restored.

    Attributes:
        changes_before_step: Whether the stages before the optimizer's step may change the state, so
            that a checkpoint within an update contains a part of it.
    """

    changes_before_step: ClassVar[bool] = True

    def take_loaded_state(self) -> dict[str, Any] | None:
        """Returns the loaded state that has not been applied yet, and clears it."""
        return None

    def settings_as_code(self) -> dict[str, str]:
        """Returns the arguments that must be equal on all processes, as code by name.

        Those in :meth:`~lightning_bigopt.engine.stage.Stages.specification` need not be repeated.
        """
        return {}

    def saved_state(self) -> dict[str, Any]:
        """Returns the state that training changes, as plain numbers, strings and tensors."""
        return {}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the result of :meth:`saved_state`; called before :meth:`start`."""

    def snapshot(self) -> dict[str, Any]:
        """Returns the state that :meth:`restore` needs."""
        return self.saved_state()

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Restores the state at the time of :meth:`snapshot`, within the same fit."""
        self.load_saved_state(snapshot)
