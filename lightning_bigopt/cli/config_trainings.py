"""Builds the training of each trial from a config of ``bigopt fit``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bigopt.checks import shown
from lightning_bigopt.cli.package_of_config import model_path, training_class
from lightning_bigopt.tuning.paths import FieldPaths, changed
from lightning_bigopt.tuning.random_states import seed_apart
from lightning_bigopt.tuning.trainings import Training, Trainings
from lightning_bigopt.tuning.trees import ConfigTree

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_bigopt.cli.config import TrainingCommands
    from lightning_bigopt.tuning.space import Range

__all__ = ["ConfigTrainings"]

_ROOTS = ("model", "data", "optimizer", "lr_scheduler")


class ConfigTrainings(Trainings):
    """Builds trainings from a config file, with other values in some fields.

    Args:
        path: The config file.
        seed: Seed of every training if the config sets none.

    Raises:
        ValueError: If there is no such file, or it is no config of a training.
    """

    def __init__(self, path: str | Path, *, seed: int) -> None:
        if not Path(path).is_file():
            raise ValueError(
                f"config must be a file, got {str(path)!r}, which does not exist; pass one such as "
                "examples/gpt.yaml"
            )
        self._path = path
        self._kind = training_class(model_path(["--config", str(path)]))
        self._parser = self._kind.parser_for(usage="bigopt tune --config CONFIG --space SPACE")
        self._config = self._kind.read_values(self._parser, path)
        self._parser.exit_on_error = False
        if self._config.get("seed_everything") is None or self._config["seed_everything"] is False:
            self._config["seed_everything"] = seed  # 0 is a seed, and equals False
        self.seed = self._config["seed_everything"]
        self._places: dict[str, tuple[str, ...]] = {}

    def check_starts_anew(self) -> None:
        """Raises if the config resumes a run: every training would have its weights.

        Raises:
            ValueError: If the config has a ``ckpt_path``.
        """
        if (path := self._config.get("ckpt_path")) is not None:
            raise ValueError(
                f"ckpt_path must be null in {str(self._path)!r}, got {shown(path)}: the weights of "
                "a checkpoint would replace those of each seed; remove the line"
            )

    def prepare(self, space: Mapping[str, Range]) -> Trainer:
        """Finds the fields in the config."""
        self._places = {path: self._keys(path) for path in space}
        return self._started(self._config).trainer

    def reseed(self, seed: int, *, is_paired: bool = False) -> None:
        """Sets the seed in place of that of the config."""
        super().reseed(seed, is_paired=is_paired)
        self._config["seed_everything"] = seed

    def value(self, path: str) -> Any:
        """Returns the value in the config, or the default of its class."""
        node: Any = self._config
        for key in self._keys(path):
            node = _child(node, key)
        return node

    def identity(self) -> str:
        """Returns the config with the defaults of all classes in it, without the seed.

        The code of these classes and the files that they read are not part of it.
        """
        import yaml

        kept = {name: value for name, value in self._config.items() if name != "seed_everything"}
        text: str = yaml.safe_dump(kept, sort_keys=True, allow_unicode=True)
        return text

    def _keys(self, path: str) -> tuple[str, ...]:
        """Returns the keys of a field in the config."""
        tree = ConfigTree()
        trainer = dict(self._config["trainer"])
        callbacks = trainer.pop("callbacks", None) or []
        roots = {name: tree.fields(self._config.get(name)) or {} for name in _ROOTS}
        paths = FieldPaths(
            tree, arguments={**roots, "trainer": trainer}, callbacks=callbacks, is_shared=False
        )
        places = paths.find(path)
        if not places:
            raise paths.unknown(path)
        place = places[0]
        start = ("trainer", "callbacks") if place.root == "callbacks" else (place.root,)
        return (*start, *place.keys)

    def build(self, values: Mapping[str, Any]) -> Training:
        """Parses the config with the values, and builds its objects as ``bigopt fit`` does."""
        built = self._started(self._with(values))
        options = {name: built.config_init.get(name) for name in built.fit_arguments}
        data = {"datamodule": built.datamodule}
        if self.is_paired:  # the datamodule's setup draws next
            seed_apart(self.seed, "fit")
        return Training(trainer=built.trainer, module=built.model, data=data, options=options)

    def unchanged(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns no values: the config has its own."""
        return {}

    def _with(self, values: Mapping[str, Any]) -> dict[str, Any]:
        new = {self._places[path]: _plain(value) for path, value in values.items()}
        config: dict[str, Any] = changed(ConfigTree(), self._config, new)
        return config

    def _started(self, config: Mapping[str, Any]) -> TrainingCommands:
        try:
            parsed = self._parser.parse_object(deepcopy(dict(config)))  # it changes its argument
        except argparse.ArgumentError as error:
            raise ValueError(str(error)) from error
        return self._kind(parsed, save_config=False)

    def config(self, values: Mapping[str, Any]) -> str:
        """Returns the config with the values."""
        import yaml

        text: str = yaml.safe_dump(self._with(values), sort_keys=False, allow_unicode=True)
        return text


def _child(node: Any, key: str) -> Any:
    if isinstance(node, (list, tuple)):
        return node[int(key)]
    return ((ConfigTree().fields(node)) or {}).get(key)


def _plain(value: Any) -> Any:
    """Returns a value as YAML holds it."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
