"""The one table of everything that is logged."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

__all__ = ["TAGS", "Tag", "find_tag", "tag_name"]


@dataclass(frozen=True, kw_only=True)
class Tag:
    """One logged quantity, or a family of them.

    Args:
        name: As it stands in the logger. ``<...>`` is a name from the model; ``[...]`` is left out
            where there is only one.
        unit: Its unit; ``"1"`` for a ratio.
        meaning: One sentence.

    Example:
        >>> next(tag.unit for tag in TAGS if tag.name == "clip/coefficient[/optimizer][/group]")
        '1'
    """

    name: str
    unit: str
    meaning: str

    def matches(self, name: str) -> bool:
        """Whether a logged name is this quantity.

        Example:
            >>> find_tag("optim/lr/decay").matches("optim/lr")
            True
        """
        pattern = re.sub(r"\\\[/\w+\\\]", "(/[^/]+)?", re.escape(self.name))
        pattern = re.sub(r"<\w+>", ".+", pattern)
        return re.fullmatch(pattern, name) is not None


def find_tag(name: str) -> Tag | None:
    """The row of the table that a logged name belongs to.

    Example:
        >>> find_tag("layers/grad_norm/blocks.3").unit
        '1'
        >>> find_tag("train_loss") is None
        True
    """
    return next((tag for tag in TAGS if tag.matches(name)), None)


@cache  # asked again at every logged update
def tag_name(*parts: str) -> str:
    """A name in the logger, empty parts left out and odd characters replaced.

    Example:
        >>> tag_name("optim/lr", "", "no decay")
        'optim/lr/no_decay'
    """
    kept = [parts[0], *(re.sub(r"[^-\w.]", "_", part) for part in parts[1:] if part)]
    return "/".join(kept)


def _tag(name: str, unit: str, meaning: str) -> Tag:
    return Tag(name=name, unit=unit, meaning=meaning)


TAGS: tuple[Tag, ...] = (
    _tag(
        "optim/lr[/optimizer][/group]",
        "1",
        "Learning rate of a parameter group, as used by this update.",
    ),
    _tag(
        "optim/weight_decay[/optimizer][/group]",
        "1",
        "Weight decay of a parameter group, as used by this update.",
    ),
    _tag(
        "optim/momentum[/optimizer][/group]",
        "1",
        "Momentum or first beta of a parameter group, as used by this update.",
    ),
    _tag(
        "grad_norm/total[/optimizer]",
        "1",
        "Global norm of the gradient before it was clipped, of the order that the rule reads.",
    ),
    _tag(
        "clip/coefficient[/optimizer][/group]",
        "1",
        "Factor that clipping put on the gradient; 1 where it did not act. The mean where there "
        "is one for each tensor.",
    ),
    _tag(
        "clip/threshold[/optimizer][/group]",
        "1",
        "Norm from which on clipping acted in this update.",
    ),
    _tag(
        "clip/fraction[/optimizer][/group]",
        "1",
        "Share of the finite updates since the last logged one that were clipped (of the tensors "
        "where each has its own coefficient).",
    ),
    _tag(
        "layers/grad_norm/<layer>[/optimizer]",
        "1",
        "Norm of a layer's gradient before it was clipped.",
    ),
    _tag(
        "layers/weight_norm/<layer>[/optimizer]",
        "1",
        "Norm of a layer's weights before the update, of those that have a gradient in it.",
    ),
    _tag(
        "layers/update_ratio/<layer>[/optimizer]",
        "1",
        "Norm of the change in a layer's weights from before the update to the end of its batch, "
        "over their norm before.",
    ),
    _tag(
        "layers/zeros/<layer>[/optimizer]",
        "1",
        "Share of the entries of a layer's gradient that are zero.",
    ),
    _tag(
        "histograms/grad/<parameter>",
        "1",
        "Histogram of a parameter's gradient before it was clipped, on request.",
    ),
    _tag("batch/global_size", "samples", "Samples over all processes in this update."),
    _tag("batch/micro_size", "samples", "Samples of one process in the last micro-batch."),
    _tag("batch/accumulate", "micro-batches", "Micro-batches of one process in this update."),
    _tag(
        "batch/planned_size",
        "samples",
        "Global batch that the policy planned; an epoch's last update may hold fewer.",
    ),
    _tag("batch/lr_factor", "1", "Factor on the learning rate because the batch changed."),
    _tag(
        "noise_scale/simple",
        "samples",
        "Batch at which noise and signal of the gradient are equal, where it is measured.",
    ),
    _tag("noise_scale/standard_error", "samples", "Standard error of the noise scale."),
    _tag(
        "noise_scale/noise",
        "1",
        "Trace of the covariance of one sample's gradient, a running mean.",
    ),
    _tag("noise_scale/signal", "1", "Squared norm of the true gradient, a running mean."),
    _tag(
        "guard/skipped",
        "updates",
        "Updates that the guard has refused since the beginning of the run.",
    ),
    _tag(
        "guard/rejected/<detector>",
        "updates",
        "Updates that a detector of the guard has objected to since the beginning of the run, "
        "refused or shrunk.",
    ),
    _tag(
        "progress/samples",
        "samples",
        "Samples over all processes consumed, this update included.",
    ),
    _tag(
        "progress/tokens", "tokens", "Tokens over all processes consumed, where they are counted."
    ),
    _tag(
        "throughput/samples_per_second",
        "samples/s",
        "Samples over all processes since the last logged update, per second outside validation.",
    ),
    _tag(
        "throughput/tokens_per_second",
        "tokens/s",
        "Tokens over all processes since the last logged update, where they are counted.",
    ),
    _tag(
        "time/step_median",
        "s",
        "Median time of the last updates, 128 at most; by the GPU's clock where there is one.",
    ),
    _tag("time/step_p95", "s", "95th percentile of the same."),
    _tag(
        "memory/allocated_peak", "GiB", "Most GPU memory in tensors since the last logged update."
    ),
    _tag("memory/reserved_peak", "GiB", "Most GPU memory reserved since the last logged update."),
    _tag("plan/lr[/optimizer][/group]", "1", "Learning rate as planned before the first update."),
    _tag("plan/global_size", "samples", "Global batch as planned before the first update."),
)
