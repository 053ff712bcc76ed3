"""Draws the expected loss of a run with its band."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_bigopt.planning.expected_loss import ExpectedLoss
from lightning_bigopt.reporting.picture import drawn_label, plain_text, set_number_format

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_expected_loss", "plan_with_loss"]

_OTHERS = "#a0aec0"


def plan_with_loss(paint: Callable[[Axes], int], expected: Sequence[ExpectedLoss]) -> Any:
    """Makes a figure with the plan above, and the expected losses below on the same updates.

    Args:
        paint: Draws the plan.
        expected: The expected losses; the first is that of the run, with its band.

    Returns:
        The ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    with plain_text():
        figure = Figure(figsize=(8.0, 5.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        paint(above)
        above.set_xlabel("")
        draw_expected_loss(expected, below)
    return figure


def draw_expected_loss(expected: Sequence[ExpectedLoss], axis: Axes) -> None:
    """Draws expected losses against updates: the first with its band, the others in gray."""
    first, *others = expected
    for other in others:
        axis.plot(other.updates, other.losses, color=_OTHERS, linewidth=0.8)
    axis.fill_between(first.updates, first.low, first.high, alpha=0.25, linewidth=0)
    axis.plot(first.updates, first.losses, label=drawn_label(first.name or "this run"))
    if others:
        axis.plot([], [], color=_OTHERS, linewidth=0.8, label="other schedules")
    low, high = first.final_band
    axis.set_title(
        f"expected loss {first.final:.3f}, 90 % band {low:.3f} to {high:.3f}", fontsize="small"
    )
    axis.set(xlabel="update", ylabel="loss")
    # The first tenth of the run falls so far that the end would be a flat line.
    start = next(i for i, update in enumerate(first.updates) if update >= first.updates[-1] / 10)
    bottom = min(min(run.low[start:]) for run in (first, *others))
    axis.set_ylim(bottom, max(first.high[start], bottom + 1e-6))
    set_number_format(axis, is_log=False)
    axis.legend(fontsize=8, frameon=False)
