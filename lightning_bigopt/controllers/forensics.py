"""What is known of a rejected update: where it came from, and how to look at it again."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_bigopt import trainer_access
from lightning_bigopt.gradients import GradientNorms, Verdict

if TYPE_CHECKING:
    from lightning_bigopt.pipeline import OptimizerStep, Pipeline

__all__ = ["RejectedUpdate", "WindowRecorder", "random_state", "set_random_state"]

_SHOWN = 5
_MOST_FILES = 20


@dataclass(frozen=True, kw_only=True)
class RejectedUpdate:
    """One update that was not made as it came, as far as every process knows it.

    Args:
        update: The Trainer's ``global_step`` before it.
        epoch: The epoch.
        batches: Indices within the epoch of the window's micro-batches.
        optimizer: Which of several optimizers; ``""`` for the only one.
        detector: Class name of the detector that objected.
        reason: One sentence for people.
        norm: The gradient's norm before clipping.
        loss: The window's mean loss on this process; None where no loss was seen.
        worst: For every process the loss of its worst micro-batch, and that batch's index.
        rank: The first process with a loss that is not finite; None where there is none.
        parameters: Names and gradient norms: of those that are not finite, or else the largest.
        nonfinite: How many parameters had a gradient that was not finite.
        file: Where batches and random state of this process were written; None where not asked.

    Example:
        >>> update = RejectedUpdate(
        ...     update=12,
        ...     epoch=0,
        ...     batches=(12,),
        ...     detector="NonFinite",
        ...     reason="the gradient norm is nan",
        ...     norm=float("nan"),
        ...     loss=2.0,
        ...     worst=((2.0, 12), (float("nan"), 12)),
        ...     rank=1,
        ...     parameters=(("head.weight", float("nan")),),
        ...     nonfinite=1,
        ... )
        >>> print(update)
        Update 12 (epoch 0, batch 12) rejected: the gradient norm is nan; the loss of process 1 is
        nan; not finite in 1 parameter: head.weight.
    """

    update: int
    epoch: int
    batches: tuple[int, ...]
    optimizer: str = ""
    detector: str
    reason: str
    norm: float
    loss: float | None
    worst: tuple[tuple[float, int], ...] = ()
    rank: int | None = None
    parameters: tuple[tuple[str, float], ...] = ()
    nonfinite: int = 0
    file: str | None = None

    def __str__(self) -> str:
        first, last = (self.batches[0], self.batches[-1]) if self.batches else (0, 0)
        where = f"batch {first}" if first == last else f"batches {first} to {last}"
        whose = f" of {self.optimizer}" if self.optimizer else ""
        lines = [f"Update {self.update}{whose} (epoch {self.epoch}, {where}) rejected"]
        lines[0] += f": {self.reason}"
        if self.rank is not None:
            lines.append(f"the loss of process {self.rank} is {self.worst[self.rank][0]}")
        names = ", ".join(name for name, _ in self.parameters)
        if self.nonfinite:
            plural = "s" if self.nonfinite > 1 else ""
            more = ", …" if self.nonfinite > len(self.parameters) else ""
            lines.append(f"not finite in {self.nonfinite} parameter{plural}: {names}{more}")
        elif names:
            lines.append(f"largest in {names}")
        if self.file is not None:
            lines.append(f"see {self.file}")
        return "; ".join(lines) + "."


@dataclass(kw_only=True)
class _MicroBatch:
    """One micro-batch of the window under way."""

    index: int
    samples: int
    loss: Tensor
    batch: Any = None
    random: dict[str, Any] = field(default_factory=dict)


class WindowRecorder:
    """Keeps the losses of the window under way, on the device, and its batches on request.

    Args:
        folder: Where rejected windows are written; None to keep no batches.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self._files = 0
        self._window: list[_MicroBatch] = []
        self._is_decided = False
        self._index = 0
        self._batch: Any = None
        self._random: dict[str, Any] = {}

    @property
    def is_over(self) -> bool:
        """Whether the next batch opens a window."""
        return self._is_decided or not self._window

    def begin(self, pipeline: Pipeline, batch: Any, index: int) -> None:
        """A batch is about to be trained."""
        self._index = index
        if self.folder is not None:
            self._batch = _mapped(
                batch, _copied
            )  # a training step may write to it, or take fields out
            self._random = random_state(pipeline.trainer.strategy.root_device)

    def add(self, pipeline: Pipeline, loss: Tensor) -> None:
        """Its loss is known; the first after a decision opens a window."""
        if self._is_decided:
            self._window, self._is_decided = [], False
        self._window.append(
            _MicroBatch(
                index=self._index,
                samples=pipeline.window.batch_samples,
                loss=loss,
                batch=self._batch,
                random=self._random,
            )
        )

    def clear(self) -> None:
        """The window is over."""
        self._window, self._is_decided = [], False
        self._index, self._batch, self._random = 0, None, {}

    def close(self) -> None:
        """The update has been decided on; another optimizer may step with the same losses."""
        self._is_decided = True

    def weighted_loss(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the losses times samples, and the samples, on the device."""
        if not self._window:
            return like.new_zeros(()), like.new_zeros(())
        losses = torch.stack([micro.loss.to(like) for micro in self._window])
        samples = [micro.samples for micro in self._window]
        if len(set(samples)) > 1:
            weights = torch.tensor(samples, dtype=like.dtype, device=like.device)
            return (losses * weights).sum(), like.new_full((), sum(samples))
        return losses.sum() * samples[0], like.new_full((), sum(samples))

    def report(self, step: OptimizerStep, verdict: Verdict, norm: float) -> RejectedUpdate:
        """What is known of a rejected update; to be called on every process. Synchronizes."""
        trainer = step.pipeline.trainer
        losses = [micro.loss.item() for micro in self._window]
        indices = [micro.index for micro in self._window]
        samples = sum(micro.samples for micro in self._window)
        worst = _over_processes(trainer, *_worst(losses, indices))
        found, count = _remarkable(step.norms)
        rejected = RejectedUpdate(
            update=trainer.global_step,
            epoch=trainer.current_epoch,
            batches=tuple(indices),
            optimizer=trainer_access.optimizer_label(trainer, step.optimizer),
            detector=verdict.detector,
            reason=verdict.reason,
            norm=norm,
            loss=(
                sum(loss * micro.samples for loss, micro in zip(losses, self._window, strict=True))
                / samples
                if samples
                else None
            ),
            worst=worst,
            rank=next((r for r, (loss, _) in enumerate(worst) if not math.isfinite(loss)), None),
            parameters=found,
            nonfinite=count,
            file=self._file(trainer),
        )
        if rejected.file is not None:
            self._write(rejected, trainer)
        return rejected

    def _file(self, trainer: Any) -> str | None:
        if self.folder is None or self._files >= _MOST_FILES:
            return None
        self._files += 1
        name = f"update-{trainer.global_step:08d}-rank{trainer.global_rank}.pt"
        return str(Path(self.folder) / name)

    def _write(self, rejected: RejectedUpdate, trainer: Any) -> None:
        assert rejected.file is not None  # asked by the caller
        Path(rejected.file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "version": 1,
                "rejected": asdict(rejected),
                "precision": str(trainer.precision),
                "window": [
                    {
                        "index": micro.index,
                        "samples": micro.samples,
                        "batch": _mapped(micro.batch, Tensor.cpu),
                        "random": micro.random,
                    }
                    for micro in self._window
                ],
            },
            rejected.file,
        )


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the generators that a training step may draw from, as plain data.

    Torch's on the CPU and on a CUDA device, Python's, and NumPy's where anybody has imported it.
    """
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = (name, keys.tolist(), *rest)
    return states


def set_random_state(states: Mapping[str, Any], device: torch.device) -> None:
    """Puts the generators where :func:`random_state` found them, as far as they exist here."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    if "python" in states:
        random.setstate(states["python"])
    numpy = sys.modules.get("numpy")
    if "numpy" in states and numpy is not None:
        numpy.random.set_state(tuple(states["numpy"]))


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch with its tensors changed, in copies of the plain containers that hold them."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(value, change) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_mapped(value, change) for value in batch)
    return batch


def _copied(tensor: Tensor) -> Tensor:
    """A copy that drags no storage along, as a view of a whole data set would."""
    return tensor.detach().clone()


def _worst(losses: Sequence[float], indices: Sequence[int]) -> tuple[float, int]:
    """The first loss that is not finite, or else the largest, and its batch."""
    if not losses:
        return 0.0, -1
    for loss, index in zip(losses, indices, strict=True):
        if not math.isfinite(loss):
            return loss, index
    return max(zip(losses, indices, strict=True))


def _over_processes(trainer: Any, loss: float, index: int) -> tuple[tuple[float, int], ...]:
    """What every process has to say, by rank. A collective: only after a shared decision."""
    mine = torch.tensor([loss, float(index)], device=trainer.strategy.root_device)
    rows = trainer.strategy.all_gather(mine).view(-1, 2).tolist()
    return tuple((row[0], int(row[1])) for row in rows)


def _remarkable(norms: GradientNorms) -> tuple[tuple[tuple[str, float], ...], int]:
    """Names and norms of what is not finite, or else of the largest; how many are not finite."""
    pairs = list(zip(norms.names, norms.per_tensor.tolist(), strict=True))
    broken = [(name, norm) for name, norm in pairs if not math.isfinite(norm)]
    if broken:
        return tuple(broken[:_SHOWN]), len(broken)
    largest = sorted(pairs, key=lambda pair: pair[1], reverse=True)
    return tuple(largest[:_SHOWN]), 0
