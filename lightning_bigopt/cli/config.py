"""A training as a config file and a command line write it, through LightningCLI."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

# What is imported here can be named in a config without its module.
import lightning_bigopt.examples  # noqa: F401 - so the model and the data of the examples

if TYPE_CHECKING:
    from jsonargparse import Namespace

__all__ = ["ConfiguredTraining", "KeepConfig"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignores what jsonargparse says of how Lightning calls it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class KeepConfig(SaveConfigCallback):
    """Saves the config beside the logs, and beside the configs of runs that logged there before.

    Example:
        >>> KeepConfig(parser=None, config=None).config_filename
        'config.yaml'
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the first free name: config.yaml, config-1.yaml, …."""
        if not self.already_saved:
            folder = Path(trainer.log_dir or trainer.default_root_dir)
            name, number = self.config_filename, 0
            while (folder / name).exists():
                number += 1
                name = f"config-{number}.yaml"
            self.config_filename = trainer.strategy.broadcast(name)
        with _quiet():
            super().setup(trainer, pl_module, stage)


class ConfiguredTraining(LightningCLI):
    """A Trainer, a model and, where the model has none of its own, data.

    Args:
        arguments: Command line, or what this class's own parser made of one.
        parser_texts: Keyword arguments of the parser: what its help says.
        save_config: Whether the fit saves the config.
    """

    def __init__(
        self,
        arguments: list[str] | Namespace,
        *,
        parser_texts: dict[str, Any] | None = None,
        save_config: bool = True,
    ) -> None:
        with _quiet():
            super().__init__(
                args=arguments,
                run=False,
                seed_everything_default=0,
                parser_kwargs=parser_texts,
                save_config_callback=KeepConfig if save_config else None,
            )

    @classmethod
    def parser_for(cls, **texts: Any) -> LightningArgumentParser:
        """The parser, without parsing anything."""
        from jsonargparse import capture_parser

        parser = capture_parser(cls, [], parser_texts=texts)
        assert isinstance(parser, LightningArgumentParser)
        return parser

    @classmethod
    def read(cls, path: str | Path) -> ConfiguredTraining:
        """What a config file describes, made but not trained."""
        return cls(["--config", str(path), "--seed_everything", "false"], save_config=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what ``Trainer.fit`` takes: the checkpoint to resume from."""
        skipped = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        self.fit_arguments = parser.add_method_arguments(Trainer, "fit", skip=skipped)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses once: what was parsed already is taken as it is."""
        from jsonargparse import Namespace

        self.config = args if isinstance(args, Namespace) else parser.parse_args(args)

    def fit(self) -> None:
        """Trains."""
        options = {name: self.config_init.get(name) for name in self.fit_arguments}
        self.trainer.fit(self.model, datamodule=self.datamodule, **options)
