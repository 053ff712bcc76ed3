"""The table of all logged tags, with their units and meanings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from lightning_bigopt.type_checks import check_instance

__all__ = ["TAGS", "Tag", "find_tag", "tag_name"]


@dataclass(frozen=True, kw_only=True)
class Tag:
    """One logged quantity, or a family of quantities.

    Args:
        name: Name in the logger. ``<...>`` stands for a name from the model; ``[...]`` is omitted
            if there is only one of its kind.
        unit: Unit of the values; ``"1"`` for a dimensionless quantity.
        meaning: Description in one sentence.

    Example:
        >>> next(tag.unit for tag in TAGS if tag.name == "clip/coefficient[/optimizer][/group]")
        '1'
    """

    name: str
    unit: str
    meaning: str

    def matches(self, name: str) -> bool:
        """Returns whether a logged name belongs to this tag.

        Example:
            >>> find_tag("optim/lr/decay").matches("optim/lr")
            True
        """
        pattern = re.sub(r"\\\[/\w+\\\]", "(/[^/]+)?", re.escape(self.name))
        pattern = re.sub(r"<\w+>", ".+", pattern)
        return re.fullmatch(pattern, name) is not None


def find_tag(name: str) -> Tag | None:
    """Returns the tag that a logged name belongs to; None if no tag matches.

    Example:
        >>> find_tag("layers/grad_norm/blocks.3").unit
        '1'
        >>> find_tag("train_loss") is None
        True
    """
    check_instance("name", name, str, hint="write a logged name such as 'optim/lr'")
    return next((tag for tag in TAGS if tag.matches(name)), None)


@cache  # called with the same parts at every logged update
def tag_name(*parts: str) -> str:
    """Joins parts to a name in the logger; omits empty parts and replaces special characters.

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
        "Global norm of the gradient before clipping, of the order that the clipping rule uses. "
        'With GradientClipping(scope="all") also that of several optimizers together.',
    ),
    _tag(
        "clip/coefficient[/optimizer][/group]",
        "1",
        "Factor by which clipping multiplied the gradient; 1 if it did not act. The mean if each "
        "tensor has its own factor.",
    ),
    _tag(
        "clip/threshold[/optimizer][/group]",
        "1",
        "Norm above which clipping acts in this update.",
    ),
    _tag(
        "clip/fraction[/optimizer][/group]",
        "1",
        "Fraction of the finite updates since the last logged one that were clipped; the fraction "
        "of tensors if each has its own coefficient.",
    ),
    _tag(
        "stability/spike_score/norm[/optimizer]",
        "1",
        "Fraction of the compared updates (finite, from the 64th on) whose gradient norm was more "
        "than 6 standard deviations above the mean of the 128 before it.",
    ),
    _tag(
        "stability/spike_score/loss[/optimizer]",
        "1",
        "Fraction of the compared updates (finite, from the 64th on) whose loss was more than 6 "
        "standard deviations above the mean of the 128 before it.",
    ),
    _tag(
        "layers/grad_norm/<layer>[/optimizer]",
        "1",
        "Norm of a layer's gradient before clipping.",
    ),
    _tag(
        "layers/weight_norm/<layer>[/optimizer]",
        "1",
        "Norm of a layer's weights before the update; only weights with a gradient count.",
    ),
    _tag(
        "layers/update_ratio/<layer>[/optimizer]",
        "1",
        "Norm of the change in a layer's weights, from before the update to the end of its batch, "
        "divided by their norm before.",
    ),
    _tag(
        "update_ratio/<quantile>[/optimizer]",
        "1",
        "Minimum, median and maximum over the layers of layers/update_ratio.",
    ),
    _tag(
        "layers/zeros/<layer>[/optimizer]",
        "1",
        "Fraction of the entries of a layer's gradient that are zero.",
    ),
    _tag(
        "activations/rms/<module>",
        "1",
        "Root mean square of the outputs of a module in this update, on process 0.",
    ),
    _tag(
        "activations/max/<module>",
        "1",
        "Largest absolute value of the outputs of a module, on process 0.",
    ),
    _tag(
        "activations/zeros/<module>",
        "1",
        "Fraction of the elements of the outputs of a module that are zero, on process 0.",
    ),
    _tag(
        "activations/grad_rms/<module>",
        "1",
        "Root mean square of the gradient of the outputs of a module, on process 0.",
    ),
    _tag(
        "activations/grad_max/<module>",
        "1",
        "Largest absolute value of the gradient of the outputs of a module, on process 0.",
    ),
    _tag(
        "activations/grad_zeros/<module>",
        "1",
        "Fraction of zeros in the gradient of the outputs of a module, on process 0.",
    ),
    _tag(
        "histograms/grad/<parameter>",
        "1",
        "Histogram of a parameter's gradient before clipping, if histograms_every is set.",
    ),
    _tag("batch/global_size", "samples", "Samples over all processes in this update."),
    _tag("batch/micro_size", "samples", "Samples of one process in the last micro-batch."),
    _tag("batch/accumulate", "micro-batches", "Micro-batches of one process in this update."),
    _tag(
        "batch/planned_size",
        "samples",
        "Global batch that the policy planned; the last update of an epoch may hold fewer samples.",
    ),
    _tag("batch/lr_factor", "1", "Factor on the learning rate that follows the batch size."),
    _tag("batch/branch_samples", "samples", "Samples of all branches of MeasuredBatchSize so far."),
    _tag(
        "batch/doubling_cost",
        "loss",
        "Difference of the loss with twice the batch, at the last measurement.",
    ),
    _tag(
        "noise_scale/simple",
        "samples",
        "Batch size at which noise and signal of the gradient are equal.",
    ),
    _tag("noise_scale/standard_error", "samples", "Standard error of the noise scale."),
    _tag(
        "noise_scale/noise",
        "1",
        "Running mean of the trace of the covariance of one sample's gradient.",
    ),
    _tag("noise_scale/signal", "1", "Running mean of the squared norm of the true gradient."),
    _tag(
        "communication/bytes",
        "bytes",
        "Bytes that each process sends to average the gradient of this update, by ring algorithms.",
    ),
    _tag(
        "communication/dense_bytes",
        "bytes",
        "Bytes that each process would send for this update without compression.",
    ),
    _tag(
        "guard/skipped",
        "updates",
        "Updates that the guard has skipped since the beginning of the run.",
    ),
    _tag(
        "guard/rejected/<detector>",
        "updates",
        "Updates that a detector of the guard has rejected since the beginning of the run; the "
        "guard has skipped or clipped them.",
    ),
    _tag("rollback/count", "rollbacks", "Rollbacks to a snapshot since the beginning of the run."),
    _tag(
        "rollback/left_out",
        "samples",
        "Samples between snapshots and the updates that were rolled back, since the beginning of "
        "the run; batches of one process where samples are not counted.",
    ),
    _tag("rollback/loss_before", "1", "Smoothed loss before the last rollback."),
    _tag("rollback/loss_after", "1", "Mean loss of the first accepted updates after it."),
    _tag(
        "rollback/discarded_loss",
        "1",
        "Loss of an update that a rollback has undone, at the step of that update; in other "
        "loggers than TensorBoard the mean over them, at the step of the rollback.",
    ),
    _tag(
        "progress/samples",
        "samples",
        "Samples consumed over all processes, including this update.",
    ),
    _tag("progress/tokens", "tokens", "Tokens consumed over all processes, if they are counted."),
    _tag(
        "throughput/samples_per_second",
        "samples/s",
        "Samples per second over all processes since the last logged update, without validation.",
    ),
    _tag(
        "throughput/tokens_per_second",
        "tokens/s",
        "Tokens per second over all processes since the last logged update, if they are counted.",
    ),
    _tag(
        "time/step_median",
        "s",
        "Median time of up to 128 recent updates; measured on the GPU if there is one.",
    ),
    _tag("time/step_p95", "s", "95th percentile of the time of up to 128 recent updates."),
    _tag(
        "memory/allocated_peak",
        "GiB",
        "Peak GPU memory allocated to tensors since the last logged update.",
    ),
    _tag("memory/reserved_peak", "GiB", "Peak GPU memory reserved since the last logged update."),
    _tag("plan/lr[/optimizer][/group]", "1", "Learning rate planned before the first update."),
    _tag("plan/global_size", "samples", "Global batch planned before the first update."),
)
