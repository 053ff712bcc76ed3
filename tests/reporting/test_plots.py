"""Plots of schedules."""

from __future__ import annotations

import sys

import matplotlib as mpl
import pytest

from lightning_bigopt.durations import Horizon
from lightning_bigopt.reporting.plots import axes_of, plot_schedule
from lightning_bigopt.schedules import Linear, MultiStep, WarmupStableDecay

mpl.use("agg")


def test_line_is_the_schedule_over_the_budget():
    schedule = WarmupStableDecay(warmup="50 steps", decay="20%", cooldown="linear")
    ax = plot_schedule(schedule, 1000)
    resolved = schedule.resolve(Horizon.of_steps(1000))
    xs, ys = ax.lines[0].get_data()
    assert (min(xs), max(xs)) == (0, 1000)
    assert list(ys) == pytest.approx([resolved(x / 1000) for x in xs])
    seams = sorted(line.get_xdata()[0] for line in ax.lines[1:])
    assert seams == pytest.approx([50, 800])


def test_jump_is_drawn_as_a_vertical_line():
    ax = plot_schedule(MultiStep(milestones={"30.05%": 0.1}), 1000)
    xs, ys = ax.lines[0].get_data()
    width = min(b - a for a, b, y, z in zip(xs, xs[1:], ys, ys[1:], strict=False) if y != z)
    assert width <= 1.0  # 1/1000 of the axis


def test_plot_uses_given_axes_and_labels_the_unit():
    ax = axes_of()
    assert plot_schedule(Linear(), Horizon(clock="tokens", budget=2e9), ax=ax) is ax
    assert ax.get_xlabel() == "tokens"


def test_missing_matplotlib_raises_with_the_install_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-bigopt\[plot\]'"):
        plot_schedule(Linear(), 100)
