"""Trainer, model and data built from a config file and a command line through LightningCLI."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

# jsonargparse accepts a class by its bare name only if its module has been imported.
import lightning_bigopt.examples  # noqa: F401

if TYPE_CHECKING:
    from jsonargparse import Namespace

    _CLI = LightningCLI
else:
    _CLI = object

__all__ = ["ConfiguredTraining", "KeepConfig", "TrainingCommands"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignores jsonargparse's deprecation warnings about the way Lightning calls it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class KeepConfig(SaveConfigCallback):
    """Saves the config in the log folder, and keeps the configs of earlier runs in that folder.

    Example:
        >>> KeepConfig(parser=None, config=None).config_filename
        'config.yaml'
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves the config under the first free name: config.yaml, config-1.yaml, …."""
        if not self.already_saved:
            folder = Path(trainer.log_dir or trainer.default_root_dir)
            name, number = self.config_filename, 0
            while (folder / name).exists():
                number += 1
                name = f"config-{number}.yaml"
            # Process 0 may have written its file before another process looks for a free name.
            self.config_filename = trainer.strategy.broadcast(name)
        with _quiet():
            super().setup(trainer, pl_module, stage)


class TrainingCommands(_CLI):
    """Parses, builds and trains what a config describes; stands before a class LightningCLI.

    Args:
        arguments: Command-line arguments, or the namespace that :meth:`parser_for`'s parser
            returned.
        parser_texts: Keyword arguments of the parser, such as ``description`` and ``epilog``.
        save_config: Whether the fit saves the config in the log folder.
        options: Further arguments of LightningCLI.
    """

    def __init__(
        self,
        arguments: list[str] | Namespace,
        *,
        parser_texts: dict[str, Any] | None = None,
        save_config: bool = True,
        **options: Any,
    ) -> None:
        with _quiet():
            super().__init__(
                args=arguments,
                run=False,
                seed_everything_default=0,
                parser_kwargs=parser_texts,
                save_config_callback=KeepConfig if save_config else None,
                **options,
            )

    @classmethod
    def parser_for(cls, **texts: Any) -> LightningArgumentParser:
        """Makes the parser without parsing any arguments."""
        from jsonargparse import capture_parser

        parser: Any = capture_parser(cls, [], parser_texts=texts)
        return cast("LightningArgumentParser", parser)

    @classmethod
    def read(cls, path: str | Path) -> TrainingCommands:
        """Builds the objects of a config file, without training and without seeding.

        Raises:
            ValueError: If there is no such file.
        """
        if not Path(path).is_file():
            raise ValueError(
                f"config must be a file, got {str(path)!r}, which does not exist; pass one such as "
                "examples/gpt.yaml"
            )
        arguments = ["--config", str(path), "--seed_everything", "false"]
        texts = {"usage": "bigopt plan CONFIG [--picture PICTURE]"}
        return cls(arguments, parser_texts=texts, save_config=False)

    @staticmethod
    def read_values(parser: LightningArgumentParser, path: str | Path) -> dict[str, Any]:
        """Reads a config file as dictionaries, with the defaults of all classes in it."""
        import yaml

        parsed = parser.parse_args(["--config", str(path)])
        with _quiet():
            values: dict[str, Any] = yaml.safe_load(parser.dump(parsed, skip_none=False))
        return values

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the arguments of ``Trainer.fit``, such as ``ckpt_path``."""
        skipped = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        self.fit_arguments = parser.add_method_arguments(self.trainer_class, "fit", skip=skipped)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments, unless they are a namespace that was parsed before."""
        from jsonargparse import Namespace

        self.config = args if isinstance(args, Namespace) else parser.parse_args(args)

    def fit(self) -> None:
        """Runs ``Trainer.fit`` with the configured model, data and arguments."""
        options = {name: self.config_init.get(name) for name in self.fit_arguments}
        self.trainer.fit(self.model, datamodule=self.datamodule, **options)


class ConfiguredTraining(TrainingCommands, LightningCLI):
    """A Trainer, a model and an optional datamodule of ``lightning``."""
