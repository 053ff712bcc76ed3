"""The training loaders: set up before a fit, and as their source and the fit loop have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader

from lightning_bigopt.batching import GlobalBatchLoader
from lightning_bigopt.trainer_access.position import is_unlimited

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "data_in_place",
    "exact_loader",
    "greet_loaders",
    "source_loaders",
    "train_loaders",
    "train_source",
]


@contextmanager
def data_in_place(
    trainer: Trainer, module: LightningModule, data: Any = None, *, datamodule: Any = None
) -> Iterator[None]:
    """Sets the training data up as a fit would, and takes it back: nothing is trained.

    The hooks ``prepare_data``, ``setup`` and ``configure_model`` of module and datamodule run. No
    process is started: a strategy of several processes is asked for their number only.
    """
    loop, connector = trainer.fit_loop, trainer._data_connector
    before = dict(vars(loop)), trainer.state.fn, trainer.state.stage
    trainer.state.fn, trainer.state.stage = TrainerFn.FITTING, RunningStage.TRAINING
    trainer.strategy._lightning_module = module
    try:
        connector.attach_data(module, train_dataloaders=data, datamodule=datamodule)
        module.trainer = trainer
        for owner in (datamodule, module):
            if owner is not None:
                owner.prepare_data()
                owner.setup("fit")
        module.configure_model()
        if is_unlimited(trainer):
            loop.max_epochs = 1000  # as Lightning decides when the loop begins
        loop.setup_data()
        yield
    finally:
        vars(loop).clear()
        vars(loop).update(before[0])
        trainer.state.fn, trainer.state.stage = before[1:]
        trainer.strategy._lightning_module = None


def train_loaders(trainer: Trainer) -> list[Any]:
    """The training loaders as the fit loop runs them; known from ``on_train_start`` on."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def exact_loader(trainer: Trainer) -> GlobalBatchLoader | None:
    """The training loader where it is a :class:`GlobalBatchLoader`; known when it is iterated."""
    loaders = train_loaders(trainer)
    return next((loader for loader in loaders if isinstance(loader, GlobalBatchLoader)), None)


def greet_loaders(trainer: Trainer, greet: Callable[[list[Any]], None] | None) -> None:
    """Has every training loader shown to ``greet`` before it is iterated for the first time.

    Lightning fetches a batch before ``on_train_start``. None takes it back.
    """
    source = trainer.fit_loop._data_source
    source.__dict__.pop("dataloader", None)
    if greet is None:
        return

    def dataloader() -> Any:
        loaders = type(source).dataloader(source)
        several = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)
        greet(several.flattened)
        return loaders

    source.__dict__["dataloader"] = dataloader


def train_source(trainer: Trainer) -> Any:
    """Who gives the training loaders: a module, a datamodule, or the loaders themselves."""
    return trainer.fit_loop._data_source.instance


def source_loaders(trainer: Trainer) -> list[Any]:
    """The training loaders as their source gives them, before Lightning changes them."""
    loaders = trainer.fit_loop._data_source.dataloader()
    several = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)
    return list(several.flattened)
