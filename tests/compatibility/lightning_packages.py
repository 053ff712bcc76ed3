"""The same run under both packages of Lightning, and everything that it leaves behind."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_module
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from tests.helpers import QUIET, ResumableLoader

NAMES = ("lightning.pytorch", "pytorch_lightning")
# Values that depend on the time that a run takes.
TIMED = ("throughput", "time", "seconds", "memory")


def package(name: str) -> Any:
    """Imports a package; the messages of all other tests keep their logger.

    Both packages send messages to one logger, that of the package imported last.
    """
    names = ("log", "rank_zero_deprecation_category")
    kept = {name: getattr(rank_zero_module, name) for name in names}
    try:
        for part in ("callbacks", "loggers", "strategies"):
            import_module(f"{name}.{part}")
        return import_module(name)
    finally:
        vars(rank_zero_module).update(kept)


def module_class(root: Any, *mixins: type, **members: Any) -> type[Any]:
    """Makes a module of a package: a small regression that logs two losses."""

    class Net(root.LightningModule):  # type: ignore[misc, name-defined]
        poisoned = -1

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
            self.lr, self.micro_batch_size, self.rates = 0.05, 2, []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            if batch_idx == self.poisoned:
                loss = loss * torch.nan
            self.log("loss", loss)
            self.log("falling", -float(self.global_step), on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.rates.append([group["lr"] for group in optimizer.param_groups])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)

        def train_dataloader(self) -> ResumableLoader:
            return ResumableLoader(12, self.micro_batch_size)

        def val_dataloader(self) -> ResumableLoader:
            return ResumableLoader(4, 2)

    return type("Net", (*mixins, Net), members)


def trainer(root: Any, callbacks: Sequence[Any] = (), **options: Any) -> Any:
    """Makes a Trainer of a package without output."""
    return root.Trainer(**{**QUIET, "max_steps": 12, "callbacks": list(callbacks), **options})


def train(
    root: Any,
    folder: Path,
    callbacks: Callable[[], list[Any]],
    *,
    mixins: Sequence[type] = (),
    members: Mapping[str, Any] | None = None,
    loader: Callable[[], Any] | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains with TensorBoard and checkpoints, and returns everything that the run left behind."""
    checkpoint = root.callbacks.ModelCheckpoint(
        folder / "checkpoints", filename="{step}", every_n_train_steps=2, save_top_k=-1
    )
    ours = callbacks()
    fitting = trainer(
        root,
        [*ours, root.callbacks.LearningRateMonitor(), checkpoint],
        logger=root.loggers.TensorBoardLogger(folder, name=None, version=""),
        enable_checkpointing=True,
        log_every_n_steps=1,
        **options,
    )
    module = module_class(root, *mixins, **(members or {}))()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers
        fitting.fit(module, None if loader is None else loader(), ckpt_path=ckpt_path)
    files = sorted((folder / "checkpoints").glob("*.ckpt"))
    return {
        "weights": {name: value.tolist() for name, value in module.state_dict().items()},
        "rates": module.rates,
        "metrics": plain(dict(fitting.logged_metrics)),
        "progress bar": plain(dict(fitting.progress_bar_metrics)),
        "callbacks": [type(callback).__name__ for callback in fitting.callbacks],
        "logged": logged(folder),
        "checkpoints": {
            file.name: plain(torch.load(file, weights_only=False), folder) for file in files
        },
        "samples per update": [int(fitting.accumulate_grad_batches), fitting.global_step],
    }


def logged(folder: Path) -> dict[str, Any]:
    """Returns the tags of TensorBoard with steps and values; timed values are left out."""
    events = EventAccumulator(str(folder))
    events.Reload()
    found: dict[str, Any] = {}
    for tag in events.Tags()["scalars"]:
        timed = any(word in tag for word in TIMED)
        found[tag] = [(e.step, None if timed else plain(e.value)) for e in events.Scalars(tag)]
    for tag in events.Tags()["tensors"]:
        found[tag] = len(events.Tensors(tag))
    return found


def plain(value: Any, folder: Path = Path()) -> Any:
    """Turns tensors into lists, objects into text, and the paths of a run into relative ones."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, folder) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return "nan"  # which is equal to itself
    if isinstance(value, bool | int | float | None):
        return value
    return str(value).replace(f"{folder}/", "")
