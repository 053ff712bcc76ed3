"""Starts the processes of a strategy once, for several Trainers that train one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_bigopt.trainer_access.packages import classes

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Processes"]

ValueT = TypeVar("ValueT")


class Processes:
    """The processes of a strategy, started and connected before the first fit.

    The launcher of a strategy such as ``ddp`` starts this script again for each further process,
    which runs up to this point. Later Trainers find the processes started and their group
    initialized. Under torchrun the processes exist, and are only connected.

    Args:
        trainer: A Trainer with the strategy of those to come; it is not used for a fit.

    Raises:
        ValueError: If the strategy starts processes that do not run this script.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._strategy: Any = trainer.strategy
        self.count = int(trainer.world_size)
        if self.count == 1:
            return
        launcher = self._strategy.launcher
        of_script = classes("strategies.launchers._SubprocessScriptLauncher")
        if launcher is not None and not isinstance(launcher, of_script):
            raise ValueError(
                "strategy must start every process with this script, got "
                f"{type(self._strategy).__name__} with {type(launcher).__name__.lstrip('_')}, "
                "which forks or spawns each fit; write strategy='ddp' in a script, use torchrun, "
                "or devices=1"
            )
        if launcher is None:
            self._strategy.setup_environment()
        else:
            launcher.launch(self._strategy.setup_environment, trainer=trainer)

    @property
    def is_first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return 0 if self.count == 1 else int(self._strategy.global_rank)

    def all(self, flag: bool) -> bool:  # noqa: FBT001
        """Returns whether a flag is set on every process; a collective."""
        return flag if self.count == 1 else bool(self._strategy.reduce_boolean_decision(flag))

    def barrier(self) -> None:
        """Waits for the other processes; a collective."""
        if self.count > 1:
            self._strategy.barrier()

    def share(self, value: ValueT) -> ValueT:
        """Returns the value of process 0 on every process; a collective."""
        if self.count == 1:
            return value
        shared: ValueT = self._strategy.broadcast(value, src=0)
        return shared

    def from_first(self, make: Callable[[], ValueT]) -> ValueT:
        """Calls a function in process 0, and returns its result on every process; a collective.

        Args:
            make: The function. Its result is sent to the other processes.

        Raises:
            ValueError: If the function raises one, on every process.
        """
        if self.count == 1:
            return make()
        made: ValueT | None = None
        problem = ""
        if self.is_first:
            try:
                made = make()
            except ValueError as error:
                problem = str(error)
        made, problem = self.share((made, problem))
        if problem:
            raise ValueError(problem)
        return made  # type: ignore[return-value]  # process 0 has made it
