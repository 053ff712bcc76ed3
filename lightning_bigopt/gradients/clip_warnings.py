"""Warnings about clipping that follows clipping by other code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lightning_bigopt.durations.duration import amount_of
from lightning_bigopt.gradients.clip_statistics import ClipReport

__all__ = ["clip_warnings"]


def clip_warnings(reports: Mapping[tuple[str, str], ClipReport]) -> Iterator[str]:
    """Yields a warning for each report of gradients that were clipped before.

    Args:
        reports: Reports by label of the optimizer and group of the rule; both may be empty.

    Example:
        >>> from lightning_bigopt.gradients.norm_sample import Repetition
        >>> report = ClipReport(
        ...     updates=200,
        ...     clipped=0,
        ...     threshold=9.0,
        ...     median=0.7,
        ...     p95=0.7,
        ...     repeated=Repetition(norm=0.7, fraction=0.9),
        ... )
        >>> next(clip_warnings({("", ""): report})).split(";")[0]
        'gradients must reach GradientClipping before they are clipped, got the norm 0.7 in 90% of \
200 updates'
    """
    for (label, group), report in reports.items():
        if report.repeated is None:
            continue
        names = "".join(f" of {name}" for name in (label, group) if name)
        yield (
            f"gradients{names} must reach GradientClipping before they are clipped, got the "
            f"norm {report.repeated.norm:.4g} in {report.repeated.fraction:.0%} of "
            f"{amount_of(report.updates, 'updates')}; remove clip_grad_norm_ or clip_gradients "
            "from the module (on_after_backward, or before optimizer.step() in manual "
            "optimization), or remove GradientClipping; if nothing clips them, ignore this warning"
        )
