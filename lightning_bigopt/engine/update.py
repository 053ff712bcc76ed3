"""The next update of one optimizer: its gradients, their norms, and the decisions on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.gradients.apply import scale_
from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.gradient_norms import GradientNorms
from lightning_bigopt.gradients.measure import measure
from lightning_bigopt.optimizers.names import unwrapped
from lightning_bigopt.trainer_access import loop, loop_counters

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Rejection", "Restorable", "Update"]


class Restorable(Protocol):
    """A snapshot of a fit, such as :class:`~lightning_bigopt.engine.snapshot.Snapshot`."""

    def restore(self, *, rewind: bool = True, replay: bool = True) -> None:
        """Restores the state; with ``rewind`` also clock and counters, with both the loaders."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of a portable snapshot as tensors in plain containers."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """The decision to skip an update.

    Args:
        reason: Reason for the rejection, in one sentence.
        roll_back: Snapshot to restore at the end of the batch; None to skip the update only.
        rewind: Whether clock and counts of the run go back to the snapshot, too.
        replay: Whether the loaders go back with them. Otherwise the data since the snapshot is left
            out: training continues with the next data.
    """

    reason: str
    roll_back: Restorable | None = None
    rewind: bool = False
    replay: bool = False

    def restore_snapshot(self, trainer: Trainer) -> None:
        """Restores the snapshot, if there is one, at the end of the batch."""
        if self.roll_back is None:
            return
        step = loop.batches_that_stepped(trainer) if self.rewind else None
        self.roll_back.restore(rewind=self.rewind, replay=self.replay)
        if step is not None:  # what was logged stays logged: the axis of the loggers goes on
            loop_counters.set_logger_step(trainer, step)


@dataclass(kw_only=True, eq=False)
class Update:
    """The next update of one optimizer, after backward and before the optimizer's step.

    Args:
        optimizer: The optimizer that is about to step.
        parameters: Names and parameters, each tensor once.
        label: Name of the optimizer; empty if there is only one.
        progress: Progress at the start of the first batch of the update.
        norm_order: Order of :attr:`norms`: 1, 2 or ``inf``.
        shard_group: Process group over which plain parameters are flat shards (FSDP1), or None.
        scaler_skips_overflow: Whether a GradScaler skips updates with non-finite gradients.
        is_repeated: Whether the optimizer evaluates its closure again in the same step, at other
            weights, as SAM and LBFGS do.
        announce_rejection: Calls the stage ``observe_rejection`` of all capabilities.

    Attributes:
        rejection: The rejection of the update, or None.
        decision: The decision of the clipping rule, or None.
        is_approximate: Whether the gradients are not the mean over the window, because compression
            has changed them; set in ``rescale``.
    """

    optimizer: Optimizer
    parameters: list[tuple[str, nn.Parameter]]
    label: str
    progress: Progress
    norm_order: float
    shard_group: ProcessGroup | None
    scaler_skips_overflow: bool
    is_repeated: bool = False
    announce_rejection: Callable[[Update, str], None]
    rejection: Rejection | None = None
    decision: ClipDecision | None = None
    is_approximate: bool = False
    _norms: GradientNorms | None = field(default=None, init=False)
    _shrunk: GradientNorms | None = field(default=None, init=False)

    @property
    def norms(self) -> GradientNorms:
        """The norms of the gradients before clipping; they are measured on first access.

        With sharded gradients the first access is a collective.
        """
        return self._norms or self.measure()

    @property
    def measured_norms(self) -> GradientNorms | None:
        """:attr:`norms` if they have been measured; None otherwise."""
        return self._norms

    def measure(self) -> GradientNorms:
        """Measures the norms of the gradients, and stores them as :attr:`norms`."""
        self._norms = measure(
            self.parameters, norm_type=self.norm_order, process_group=self.shard_group
        )
        return self._norms

    @property
    def found_inf(self) -> Tensor | None:
        """Whether a fused kernel skips the update because a gradient is not finite.

        A tensor of shape ``()`` on the device, positive if the kernel skips; None if no kernel
        decides. Available in ``after_step``.
        """
        found: Tensor | None = vars(unwrapped(self.optimizer)).get("found_inf")
        return found

    @property
    def is_made(self) -> bool:
        """Whether the optimizer's step has changed the weights; for use in ``after_step``.

        Synchronizes if a fused kernel decides it; :attr:`found_inf` does not.
        """
        return self.rejection is None and (self.found_inf is None or not self.found_inf.item())

    @property
    def norms_after_guard(self) -> GradientNorms:
        """The norms of the gradients after :meth:`shrink_`, which clipping reads."""
        return self._shrunk or self.norms

    def drop_gradients_(self) -> None:
        """Sets all gradients to None."""
        for _, parameter in self.parameters:
            parameter.grad = None

    def shrink_(self, factor: float) -> None:
        """Multiplies the gradients by a factor in place; :attr:`norms` does not change."""
        gradients = [parameter.grad for _, parameter in self.parameters]
        scale_(gradients, self.norms.total.new_full((), factor))
        self._shrunk = self.norms_after_guard.scaled(factor)
