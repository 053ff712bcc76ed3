"""One side of a comparison, made by functions of the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.type_checks import check_callable, check_instance

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Side"]


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a comparison: functions that make its Trainer, module and data.

    Args:
        make_trainer: Makes the Trainer, with its callbacks, for each training.
        make_module: Makes the module for each training.
        make_data: Makes the data for each training: a loader, a pair of loaders for training and
            validation, a datamodule, or a dictionary of arguments of ``Trainer.fit``. None for a
            module that has its loaders.
        name: Name of the side in the result.

    Raises:
        ValueError: If an argument is no function, or the name is empty.

    Example:
        >>> Side(name="cosine", make_trainer=make_trainer, make_module=MyModule)  # doctest: +SKIP
    """

    make_trainer: Callable[..., Trainer]
    make_module: Callable[..., LightningModule]
    make_data: Callable[..., Any] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        check_instance("name", self.name, str, hint="write name='cosine'")
        for argument in ("make_trainer", "make_module", "make_data"):
            value = getattr(self, argument)
            if argument != "make_data" or value is not None:
                check_callable(argument, value, hint=f"pass a function, as {argument}=lambda: ...")
