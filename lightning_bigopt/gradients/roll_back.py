"""RollBack: when StepGuard goes back to a snapshot, and how training continues."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from statistics import median, pstdev
from typing import Any

from lightning_bigopt.arguments import Specification, explain_arguments
from lightning_bigopt.checks import check_between, check_choice, check_count, check_positive, shown
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.gradients.detectors import spread

__all__ = ["RollBack"]

_WINDOW = 128  # accepted losses that determine the usual loss
_RECENT = 32  # the last of them, whose median it is
_ARMED = 64  # losses before the first trigger


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class RollBack(Specification):
    r"""Goes back to a snapshot after bad updates, and leaves out the data since the snapshot.

    ``StepGuard(roll_back=RollBack())`` takes snapshots while the loss is not above its limit. It
    restores one if the smoothed loss :math:`s_t` stays above the limit for ``updates`` accepted
    updates,

    .. math:: s_t = s_{t-1} + \tfrac{2}{n+1} (\ell_t - s_{t-1}), \qquad
        s_t > m + \theta \max(\sigma, \text{floor} \cdot |m|) \text{ for } n \text{ updates}

    or if the guard's ``max_consecutive`` is reached, which ends the run otherwise. The usual loss
    :math:`m` is the median of the last 32 losses that were not above the limit. :math:`\sigma` is
    the standard deviation of the last 128 of them, estimated as for :class:`NormSpike` (if most
    losses are 0, their plain standard deviation). There is no limit before 64 losses.

    Args:
        snapshot_every: Distance between snapshots. The first one is taken after the first accepted
            update; none is taken while the loss is above its limit.
        keep: Number of snapshots that are kept. If the run goes wrong again before ``recover`` has
            passed, it goes back by one snapshot more.
        skip_data: Whether the data since the snapshot is left out. Otherwise it is trained again,
            where the loader has a ``state_dict``.
        lr_factor: Factor on the learning rate after a rollback, in (0, 1]; below 1 it needs a
            LearningRateScheduler.
        recover: Duration in which the factor rises linearly back to 1.
        at_most: Number of rollbacks of the run; the next one ends it with an error.
        to: ``"memory"`` for snapshots in CPU memory and in checkpoints of one file (not in sharded
            ones), or a folder into which every process writes its own file.
        threshold: :math:`\theta`, in standard deviations.
        updates: :math:`n`: number of updates for which the loss is smoothed, and for which it must
            stay above the limit.
        floor: Smallest standard deviation, as a fraction of the usual loss.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> roll_back = RollBack(updates=3)
        >>> state = roll_back.initial_state()
        >>> usual = [roll_back.observe(2.0, state) for _ in range(64)]
        >>> [roll_back.observe(8.0, state) for _ in range(3)][-1]
        'the smoothed loss is 7.25, usually 2, above 2.1 for 3 updates'

    References:
        Chowdhery et al., "PaLM", JMLR 2023, Sec. 5.1; OPT: Zhang et al. 2022, Sec. 2.5.
    """

    snapshot_every: DurationLike = "1%"
    keep: int = 3
    skip_data: bool = True
    lr_factor: float = 1.0
    recover: DurationLike = "2%"
    at_most: int = 3
    to: str = "memory"
    threshold: float = 5.0
    updates: int = 10
    floor: float = 0.01

    _used_in = "StepGuard(roll_back={})"

    def __post_init__(self) -> None:
        for name in ("snapshot_every", "recover"):
            duration = Duration.parse(getattr(self, name), name=name)
            if name == "snapshot_every" and not duration.value:
                raise ValueError(
                    f"snapshot_every must be positive, got {shown(self.snapshot_every)}; "
                    "write '1%' or 100"
                )
        check_count("keep", self.keep, of="snapshots")
        check_choice("skip_data", self.skip_data, (True, False))
        check_between("lr_factor", self.lr_factor, 0, 1, ends="(]", hint="try 0.5")
        check_count("at_most", self.at_most, of="rollbacks")
        to: object = self.to
        if not isinstance(to, str | PathLike) or not str(to) or "://" in str(to):
            raise ValueError(
                f"to must be 'memory' or a local folder, got {shown(to)}; write 'memory', or a "
                "folder such as 'snapshots'"
            )
        check_positive("threshold", self.threshold, hint="try 5.0")
        check_count("updates", self.updates)
        check_positive("floor", self.floor, hint="try 0.01")

    @property
    def folder(self) -> str | None:
        """The folder of the snapshots; None for CPU memory."""
        return None if self.to == "memory" else str(self.to)

    def initial_state(self) -> dict[str, Any]:
        """Returns the state before the first loss, as plain numbers."""
        return {"smoothed": None, "usual": [], "above": 0, "is_high": False}

    def limit(self, state: dict[str, Any]) -> float:
        """Returns the largest usual loss; ``inf`` until armed, and while all losses are 0."""
        usual: list[float] = state["usual"]
        if len(usual) < _ARMED:
            return math.inf
        middle = median(usual[-_RECENT:])
        sigma = max(spread(usual), self.floor * abs(middle))
        if sigma == 0:  # most losses are 0, as with a hinge loss
            sigma = pstdev(usual)
        return middle + self.threshold * sigma if sigma else math.inf

    def observe(self, loss: float, state: dict[str, Any]) -> str | None:
        """Adds the loss of an accepted update; returns the reason for a rollback, or None.

        Args:
            loss: The loss, equal on all processes; ignored if it is not finite.
            state: The result of :meth:`initial_state`; changed in place.
        """
        if not math.isfinite(loss):
            return None
        limit, before = self.limit(state), state["smoothed"]
        weight = 2.0 / (self.updates + 1)
        smoothed = loss if before is None else before + weight * (loss - before)
        state["smoothed"] = smoothed
        state["is_high"] = max(loss, smoothed) > limit
        if smoothed <= limit:
            state["above"] = 0
            if loss <= limit:
                state["usual"].append(loss)
                del state["usual"][:-_WINDOW]
            return None
        state["above"] += 1
        if state["above"] < self.updates:
            return None
        return (
            f"the smoothed loss is {smoothed:.4g}, usually {median(state['usual'][-_RECENT:]):.4g},"
            f" above {limit:.4g} for {self.updates} updates"
        )
