"""Merge: a weighted mean of checkpoints that replaces the decay of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.averaging.average import Average, AverageState
from lightning_bigopt.averaging.weights import merge_weights
from lightning_bigopt.checks import check_choice, check_count, shown
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.schedules.shapes import COOLDOWNS, CooldownShape

__all__ = ["Merge", "merge_coefficients"]

_ROUNDING = 1e-9  # relative to a position
_LONGEST = 0.5  # of the updates up to now


def merge_coefficients(
    positions: Sequence[float], *, emulate: CooldownShape = "linear", begin: float | None = None
) -> list[float]:
    r"""Computes the weights of checkpoints of a constant-rate run that emulate a decay.

    Checkpoint :math:`j` stands for the updates since the one before it. Their decayed learning
    rate has the factor :math:`w_j`, the value of the curve at the previous checkpoint, and
    :math:`c_j = w_j - w_{j+1}` with :math:`w_0 = 1` and 0 after the last one. If the gradients were
    those of the constant-rate run, :math:`\sum_j c_j \theta_j` would be the weights of the run with
    the decay. A linear decay over checkpoints at equal distances gives equal weights.

    Args:
        positions: Positions of the checkpoints in updates, samples or any other unit, ascending.
        emulate: Curve of the decay: ``"linear"``, ``"cosine"``, ``"1-sqrt"`` or ``"exponential"``.
        begin: Position where the decay begins, before the first checkpoint; None for the first
            position minus the mean distance between positions.

    Returns:
        One coefficient for each checkpoint; their sum is 1.

    Raises:
        ValueError: If there is no position, they are not ascending, or the curve is unknown.

    Example:
        >>> merge_coefficients([600, 700, 800, 900])
        [0.25, 0.25, 0.25, 0.25]
        >>> [round(c, 3) for c in merge_coefficients([600, 700, 800, 900], emulate="1-sqrt")]
        [0.5, 0.207, 0.159, 0.134]

    References:
        Tian et al., "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
        Pre-training", arXiv 2507.17634, 2025, Sec. 3.
    """
    check_choice("emulate", emulate, CooldownShape)
    if not positions:
        raise ValueError("positions must contain a checkpoint, got none; pass at least one")
    if len(positions) == 1:
        return [1.0]
    if begin is None:
        begin = positions[0] - (positions[-1] - positions[0]) / (len(positions) - 1)
    edges = [begin, *positions]
    if any(one >= other for one, other in pairwise(edges)):
        raise ValueError(
            f"positions must ascend from begin on, got {shown(edges)}; sort the checkpoints"
        )
    length = edges[-1] - begin
    factors = [COOLDOWNS[emulate]((edge - begin) / length) for edge in edges]
    return [one - other for one, other in pairwise(factors)]


@explain_arguments
@dataclass(frozen=True)
class Merge(Average):
    r"""Weighted mean of recent checkpoints, which emulates a decay of the learning rate.

    A run at a constant learning rate keeps copies of its weights at equal distances.
    :func:`merge_coefficients` gives the weight of each copy. The current weights are the last
    checkpoint. The merge is available at any time, so that one run gives a decayed model for every
    length.

    It costs one copy of the weights for each checkpoint, and almost no time. A run whose learning
    rate decays to zero needs no merge.

    Args:
        over: Length of the emulated decay, positive. A percentage, at most 50 %, refers to the
            updates up to now: the merge is that of a run that ends now, of whatever length.
        emulate: Curve of the decay: ``"linear"``, ``"cosine"``, ``"1-sqrt"`` or ``"exponential"``.
        checkpoints: Number of copies in the length of the decay, at least 2. With a percentage
            there are up to half as many again, because their distance grows with the run.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_bigopt.durations import Progress
        >>> merge, state = Merge(over=4, checkpoints=2), AverageState()
        >>> for step in range(1, 9):
        ...     weights = {"w": torch.tensor([float(step)])}
        ...     progress = Progress(fraction=step / 8, steps=step)
        ...     merge.update(state, weights, progress, None)
        >>> state.numbers["positions"], merge.value(state, weights, progress)["w"].tolist()
        ([6, 8], [7.0])

    References:
        Tian et al., "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
        Pre-training", arXiv 2507.17634, 2025, Sec. 3.
    """

    over: DurationLike
    emulate: CooldownShape = "linear"
    checkpoints: int = 10

    def __post_init__(self) -> None:
        if not Duration.parse(self.over, name="over").value:
            raise ValueError(f"over must be positive, got {shown(self.over)}; write '20%' or 500")
        if self.duration.unit == "fraction" and self.duration.value > _LONGEST:
            raise ValueError(
                f"over must be at most 50% if it is a percentage, got {shown(self.over)}; write "
                "'20%', or a number of steps"
            )
        check_choice("emulate", self.emulate, CooldownShape)
        check_count("checkpoints", self.checkpoints, minimum=2)

    @property
    def duration(self) -> Duration:
        """The length of the emulated decay."""
        return Duration.parse(self.over)

    @property
    def needs_horizon(self) -> bool:
        """Returns False: a percentage refers to the updates up to now."""
        return False

    def _position(self, progress: Progress) -> float:
        unit = self.duration.unit
        return progress.consumed("steps" if unit == "fraction" else unit)

    def _length(self, now: float) -> float:
        is_share = self.duration.unit == "fraction"
        return self.duration.value * now if is_share else self.duration.value

    def update(
        self,
        state: AverageState,
        weights: Mapping[str, Tensor],
        progress: Progress,
        horizon: Horizon | None,
    ) -> None:
        """Copies the weights if the distance from the last copy is large enough."""
        now, positions = self._position(progress), state.numbers.get("positions", [])
        length = self._length(now)
        last = positions[-1] if positions else 0
        if now - last < length / self.checkpoints * (1.0 - _ROUNDING):
            return
        state.copies.append({name: value.clone() for name, value in weights.items()})
        kept = [*positions, now]
        # Those at the beginning of the decay and before it have no weight.
        first = sum(place <= (now - length) * (1.0 + _ROUNDING) for place in kept)
        state.numbers["positions"], state.copies = kept[first:], state.copies[first:]

    def value(
        self, state: AverageState, weights: Mapping[str, Tensor], progress: Progress
    ) -> Mapping[str, Tensor] | None:
        """Returns the merge of the copies and the current weights; None before the first update."""
        positions, copies = state.numbers.get("positions", []), state.copies
        now = self._position(progress)
        begin = max(0.0, now - self._length(now))
        used = [
            (place, copy)
            for place, copy in zip(positions, copies, strict=True)
            if place > begin * (1.0 + _ROUNDING)
        ]
        if not used:
            return None
        if now > used[-1][0] * (1.0 + _ROUNDING):
            kept = used[-1][1]
            used.append((now, {name: weights[name].to(kept[name]) for name in kept}))
        coefficients = merge_coefficients([p for p, _ in used], emulate=self.emulate, begin=begin)
        return merge_weights([copy for _, copy in used], coefficients)
