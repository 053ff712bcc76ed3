"""The package of Lightning that trains a config: that of its model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Union

from lightning_bigopt.cli.config import ConfiguredTraining, TrainingCommands
from lightning_bigopt.trainer_access.packages import classes

__all__ = ["model_path", "training_class"]


def model_path(arguments: Sequence[str]) -> str:
    """Returns the class path of the model in arguments of ``bigopt fit``; "" if there is none.

    Nothing else is read, and errors are left to the parser of all arguments, which is made for the
    package of the model.

    Example:
        >>> model_path(["--trainer.max_steps", "5", "--model=project.Module"])
        'project.Module'
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", nargs="?", action="append", default=[])
    parser.add_argument("--model", "--model.class_path", nargs="?", dest="model")
    given, _ = parser.parse_known_args(arguments)
    return given.model or next(filter(None, map(_configured_model, reversed(given.config))), "")


def _configured_model(path: str | None) -> str:
    import yaml

    config: Any = None
    with suppress(OSError, TypeError, ValueError, yaml.YAMLError):
        config = yaml.safe_load(Path(str(path)).read_text(encoding="utf-8"))
    model = config.get("model") if isinstance(config, dict) else None
    return str(model.get("class_path", "") if isinstance(model, dict) else model or "")


def training_class(model: str) -> type[TrainingCommands]:
    """Returns the class that trains a model: for ``lightning`` or for ``pytorch_lightning``.

    Args:
        model: The class path of the model.
    """
    module, _, name = model.rpartition(".")
    if not module:
        return ConfiguredTraining  # a class of this package
    kind = None
    with suppress(ImportError):
        kind = getattr(import_module(module), name, None)
    others = classes("LightningModule")[1:]  # imported by now if the model derives from it
    if isinstance(kind, type) and issubclass(kind, others):
        return _training_class(classes("cli.LightningCLI", "Trainer", "Callback"))
    return ConfiguredTraining


@cache
def _training_class(found: tuple[type[Any], ...]) -> type[TrainingCommands]:
    # Of each package LightningCLI, Trainer and Callback.
    (_, _, ours), (cli, trainer, theirs) = found[:3], found[3:]

    class Trainer(trainer):  # type: ignore[misc, valid-type]
        """Takes callbacks of both packages in a config; LightningCLI reads the annotation."""

        def __init__(self, *, callbacks: Any = None, **options: Any) -> None:
            super().__init__(callbacks=callbacks, **options)

    accepted = list[Union[theirs, ours]]  # type: ignore[valid-type]  # noqa: UP007
    Trainer.__init__.__annotations__["callbacks"] = accepted | None

    class OtherTraining(TrainingCommands, cli):  # type: ignore[misc, valid-type]
        """A Trainer, a model and an optional datamodule of ``pytorch_lightning``."""

        def __init__(self, arguments: Any, **options: Any) -> None:
            super().__init__(arguments, trainer_class=Trainer, **options)

    return OtherTraining
