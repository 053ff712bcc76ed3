"""GlobalBatchFinder: finds the largest micro-batch that fits into memory, before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils.data import default_collate

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.batching.batch_plan import plan_update
from lightning_bigopt.batching.exact_loader import GlobalBatchLoader
from lightning_bigopt.batching.micro_batch_search import MicroBatchSearch, search_micro_batch_size
from lightning_bigopt.batching.randomness import preserve_random_state
from lightning_bigopt.checks import check_between, check_choice, check_count, shown
from lightning_bigopt.engine.optimizer_modes import train_optimizers
from lightning_bigopt.fabric_hooks import TrainerOnly
from lightning_bigopt.optimizers.names import unwrapped
from lightning_bigopt.optimizers.object_snapshot import ObjectSnapshot
from lightning_bigopt.optimizers.private import check_not_private
from lightning_bigopt.trainer_access import loaders, strategies
from lightning_bigopt.type_checks import check_instance

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["GlobalBatchFinder"]


@explain_arguments
class GlobalBatchFinder(TrainerOnly, Callback):
    """Finds the largest micro-batch that fits into memory, and sets it before training begins.

    A trial accumulates two micro-batches and takes an optimizer step. Every process runs its trial
    without gradient synchronization; then a size counts as fitting if it fits on all processes. A
    process that runs out of memory therefore does not block the others, unless the training step
    itself calls a collective. After the search weights, buffers, optimizer, metrics and random
    generators are restored. The chosen size has always been run.

    The size is written to a :class:`GlobalBatchLoader`, or to ``attribute`` of the datamodule or
    module, for its ``train_dataloader`` to read.

    Args:
        global_batch_size: Samples per update over all processes. The micro-batch size divides the
            share of one process.
        attribute: Attribute from which ``train_dataloader`` reads its batch size.
        smallest: Smallest size to try, such as 2 for a model with batch normalization.
        search: ``"binary"`` bisects between the sizes that fit and those that do not; ``"power"``
            tries powers of two only.
        headroom: Fraction of the largest size that is left free, in [0, 1), because later batches
            may need more memory.

    Attributes:
        found: The result of the last search; None before the first one.

    Raises:
        ValueError: At fit start for sharded strategies, SyncBatchNorm, manual optimization and
            loaders whose batch size cannot be set, and if the smallest size does not fit.

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
        check_count("global_batch_size", global_batch_size, of="samples", hint="write 256")
        check_instance("attribute", attribute, str, hint="write 'micro_batch_size'")
        check_count("smallest", smallest, of="samples")
        check_choice("search", search, ("binary", "power"))
        check_between("headroom", headroom, 0, 1, ends="[)", hint="write 0.1")
        self.global_batch_size = global_batch_size
        self.attribute = attribute
        self.smallest = smallest
        self.search: Literal["binary", "power"] = search
        self.headroom = headroom
        self.found: MicroBatchSearch | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the search, before Lightning creates the iterator of the training loader."""
        self._check_supported(trainer, pl_module)
        world = strategies.data_parallel_size(trainer)
        share = plan_update(
            self.global_batch_size, world_size=world, max_micro_batch_size=1
        ).accumulate
        with state_restored(trainer, pl_module):
            source = loaders.train_source(trainer)
            given = loaders.source_loaders(trainer)
            loader = given[0] if len(given) == 1 else None
            dataset = getattr(loader, "dataset", None)
            if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
                raise ValueError(
                    "the training loader must be one DataLoader or GlobalBatchLoader of a dataset "
                    f"with a length and an index with GlobalBatchFinder, got {shown(given)}; set "
                    "the micro-batch by hand"
                )
            is_exact = isinstance(loader, GlobalBatchLoader)
            if not is_exact and not hasattr(source, self.attribute):
                raise ValueError(
                    "attribute must be the name of the attribute from which train_dataloader reads "
                    f"its batch_size, got {shown(self.attribute)}, which {type(source).__name__} "
                    f"does not have; set self.{self.attribute} in it, or train on a "
                    "GlobalBatchLoader"
                )
            collate = getattr(loader, "collate_fn", None) or default_collate
            self.found = search_micro_batch_size(
                lambda size: self._all_ranks_fit(
                    trainer, pl_module, _batch(dataset, collate, size)
                ),
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

    def _check_supported(self, trainer: Trainer, module: LightningModule) -> None:
        if strategies.is_deepspeed(trainer) or strategies.shards_gradients(trainer):
            raise ValueError(
                "strategy must keep the whole model on each process with GlobalBatchFinder, got "
                f"{type(trainer.strategy).__name__}, whose forward needs all processes; set the "
                "micro-batch by hand"
            )
        check_not_private(
            trainer.optimizers,
            "GlobalBatchFinder",
            "which the trials would not restore; set the batch of BatchMemoryManager by hand",
        )
        synchronizes = any(isinstance(part, torch.nn.SyncBatchNorm) for part in module.modules())
        if synchronizes and trainer.world_size > 1:
            raise ValueError(
                "the module must contain no SyncBatchNorm with GlobalBatchFinder, got one and "
                f"{trainer.world_size} processes, all of which its forward needs; set the "
                "micro-batch by hand"
            )
        if not module.automatic_optimization:
            raise ValueError(
                "automatic_optimization must be True with GlobalBatchFinder, got False; set the "
                "micro-batch by hand"
            )

    def _all_ranks_fit(self, trainer: Trainer, module: LightningModule, batch: Any) -> bool:
        """Runs a trial on every process, and returns whether it fits on all of them."""
        failure: Exception | None = None
        fits = True
        try:
            _run_trial(trainer, module, batch)
        except Exception as error:  # noqa: BLE001
            # Every process must reach the collectives below, or the others would hang in them.
            fits = False
            if not (isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)):
                failure = error
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        garbage_collection_cuda()
        any_failed = trainer.strategy.reduce_boolean_decision(failure is not None, all=False)
        if failure is not None:
            raise failure
        if any_failed:
            raise RuntimeError(
                "GlobalBatchFinder stopped because a trial failed on another process; see the "
                "error of that process"
            )
        return trainer.strategy.reduce_boolean_decision(fits, all=True)


def _batch(dataset: Any, collate: Any, size: int) -> Any:
    return collate([dataset[index % len(dataset)] for index in range(size)])


def _run_trial(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    """Runs two micro-batches and an update on the unwrapped module, without DDP's reduction."""
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
        unwrapped(optimizer).step()


@contextmanager
def state_restored(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Restores modules, optimizers and random generators when the block ends.

    Inside the block module and optimizers are in training mode, and ``log`` does nothing. The
    copies are kept in CPU memory, so that they do not reduce the GPU memory that the trials
    measure.
    """
    optimizers = [unwrapped(optimizer) for optimizer in trainer.optimizers]
    snapshot = ObjectSnapshot(*module.modules(), *optimizers, device="cpu")
    try:
        with preserve_random_state(trainer.strategy.root_device):
            # LightningModule.log raises in on_fit_start; these attributes shadow the method.
            module.__dict__.update(log=_ignore, log_dict=_ignore)
            module.train()
            train_optimizers(trainer)
            yield
    finally:
        snapshot.restore()


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Replaces ``LightningModule.log`` in a trial."""
