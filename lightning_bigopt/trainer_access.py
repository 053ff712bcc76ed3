"""The only reader of Trainer internals: Lightning's private names stay behind these functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler

from lightning_bigopt.batching import GlobalBatchLoader
from lightning_bigopt.batching.local_squares import LocalSquares

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.utils.tensorboard import SummaryWriter

__all__ = [
    "add_scheduler",
    "batches_that_stepped",
    "callbacks_of",
    "checkpoint_interval",
    "closes_window",
    "count_rows",
    "data_in_place",
    "data_parallel_size",
    "data_rank",
    "epoch_batches",
    "exact_loader",
    "gradient_scaler",
    "greet_loaders",
    "is_deepspeed",
    "is_fast_dev_run",
    "is_last_batch",
    "is_private",
    "loss_scale",
    "micro_batch_size",
    "named_parameters",
    "newest_checkpoint",
    "optimizer_label",
    "parameter_names",
    "plain_name",
    "ready_batches",
    "remove_schedulers",
    "shard_group",
    "shards_gradients",
    "should_log",
    "show_on_progress_bar",
    "sum_over_data",
    "sum_over_data_",
    "tensorboard_writers",
    "train_loaders",
    "unscale_gradients_",
    "unscaled_loss",
    "watch_local_gradients",
]


def data_parallel_size(trainer: Trainer) -> int:
    """The number of processes that see different data."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        mesh = trainer.strategy.device_mesh
        return mesh["data_parallel"].size()
    return int(trainer.world_size)


def data_rank(trainer: Trainer) -> int:
    """This process's place among those that see different data."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        mesh = trainer.strategy.device_mesh
        return int(mesh["data_parallel"].get_local_rank())
    return int(trainer.global_rank)


def sum_over_data(trainer: Trainer, value: float) -> float:
    """The sum of a number over the processes that see different data; a collective."""
    if data_parallel_size(trainer) == 1:
        return value
    total = torch.tensor([value], device=trainer.strategy.root_device)
    return float(sum_over_data_(trainer, total.double() if total.is_cpu else total))


def sum_over_data_(trainer: Trainer, values: Tensor) -> Tensor:
    """Sums a tensor in place over the processes that see different data; a collective."""
    if data_parallel_size(trainer) > 1:
        group = None
        if isinstance(trainer.strategy, ModelParallelStrategy):
            mesh = trainer.strategy.device_mesh
            group = mesh["data_parallel"].get_group()
        torch.distributed.all_reduce(values, group=group)
    return values


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, those that a module brought included."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether the Trainer only tries a batch or a few."""
    return bool(getattr(trainer, "fast_dev_run", False))


def is_deepspeed(trainer: Trainer) -> bool:
    """Whether DeepSpeed owns gradients, clipping and accumulation."""
    return "DeepSpeed" in type(trainer.strategy).__name__


def synchronizes_by_ddp(trainer: Trainer) -> bool:
    """Whether torch's DistributedDataParallel reduces the gradients."""
    return isinstance(trainer.strategy, DDPStrategy)


def shard_group(trainer: Trainer) -> ProcessGroup | None:
    """The group over which FSDP1 shards flat parameters; None where tensors know their shards."""
    if isinstance(trainer.strategy, FSDPStrategy):
        return getattr(trainer.strategy.model, "process_group", None)
    return None


# ---------------------------------------------------------------------- the loaders and the loop


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
        if loop.max_epochs is None and trainer.max_steps == -1:
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


def micro_batch_size(trainer: Trainer) -> int | None:
    """Samples in a full batch of one process; None where the loader does not say."""
    loaders = train_loaders(trainer)
    size = getattr(_batching(loaders[0]), "batch_size", None) if len(loaders) == 1 else None
    return size if isinstance(size, int) else None


def _batching(loader: Any) -> Any:
    """What holds ``batch_size`` and ``sampler``: the loader, or torch's own BatchSampler."""
    batches = getattr(loader, "batch_sampler", None)
    return batches if type(batches) is BatchSampler else loader


def epoch_batches(trainer: Trainer) -> int | None:
    """Batches of one process in an epoch, limits included; None for a loader without length."""
    batches = trainer.num_training_batches
    return None if math.isinf(batches) else int(batches)


def last_batch_samples(trainer: Trainer) -> int | None:
    """Samples in an epoch's last batch of one process; None where the loader does not say."""
    size, batches = micro_batch_size(trainer), epoch_batches(trainer)
    if size is None or batches is None:
        return None
    loader = train_loaders(trainer)[0]
    sampler = getattr(_batching(loader), "sampler", None)
    if getattr(_batching(loader), "drop_last", False):
        return size
    try:
        if batches < len(loader):
            return size
        samples = len(sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return samples - size * (batches - 1)


def epoch_samples(trainer: Trainer) -> int | None:
    """Samples of all processes in an epoch; None where the loader does not say."""
    size, last, batches = (
        micro_batch_size(trainer),
        last_batch_samples(trainer),
        epoch_batches(trainer),
    )
    if size is None or last is None or batches is None:
        return None
    return (size * (batches - 1) + last) * data_parallel_size(trainer)


def ready_batches(trainer: Trainer) -> int:
    """Batches of this epoch that were fetched, the one being trained included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def is_last_batch(trainer: Trainer) -> bool:
    """Whether the batch being trained is the last of its epoch (known before it is trained)."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def closes_window(trainer: Trainer) -> bool:
    """Whether the batch being trained ends an accumulation window."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def count_rows(batch: Any) -> int:
    """The first dimension of the first tensor in a batch.

    Raises:
        ValueError: If the batch holds no tensor with a dimension.
    """
    for leaf in _leaves(batch):
        if leaf.ndim:
            return int(leaf.shape[0])
    raise ValueError(
        f"samples must be given for batches without a tensor, got a {type(batch).__name__}; pass "
        "samples=a function of the batch"
    )


def _leaves(batch: Any) -> Iterable[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for value in batch:
            yield from _leaves(value)


# ------------------------------------------------------------------- optimisers and their gradients


# What FSDP1, torch.compile and activation checkpointing put into names.
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """A parameter's name as the user's module has it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of all parameters, frozen ones included."""
    return tuple(plain_name(name) for name, _ in module.named_parameters())


def named_parameters(module: nn.Module, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    """The optimiser's parameters with the module's names, each tensor once, in group order."""
    names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), f"group{index}.{position}")
            found.setdefault(id(parameter), (name, parameter))
    return list(found.values())


def optimizer_label(trainer: Trainer, optimizer: Optimizer) -> str:
    """``""`` for the only optimiser, its class's name for one of several (numbered if equal)."""
    if len(trainer.optimizers) <= 1:
        return ""
    raw = [getattr(o, "optimizer", o) for o in trainer.optimizers]
    name = type(optimizer).__name__
    twins = [o for o in raw if type(o).__name__ == name]
    return name if len(twins) == 1 else f"{name}-{[id(o) for o in twins].index(id(optimizer))}"


def is_private(optimizer: Optimizer) -> bool:
    """Whether Opacus clips each sample's gradient and adds noise, for differential privacy."""
    return any(base.__module__.split(".")[0] == "opacus" for base in type(optimizer).__mro__)


def gradient_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """The GradScaler of 16-mixed; None for other precisions."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def unscale_gradients_(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Undoes the loss scale where Lightning left it to a fused optimiser.

    Returns:
        Whether a GradScaler is at work, whose own check will skip non-finite gradients.
    """
    scaler = gradient_scaler(trainer)
    if scaler is None:
        return False
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)
    return True


def scaler_found_inf(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """What the GradScaler's unscaling found: 0-d, positive for an overflow; None without one."""
    scaler = gradient_scaler(trainer)
    if scaler is None:
        return None
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return next(iter(found.values())) if found else None


def unscaled_loss(trainer: Trainer, loss: Tensor) -> Tensor:
    """A micro-batch's loss as the training step returned it, out of what is differentiated.

    Lightning divides it by the accumulation, a GradScaler multiplies it by its scale. Does not
    synchronise.
    """
    plain = loss.detach().float()
    scaler = gradient_scaler(trainer)
    if scaler is not None and scaler._scale is not None:
        plain = plain / scaler._scale
    if trainer.lightning_module.automatic_optimization:
        plain = plain * int(trainer.accumulate_grad_batches)
    return plain


def loss_scale(trainer: Trainer) -> float:
    """What the GradScaler multiplies losses by; 1.0 without one."""
    scaler = gradient_scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def shards_gradients(trainer: Trainer) -> bool:
    """Whether every backward averages over the processes, accumulating or not."""
    return isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))


def watch_local_gradients(trainer: Trainer) -> LocalSquares | None:
    """Has DDP note the norm of what this process contributes; None for other strategies.

    Raises:
        ValueError: If DDP has a communication hook already: it holds one.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or trainer.world_size == 1:
        return None
    squares = LocalSquares()
    refused = "ddp_comm_hook=" if strategy._ddp_comm_hook is not None else ""
    model: Any = strategy.model
    try:
        if not refused:
            # DDP reads the hook's annotations, and knows no postponed ones.
            model.register_comm_hook(squares, lambda state, bucket: state.reduce(bucket))
    except RuntimeError as error:
        refused = str(error)
    if refused:
        raise ValueError(
            "DDP must have no communication hook with GradientNoiseScale, which needs its own and "
            f"DDP holds one, got one ({refused}); remove the hook, or GradientNoiseScale"
        )
    return squares


# ------------------------------------------------------------------------------- schedulers


def add_scheduler(trainer: Trainer, scheduler: LRScheduler, *, name: str | None) -> None:
    """Registers a scheduler that Lightning steps after every update."""
    trainer.strategy.lr_scheduler_configs.append(
        LRSchedulerConfig(scheduler=scheduler, interval="step", frequency=1, name=name)
    )


def remove_schedulers(trainer: Trainer) -> None:
    """Drops the schedulers that the module configured, for this fit."""
    trainer.strategy.lr_scheduler_configs = []


# -------------------------------------------------------------------------------- checkpoints


def newest_checkpoint(trainer: Trainer) -> str | None:
    """The checkpoint written last in this fit, or else the one that it resumed from."""
    saved = [
        (callback._last_global_step_saved, callback._last_checkpoint_saved)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback._last_checkpoint_saved
    ]
    if saved:
        return str(max(saved)[1])
    return None if trainer.ckpt_path is None else str(trainer.ckpt_path)


def checkpoint_interval(callback: ModelCheckpoint) -> str:
    """When a ModelCheckpoint saves, in words."""
    if callback._every_n_train_steps:
        return f"every {callback._every_n_train_steps} updates"
    if callback._train_time_interval is not None:
        return f"every {callback._train_time_interval}"
    epochs = callback._every_n_epochs
    return "every epoch" if epochs == 1 else f"every {epochs} epochs"


# --------------------------------------------------------------------------------- logging


def batches_that_stepped(trainer: Trainer) -> int:
    """The x coordinate that Lightning gives to training metrics."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def should_log(trainer: Trainer) -> bool:
    """Whether Lightning logs the update under way."""
    return bool(trainer._logger_connector.should_update_logs or is_fast_dev_run(trainer))


def tensorboard_writers(trainer: Trainer) -> dict[Logger, tuple[SummaryWriter, str]]:
    """The Trainer's TensorBoard loggers with their writer and the prefix of their tags.

    Empty on all processes but the first, which alone has files.
    """
    if not trainer.is_global_zero:
        return {}
    return {
        logger: (
            logger.experiment,
            logger._prefix + logger.LOGGER_JOIN_CHAR if logger._prefix else "",
        )
        for logger in trainer.loggers
        if isinstance(logger, TensorBoardLogger)
    }


def show_on_progress_bar(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Shows values on the progress bar until they are shown again.

    ``LightningModule.log(prog_bar=True)`` costs about 0.4 ms a key on every step; this is a
    dictionary update.
    """
    trainer._logger_connector._progress_bar_metrics.update(values)
