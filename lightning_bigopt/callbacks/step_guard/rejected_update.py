"""The description of one rejected update."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RejectedUpdate"]


@dataclass(frozen=True, kw_only=True)
class RejectedUpdate:
    """Description of one rejected update, which was skipped or whose gradient was scaled down.

    Args:
        update: The Trainer's ``global_step`` before the update.
        epoch: The epoch.
        batches: Indices of the micro-batches of its window in the epoch: the ``batch_idx`` of
            ``training_step``. With a GlobalBatchLoader, which repeats an interrupted window after a
            resume, the ``batch_idx`` of the run without interruption.
        optimizer: Label of the optimizer; empty if there is only one.
        detector: Class name of the detector that rejected the update.
        reason: Reason for the rejection.
        norm: Gradient norm before clipping.
        loss: Mean loss of the window on this process; None if no loss was observed.
        worst: For each process the largest loss of a micro-batch, or the first non-finite one, and
            the index of that micro-batch.
        rank: Rank of the first process with a non-finite loss; None if all losses are finite.
        parameters: Names and gradient norms of non-finite gradients, or else of the largest; at
            most five.
        nonfinite: Number of parameters with a non-finite gradient.
        file: File with the batches and random states of this process; None if none was written, or
            it could not be written.

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
        batches = f"batch {first}" if first == last else f"batches {first} to {last}"
        optimizer = f" of {self.optimizer}" if self.optimizer else ""
        parts = [f"Update {self.update}{optimizer} (epoch {self.epoch}, {batches}) rejected"]
        parts[0] += f": {self.reason}"
        if self.rank is not None:
            parts.append(f"the loss of process {self.rank} is {self.worst[self.rank][0]}")
        names = ", ".join(name for name, _ in self.parameters)
        if self.nonfinite:
            plural = "s" if self.nonfinite > 1 else ""
            more = ", …" if self.nonfinite > len(self.parameters) else ""
            parts.append(f"not finite in {self.nonfinite} parameter{plural}: {names}{more}")
        elif names:
            parts.append(f"largest in {names}")
        if self.file is not None:
            parts.append(f"see {self.file}")
        return "; ".join(parts) + "."
