"""The largest micro-batch that fits, tried on the real module before training begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils.data import default_collate

from lightning_bigopt import trainer_access
from lightning_bigopt.batching import (
    GlobalBatchLoader,
    MicroBatchSearch,
    plan_update,
    search_micro_batch_size,
)
from lightning_bigopt.tuning.snapshot import Snapshot

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["GlobalBatchFinder"]


class GlobalBatchFinder(Callback):
    """Finds the largest micro-batch for a global batch, and sets it before training begins.

    Every trial accumulates two micro-batches and takes an optimizer step, on each process for
    itself and without gradient synchronization; then all processes agree on the worst verdict, so
    that one that runs out of memory leaves none waiting (a training step that gathers over the
    processes by itself would). Afterwards weights, buffers, optimizer, metrics and random
    generators are as they were. Only sizes that ran are ever chosen.

    The size is written into a :class:`GlobalBatchLoader`, or into ``attribute`` of the datamodule
    or module whose ``train_dataloader`` reads it.

    Args:
        global_batch_size: The global batch to be carried out; the micro-batch divides its share of
            one process.
        attribute: The attribute that ``train_dataloader`` reads its batch size from.
        smallest: Where the search begins, such as 2 for a model with batch normalization.
        search: ``"binary"`` closes in on the limit, ``"power"`` stays with powers of two.
        headroom: Share of the largest size to leave free, in [0, 1), because later batches may
            need more memory.

    Attributes:
        found: What the last search found; None before.

    Raises:
        ValueError: At fit start for sharded strategies, SyncBatchNorm and manual optimization, for
            loaders whose batch cannot be set, and where not even one sample fits.

    Example:
        >>> from lightning_bigopt import GlobalBatchFinder
        >>> GlobalBatchFinder(global_batch_size=256).found is None
        True
    """

    def __init__(
        self,
        *,
        global_batch_size: int,
        attribute: str = "micro_batch_size",
        smallest: int = 1,
        search: Literal["binary", "power"] = "binary",
        headroom: float = 0.1,
    ) -> None:
        plan_update(global_batch_size, world_size=1, max_micro_batch_size=1)  # refuses bad sizes
        if search not in ("binary", "power"):
            raise ValueError(f"search must be 'binary' or 'power', got {search!r}")
        if not 0 <= headroom < 1:
            raise ValueError(f"headroom must be in [0, 1), got {headroom!r}; write 0.1")
        self.global_batch_size = global_batch_size
        self.attribute = attribute
        self.smallest = smallest
        self.search: Literal["binary", "power"] = search
        self.headroom = headroom
        self.found: MicroBatchSearch | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Searches, before Lightning asks for the first batch."""
        self._refuse(trainer, pl_module)
        world = trainer_access.data_parallel_size(trainer)
        share = plan_update(
            self.global_batch_size, world_size=world, max_micro_batch_size=1
        ).accumulate
        with as_it_was(trainer, pl_module):
            source = trainer_access.train_source(trainer)
            loaders = trainer_access.source_loaders(trainer)
            loader = loaders[0] if len(loaders) == 1 else None
            dataset = getattr(loader, "dataset", None)
            if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
                raise ValueError(
                    "the training loader must be one DataLoader or GlobalBatchLoader of a dataset "
                    f"with a length and an index with GlobalBatchFinder, got {loaders!r}; set the "
                    "micro-batch by hand"
                )
            is_exact = isinstance(loader, GlobalBatchLoader)
            if not is_exact and not hasattr(source, self.attribute):
                raise ValueError(
                    f"attribute must name what train_dataloader reads its batch_size from, got "
                    f"{self.attribute!r}, which {type(source).__name__} does not have; set "
                    f"self.{self.attribute} in it, or train on a GlobalBatchLoader"
                )
            collate = getattr(loader, "collate_fn", None) or default_collate
            self.found = search_micro_batch_size(
                lambda size: self._agree(trainer, pl_module, _batch(dataset, collate, size)),
                maximum=share,
                minimum=self.smallest,
                search=self.search,
                divides=share,
                headroom=self.headroom,
            )
        size = self.found.micro_batch_size
        target = loader if is_exact else source
        setattr(target, "micro_batch_size" if is_exact else self.attribute, size)
        rank_zero_info(
            f"Micro-batch {size} for a global batch of {self.global_batch_size} on {world} "
            f"process(es); the largest that ran was {self.found.largest}."
        )

    def _refuse(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer_access.is_deepspeed(trainer) or trainer_access.shards_gradients(trainer):
            raise ValueError(
                "strategy must keep the whole model on each process with GlobalBatchFinder, got "
                f"{type(trainer.strategy).__name__}, whose forward waits for all processes; set "
                "the micro-batch by hand"
            )
        waits = any(isinstance(part, torch.nn.SyncBatchNorm) for part in module.modules())
        if waits and trainer.world_size > 1:
            raise ValueError(
                "the module must hold no SyncBatchNorm with GlobalBatchFinder, got one and "
                f"{trainer.world_size} processes, for all of which its forward waits; set the "
                "micro-batch by hand"
            )
        if not module.automatic_optimization:
            raise ValueError(
                "automatic_optimization must be True with GlobalBatchFinder, got False; set the "
                "micro-batch by hand"
            )

    def _agree(self, trainer: Trainer, module: LightningModule, batch: Any) -> bool:
        """One trial on every process, and the worst verdict of all."""
        failure: Exception | None = None
        fits = True
        try:
            _try(trainer, module, batch)
        except Exception as error:  # noqa: BLE001  # the other processes must hear of any
            fits = False
            if not (isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)):
                failure = error
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        garbage_collection_cuda()
        broken = trainer.strategy.reduce_boolean_decision(failure is not None, all=False)
        if failure is not None:
            raise failure
        if broken:
            raise RuntimeError("GlobalBatchFinder stopped: a trial failed on another process")
        return trainer.strategy.reduce_boolean_decision(fits, all=True)


def _batch(dataset: Any, collate: Any, size: int) -> Any:
    return collate([dataset[index % len(dataset)] for index in range(size)])


def _try(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    """Two micro-batches and an update, on the module itself: DDP does not hear of it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.strategy.batch_to_device(batch)
    arguments = {"batch": batch}
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        arguments["batch_idx"] = 0
    for _ in range(2):
        with trainer.precision_plugin.train_step_context():
            output: Any = module.training_step(*arguments.values())
        loss = output["loss"] if isinstance(output, dict) else output
        if loss is not None:
            loss.backward()
    for optimizer in trainer.optimizers:
        raw = getattr(optimizer, "optimizer", optimizer)
        raw.step()


@contextmanager
def as_it_was(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Puts modules, optimizers and generators back; meanwhile the module trains and logs nothing.

    Copies wait in the CPU's memory, so that they take none of what is searched.
    """
    optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]
    snapshot = Snapshot(*module.modules(), *optimizers, device="cpu")
    try:
        with isolate_rng():
            module.__dict__.update(log=_nothing, log_dict=_nothing)
            module.train()
            yield
    finally:
        snapshot.restore()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A trial logs nothing."""
