"""Builds the training of each trial from functions of the user."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_bigopt.checks import shown
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access.constructors import constructors_recorded
from lightning_bigopt.trainer_access.packages import classes
from lightning_bigopt.tuning.optimizer_fields import OptimizerFields, group_fields
from lightning_bigopt.tuning.paths import FieldPaths, Place, changed
from lightning_bigopt.tuning.random_states import seed_apart
from lightning_bigopt.tuning.refusals import SetupError
from lightning_bigopt.tuning.source_text import as_text
from lightning_bigopt.tuning.space import Range
from lightning_bigopt.tuning.trainings import Training, Trainings
from lightning_bigopt.tuning.trees import ObjectTree
from lightning_bigopt.type_checks import check_callable

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["MadeTrainings"]


class MadeTrainings(Trainings):
    """Builds trainings from functions of the user.

    Args:
        make_trainer: Makes the Trainer with its callbacks.
        make_module: Makes the module.
        make_data: Makes the data: a loader, a pair of loaders for training and validation, a
            datamodule, or a dictionary of arguments of ``Trainer.fit``. None for a module that has
            its loaders.
        seed: Seed of every training.

    Raises:
        ValueError: If one of them is no function.
    """

    def __init__(
        self,
        make_trainer: Callable[..., Trainer],
        make_module: Callable[..., LightningModule],
        make_data: Callable[..., Any] | None,
        *,
        seed: int,
    ) -> None:
        makers = {"make_module": make_module, "make_trainer": make_trainer}
        makers |= {} if make_data is None else {"make_data": make_data}
        for name, make in makers.items():
            if isinstance(make, nn.Module):  # it is callable
                raise ValueError(
                    f"{name} must be a function, got a {type(make).__name__}; every trial needs a "
                    f"new one: pass {name}=lambda: {type(make).__name__}(...)"
                )
            check_callable(name, make, hint=f"pass a function, as {name}=lambda: ...")
        self._make: dict[str, Callable[..., Any]] = {
            name.removeprefix("make_"): make for name, make in makers.items()
        }
        self._make["model"] = self._make.pop("module")
        self.seed = seed
        self._places: dict[str, tuple[Place, ...]] = {}
        self._last: dict[str, ReferenceType[Any]] = {}

    def prepare(self, space: Mapping[str, Range]) -> Trainer:
        """Finds the fields: arguments of the functions, and fields of the Trainer's callbacks."""
        examples = {path: values.example() for path, values in space.items()}
        signatures = {root: _parameters(make) for root, make in self._make.items()}
        arguments = {root: found for root, (found, _) in signatures.items()}
        given = {n: examples[n] for n in arguments["trainer"] if n in examples}
        with constructors_recorded():
            trainer: Any = self._new("trainer", given)
        if not isinstance(trainer, classes("Trainer")):
            raise ValueError(
                f"make_trainer must return a Trainer, got {shown(trainer)}; write "
                "def make_trainer(): return Trainer(...)"
            )
        paths = FieldPaths(
            ObjectTree(),
            arguments=arguments,
            callbacks=trainer_callbacks.callbacks_of(trainer),
            open_roots=[root for root, (_, takes_more) in signatures.items() if takes_more],
            is_shared=True,
        )
        self._places = {path: paths.find(path) for path in space}
        self._find_in_optimizer(paths, examples)
        self._warn_of_any_others(arguments)
        found: Trainer = trainer
        return found

    def _warn_of_any_others(self, arguments: Mapping[str, Mapping[str, Any]]) -> None:
        """Warns of paths that only ``**kwargs`` take: a misspelled one would change nothing."""
        for path, places in self._places.items():
            root, keys = places[0].root, places[0].keys
            is_argument = root in self._make and keys == (path,)
            if is_argument and path not in arguments[root]:
                name = "make_module" if root == "model" else f"make_{root}"
                rank_zero_warn(
                    f"{path!r} of the space is no field that is known: {name} gets it among its "
                    "**kwargs. Name it among the arguments of the function to avoid this warning."
                )

    def _find_in_optimizer(self, paths: FieldPaths, examples: Mapping[str, Any]) -> None:
        missing = [path for path, places in self._places.items() if not places]
        if not missing:
            return
        given = {n: v for n, v in examples.items() if self._goes_to(n, "model")}
        known = group_fields(self._make["model"](**given))
        for path in missing:
            name = path.removeprefix("optimizer.")
            is_known = name in known if known is not None else path != name
            if not is_known:
                listed = [f"optimizer.{each}" for each in known or ()]
                raise paths.unknown(path, others=listed)
            self._places[path] = (Place("optimizer", (name,)),)

    def _goes_to(self, path: str, root: str) -> bool:
        return any(place.root == root for place in self._places[path])

    def build(self, values: Mapping[str, Any]) -> Training:
        """Sets the seeds, and calls ``make_module``, ``make_trainer`` and ``make_data``."""
        new: dict[str, dict[tuple[str, ...], Any]] = {}
        for path, value in values.items():
            for place in self._places[path]:
                new.setdefault(place.root, {})[place.keys] = value
        _seed_everything(self.seed)
        module = self._call("model", new)
        with constructors_recorded():
            trainer: Trainer = self._call("trainer", new)
        if self.is_paired:
            seed_apart(self.seed, "data")
        data = self._data(new)
        callbacks = trainer_callbacks.callbacks_of(trainer)
        if "callbacks" in new:
            callbacks[:] = changed(ObjectTree(), callbacks, new["callbacks"])
        if "optimizer" in new:
            fields = {keys[0]: value for keys, value in new["optimizer"].items()}
            callbacks.insert(0, OptimizerFields(fields))
        if self.is_paired:  # a datamodule's setup draws next
            seed_apart(self.seed, "fit")
        return Training(trainer=trainer, module=module, data=_fit_arguments(data), options={})

    def _call(self, root: str, new: Mapping[str, Mapping[tuple[str, ...], Any]]) -> Any:
        values = new.get(root, {})
        names, _ = _parameters(self._make[root])
        inner = {keys: value for keys, value in values.items() if len(keys) > 1}
        arguments = {keys[0]: value for keys, value in values.items() if len(keys) == 1}
        if inner:
            arguments |= {keys[0]: changed(ObjectTree(), names, inner)[keys[0]] for keys in inner}
        return self._make[root](**arguments) if root == "data" else self._new(root, arguments)

    def _new(self, root: str, arguments: Mapping[str, Any]) -> Any:
        """Calls a function, and raises if it returns the object of the last trial."""
        made = self._make[root](**arguments)
        if root in self._last and self._last[root]() is made:
            name = {"model": "module"}.get(root, root)
            raise SetupError(
                f"make_{name} must return a new {name} for each trial, got the same one again; "
                "create it inside the function"
            )
        self._last[root] = ref(made)
        return made

    def _data(self, new: Mapping[str, Mapping[tuple[str, ...], Any]]) -> Any:
        """Makes the data; only a value that goes there can be what a ValueError refuses."""
        if "data" not in self._make:
            return None
        try:
            return self._call("data", new)
        except ValueError as error:
            if "data" in new:
                raise
            raise SetupError(f"make_data must return data, got an error: {error}") from error

    def unchanged(self, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Returns no values; None if a function has no default for one of them."""
        for place in (place for path in values for place in self._places[path]):
            if place.root in self._make:
                parameters = inspect.signature(self._make[place.root]).parameters
                found = parameters.get(place.keys[0])
                if found is None or found.default is found.empty:
                    return None
        return {}

    def config(self, values: Mapping[str, Any]) -> str:
        """Returns the values by path; objects as text."""
        import yaml

        plain = {path: _plain(value) for path, value in values.items()}
        text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        return text

    def value(self, path: str) -> Any:
        """Returns the default of an argument of a function; None for any other field."""
        for make in self._make.values():
            found, _ = _parameters(make)
            if path in found:
                return found[path]
        return None

    def identity(self) -> str:
        """Returns source text, defaults and outer variables of the functions.

        The source text of what they call is not part of it.
        """
        return "\n".join(f"{root}: {as_text(make)}" for root, make in self._make.items())


def _plain(value: Any) -> Any:
    """Returns a value of plain types as it is, any other one as text."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def _parameters(make: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Returns the defaults of a function's arguments by name, and whether it takes any others."""
    parameters = inspect.signature(make).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_more = any(p.kind == p.VAR_KEYWORD for p in parameters)
    return {p.name: None if p.default is p.empty else p.default for p in named}, takes_more


def _seed_everything(seed: int) -> None:
    from lightning.pytorch import seed_everything

    seed_everything(seed, workers=True, verbose=False)


def _fit_arguments(data: Any) -> dict[str, Any]:
    """Returns data as arguments of ``Trainer.fit``."""
    if data is None:
        return {}
    if isinstance(data, classes("LightningDataModule")):
        return {"datamodule": data}
    names = ("train_dataloaders", "val_dataloaders")
    if isinstance(data, tuple) and len(data) == 2:
        return dict(zip(names, data, strict=True))
    if isinstance(data, Mapping) and data.keys() <= {*names, "datamodule"}:
        return dict(data)
    return {"train_dataloaders": data}
