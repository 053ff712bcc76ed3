"""Plots of schedules; matplotlib is imported only when a plot is drawn."""

from __future__ import annotations

from typing import Any

from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.schedules.base import Schedule

__all__ = ["axes_of", "plot_schedule"]


def plot_schedule(schedule: Schedule, horizon: Horizon | int, *, ax: Any = None) -> Any:
    """Plots the factor of a schedule over a budget, with a vertical line at each stage boundary.

    Args:
        schedule: The schedule.
        horizon: The budget; an int counts updates.
        ax: Matplotlib axes to draw on; None for new ones.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If a duration of the schedule does not fit into the horizon.

    Example:
        >>> from lightning_bigopt import WarmupStableDecay
        >>> ax = plot_schedule(WarmupStableDecay(warmup="5%", decay="20%"), 1000)
        >>> ax.get_xlabel()
        'steps'
    """
    ax = axes_of(ax)
    if isinstance(horizon, int):
        horizon = Horizon.of_steps(horizon)
    resolved = schedule.resolve(horizon)
    boundaries = resolved.boundaries().values()
    points = {i / _POINTS for i in range(_POINTS + 1)}
    # A point on each side of a boundary, so that a jump is drawn as a vertical line.
    points |= {min(max(at + side, 0.0), 1.0) for at in boundaries for side in (-1e-9, 1e-9)}
    fractions = sorted(points)
    factors = [resolved(fraction) for fraction in fractions]
    ax.plot([fraction * horizon.budget for fraction in fractions], factors)
    for boundary in boundaries:
        ax.axvline(boundary * horizon.budget, color="0.8", linewidth=0.8, zorder=0)
    ax.set(xlabel=horizon.clock, ylabel="factor", ylim=(min(0.0, *factors), 1.05 * max(factors)))
    return ax


_POINTS = 1000


def axes_of(ax: Any = None) -> Any:
    """Returns the given matplotlib axes, or new ones for None.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "matplotlib must be installed to draw; run pip install 'lightning-bigopt[plot]'"
        ) from error
    _, ax = plt.subplots()
    return ax
