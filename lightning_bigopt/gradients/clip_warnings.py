"""Warnings about clipping that has no effect, or follows clipping by other code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lightning_bigopt.durations.duration import amount_of
from lightning_bigopt.gradients.clip_statistics import ENOUGH_TO_WARN, ClipReport
from lightning_bigopt.gradients.rules.clipping_rule import ClippingRule
from lightning_bigopt.gradients.rules.norm_clip import NormClip, PerParameterNormClip
from lightning_bigopt.gradients.rules.rule_groups import Groups

__all__ = ["clip_warnings"]


def clip_warnings(
    rule: ClippingRule, reports: Mapping[tuple[str, str], ClipReport]
) -> Iterator[str]:
    """Yields a warning for each report of clipping that was not effective.

    Args:
        rule: The clipping rule.
        reports: Reports by label of the optimizer and group of the rule; both may be empty.

    Example:
        >>> report = ClipReport(
        ...     updates=200, clipped=0, threshold=9.0, median=0.2, p95=0.4, largest=0.5
        ... )
        >>> next(clip_warnings(NormClip(9.0), {("", ""): report})).split(",")[0]
        'max_norm must be below some norms of a run to have an effect'
    """
    rules = dict(rule.pairs) if isinstance(rule, Groups) else {"": rule}
    for (label, group), report in reports.items():
        names = "".join(f" of {name}" for name in (label, group) if name)
        updates = amount_of(report.updates, "updates")
        if report.repeated is not None:
            yield (
                f"gradients{names} must reach GradientClipping before they are clipped, got the "
                f"norm {report.repeated.norm:.4g} in {report.repeated.fraction:.0%} of {updates}; "
                "remove clip_grad_norm_ from the module (on_after_backward, or before "
                "optimizer.step() in manual optimization), or remove GradientClipping"
            )
        elif isinstance(rules[group], NormClip | PerParameterNormClip) and (
            report.updates >= ENOUGH_TO_WARN and report.clipped == 0 and report.threshold
        ):
            yield (
                f"max_norm must be below some norms of a run to have an effect, got "
                f"{report.threshold:.4g}{names}, and norms up to {report.largest:.4g} in "
                f"{updates}; lower it to {report.p95:.2g} to clip one update in twenty, or remove "
                "the rule"
            )
