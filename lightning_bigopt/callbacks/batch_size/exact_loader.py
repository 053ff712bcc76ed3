"""Sets rank and batch sizes of a GlobalBatchLoader before its first iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from lightning_bigopt.batching.exact_loader import GlobalBatchLoader
from lightning_bigopt.batching.planned_sizes import sizes_in_epoch
from lightning_bigopt.batching.policies.batch_size_policy import BatchSizePolicy
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.trainer_access import loaders, loop, strategies

__all__ = ["prepare_exact_loader"]


def prepare_exact_loader(
    fit: Fit,
    policy: BatchSizePolicy,
    loader: GlobalBatchLoader,
    *,
    max_micro_batch_size: int | None,
) -> None:
    """Sets rank, micro-batch size and global batch sizes of a loader.

    Args:
        fit: The fit.
        policy: The policy of the global batch size.
        loader: The training loader.
        max_micro_batch_size: Upper bound of the loader's micro-batch size; None for no bound.

    Raises:
        ValueError: If the policy is adaptive, or ``limit_train_batches`` would shorten an epoch.
    """
    trainer = fit.trainer
    if policy.adaptive:
        raise ValueError(
            f"policy must be known in advance with GlobalBatchLoader, got {type(policy).__name__}, "
            "which depends on measurements; train on a DataLoader"
        )
    if trainer.limit_train_batches != 1.0 and not loop.is_fast_dev_run(trainer):
        raise ValueError(
            "limit_train_batches must be 1.0 with GlobalBatchLoader, got "
            f"{trainer.limit_train_batches}; set max_steps, or pass a torch Subset as dataset"
        )
    previous = loaders.exact_loader(trainer)
    if previous is not None and previous is not loader:
        # reload_dataloaders_every_n_epochs has made a new loader, which would start at epoch 0.
        loader.load_state_dict(previous.state_dict())
    if max_micro_batch_size is not None:
        loader.micro_batch_size = min(loader.micro_batch_size, max_micro_batch_size)
    world = strategies.data_parallel_size(trainer)
    loader.set_rank(rank=strategies.data_rank(trainer), world_size=world)
    loader.set_batch_sizes(_BatchSizes(partial(_batch_sizes, fit, policy, loader, world)))


class _BatchSizes:
    """A function for ``set_batch_sizes``; copies of a loader have none until their next fit."""

    def __init__(self, sizes: Callable[[], Iterable[int]]) -> None:
        self._sizes = sizes

    def __call__(self) -> Iterable[int]:
        return self._sizes()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # copied as None: a copy must not contain the fit


def _batch_sizes(
    fit: Fit, policy: BatchSizePolicy, loader: GlobalBatchLoader, world: int
) -> Iterable[int]:
    """Returns the global batch sizes of the rest of the epoch."""
    # Lightning may fetch the first batch before on_train_start, where the clock starts otherwise.
    clock = fit.start_clock()
    if loop.is_fast_dev_run(fit.trainer):
        # Lightning stops after any batch, which must close its window.
        left = loader.samples - loader.position
        return _single_micro_batches(left, largest=loader.micro_batch_size * world)
    clock.epoch.read_exact_loader(fit.trainer)  # of a new epoch, whose hooks come later
    horizon, now = clock.horizon, clock.counts()

    def progress_after(*, steps: int, batches: int, samples: int) -> Progress:
        ahead = now._replace(
            steps=now.steps + steps,
            batches=now.batches + batches,
            samples=now.samples + samples,
            epoch_done=now.epoch_done + samples,
        )
        return clock.progress_at(ahead)

    return sizes_in_epoch(
        policy,
        progress_after=progress_after,
        position=loader.position,
        clock="samples" if horizon is None else horizon.clock,
        micro_batch_size=loader.micro_batch_size,
        world_size=world,
        samples_per_epoch=loader.samples,
    )


def _single_micro_batches(left: int, *, largest: int) -> Iterator[int]:
    """Yields global batches of one micro-batch that leave no tail, which could be merged."""
    while left > 0:
        size = left // 2 if largest < left < 2 * largest else min(left, largest)
        yield size
        left -= size
