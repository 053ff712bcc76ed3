"""Finds micro-batches of one sample that would fail in batch normalization later in a fit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bigopt.batching.exact_loader import GlobalBatchLoader
from lightning_bigopt.durations.duration import amount_of
from lightning_bigopt.engine.clock import Clock
from lightning_bigopt.engine.stage import Batch, Fit
from lightning_bigopt.trainer_access import loaders, loop

__all__ = ["BatchNormCheck", "uses_statistics_of_process"]


class _Update(NamedTuple):
    """A planned update: its step, its samples, and whether an epoch ends with it."""

    step: int
    samples: int
    ends_epoch: bool


class BatchNormCheck:
    """Raises in the first forward pass of a fit if a later one would fail in batch normalization.

    Batch normalization in training mode needs more than one value per channel: a layer whose input
    has one value per sample fails for a micro-batch of one sample. The micro-batches of a
    GlobalBatchLoader are known in advance, and the first forward pass shows the inputs.

    Args:
        fit: The fit, after its clock has started.
    """

    def __init__(self, fit: Fit) -> None:
        loader, trainer = loaders.exact_loader(fit.trainer), fit.trainer
        self._hooks: list[RemovableHandle] = []
        self._found: _Update | None = None
        normalizes = any(isinstance(layer, _BatchNorm) for layer in fit.module.modules())
        if loader is None or not normalizes or loop.is_fast_dev_run(trainer):
            return
        self._loader = loader
        # Other loaders may have epochs of other lengths than planned.
        plan = [] if loaders.may_reload(trainer) else _rest_of_plan(fit.clock, loader)
        for update in plan or _rest_of_epoch(fit.clock, loader):
            if _smallest_micro_batch(update.samples, loader) <= 1:
                self._found = update
                break

    def begin_batch(self, batch: Batch) -> None:
        """Watches the forward pass of the first batch, and ends that at the second one."""
        self.end()
        if self._found is None:
            return
        # A process without samples of its own repeats one.
        check = partial(self._check, samples=max(batch.counted_samples, 1), found=self._found)
        self._found = None
        for name, layer in batch.fit.module.named_modules():
            if isinstance(layer, _BatchNorm):
                hook = layer.register_forward_pre_hook(partial(check, name=name), with_kwargs=True)
                self._hooks.append(hook)

    def end(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _check(
        self,
        layer: _BatchNorm,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        name: str,
        samples: int,
        found: _Update,
    ) -> None:
        if torch.compiler.is_compiling() or not uses_statistics_of_process(layer):
            return
        values: Tensor = args[0] if args else kwargs["input"]
        if values.numel() // values.shape[1] != samples:
            return
        micro, world = self._loader.micro_batch_size, self._loader.world_size
        size = amount_of(found.samples, "samples")
        way_out = "choose a larger micro_batch_size, or other global batch sizes"
        if found.ends_epoch and self._loader.tail == "keep":
            way_out = (
                "pass GlobalBatchLoader(..., tail='merge') or tail='drop', because these samples "
                f"are left at the end of an epoch, or {way_out}"
            )
        raise ValueError(
            f"every micro-batch must have at least 2 samples for the {type(layer).__name__} "
            f"{name!r} in training mode, got 1 in update {found.step}, which has {size} "
            f"in micro-batches of at most {micro} on {world} process(es); {way_out}"
        )


def uses_statistics_of_process(layer: _BatchNorm) -> bool:
    """Returns whether a layer normalizes with the batch of this process alone."""
    if not layer.training and layer.running_mean is not None:
        return False
    if not isinstance(layer, nn.SyncBatchNorm) or not distributed.is_initialized():
        return True
    return not layer.training or distributed.get_world_size(layer.process_group) == 1


def _smallest_micro_batch(samples: int, loader: GlobalBatchLoader) -> int:
    """Returns the samples in the smallest micro-batch of an update, over all processes."""
    accumulate = -(-samples // (loader.micro_batch_size * loader.world_size))
    return samples // loader.world_size // accumulate


def _rest_of_plan(clock: Clock, loader: GlobalBatchLoader) -> list[_Update]:
    """Returns the updates of the run from now on, of equal ones in a row the first.

    The list is empty if the updates are not known, or the run has not followed the plan so far.
    """
    now, horizon = clock.counts(), clock.horizon
    updates: list[_Update] = []
    steps = samples = 0
    for span in () if horizon is None else horizon.spans:
        each, after = int(span.samples or 0), steps + span.updates
        if now.steps < after:
            first = max(steps, now.steps)
            if not updates and samples + (first - steps) * each != now.samples:
                return []
            end = samples + span.updates * each
            ends_epoch = samples % loader.samples > 0 and end % loader.samples == 0
            updates.append(_Update(first, each - span.left_out, ends_epoch))
        steps, samples = after, samples + span.updates * each
    return updates


def _rest_of_epoch(clock: Clock, loader: GlobalBatchLoader) -> Iterator[_Update]:
    """Yields the updates of this epoch from now on, as far as the budget reaches."""
    now = clock.counts()
    for index, window in enumerate(loader.windows()):
        ahead = window.position - loader.position
        at = now._replace(
            steps=now.steps + index,
            samples=now.samples + ahead,
            epoch_done=now.epoch_done + ahead,
        )
        if clock.progress_at(at).fraction >= 1:
            return
        ends_epoch = window.position > 0 and window.end == loader.samples
        yield _Update(now.steps + index, window.samples, ends_epoch)
