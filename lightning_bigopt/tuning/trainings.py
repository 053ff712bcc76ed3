"""The training of a trial, and the interface of what builds one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_bigopt.tuning.space import Range

__all__ = ["Training", "Trainings"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training that has been built and not started.

    Args:
        trainer: The Trainer.
        module: The module.
        data: Keyword arguments of ``Trainer.fit`` and ``Trainer.validate`` for the data, by name:
            ``train_dataloaders`` is of ``fit`` only.
        options: Further keyword arguments of ``Trainer.fit``.
    """

    trainer: Trainer
    module: LightningModule
    data: Mapping[str, Any]
    options: Mapping[str, Any]

    def fit(self, **options: Any) -> None:
        """Trains."""
        self.trainer.fit(self.module, **self.data, **{**self.options, **options})

    def validate(self) -> None:
        """Validates, without printing the metrics."""
        data = {name: value for name, value in self.data.items() if name != "train_dataloaders"}
        if "val_dataloaders" in data:
            data = {"dataloaders": data["val_dataloaders"]}
        self.trainer.validate(self.module, verbose=False, **data)


class Trainings(ABC):
    """Builds trainings with values of a search space.

    Attributes:
        seed: Seed of every training.
        is_paired: Whether weights, data and fit have random numbers of their own, so that a module
            that draws more of them changes neither the data nor the fit.
    """

    seed: Any
    is_paired: bool = False

    @abstractmethod
    def prepare(self, space: Mapping[str, Range]) -> Trainer:
        """Finds the fields of a space.

        Returns:
            A Trainer that is not used for a fit.

        Raises:
            ValueError: If a field does not exist, or several have its path.
        """

    @abstractmethod
    def build(self, values: Mapping[str, Any]) -> Training:
        """Sets the seeds and builds a training; a constructor may raise for a value.

        Args:
            values: The value of each field by path.
        """

    @abstractmethod
    def unchanged(self, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Returns the values of a training without those of a trial; None if it needs them."""

    @abstractmethod
    def config(self, values: Mapping[str, Any]) -> str:
        """Returns the values as YAML."""

    def reseed(self, seed: int, *, is_paired: bool = False) -> None:
        """Sets the seed of all further trainings, also in place of that of a config.

        Args:
            seed: The seed.
            is_paired: Whether data and fit have random numbers of their own; False as in a fit of
                the user.
        """
        self.seed, self.is_paired = seed, is_paired

    @abstractmethod
    def value(self, path: str) -> Any:
        """Returns the value of a field without a search; None if it is unknown.

        Raises:
            ValueError: If the field does not exist, or several have its path.
        """

    @abstractmethod
    def identity(self) -> str:
        """Returns what is trained as text, without the seed, so that a change can be noticed."""
