"""``bigopt schedules``: lists the schedules, or shows some over a budget as text or picture."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_bigopt.checks import shown
from lightning_bigopt.cli.command import Command, require
from lightning_bigopt.cli.expressions import parse_schedule, schedule_names

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from lightning_bigopt.schedules.base import Schedule

__all__ = ["SCHEDULES"]

_BLOCKS = " ▁▂▃▄▅▆▇█"
_WIDTH = 64


def make_parser(**texts: Any) -> ArgumentParser:
    """Makes the parser of ``bigopt schedules``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(**texts)
    parser.add_argument(
        "schedules",
        nargs="*",
        type=str,
        default=[],
        help="Schedules to show, with or without arguments; all are listed if none is given.",
    )
    parser.add_argument("--max-steps", type=int, default=1000, help="Updates in the run.")
    parser.add_argument(
        "--picture", type=str, default=None, help="File for a picture of them all, such as wsd.png."
    )
    return parser


def run(options: Namespace) -> None:
    """Lists all schedules, or shows those on the command line."""
    if options.max_steps <= 0:
        raise ValueError(f"max-steps must be positive, got {shown(options.max_steps)}; write 1000")
    if not options.schedules:
        if options.picture is not None:
            raise ValueError(
                "picture must come with the schedules to draw, got none; add one, such as Cosine"
            )
        print(format_list())
        return
    chosen = [parse_schedule(text) for text in options.schedules]
    print("\n\n".join(describe(schedule, options.max_steps) for schedule in chosen))
    if options.picture is not None:
        draw(chosen, options.max_steps, options.picture)
        print(f"\npicture: {options.picture}")


def format_list() -> str:
    """Returns one line for each schedule: its name and the summary of its docstring."""
    from lightning_bigopt import schedules

    width = max(map(len, schedule_names()))
    return "\n".join(
        f"{name.ljust(width)}  {summary(getattr(schedules, name))}" for name in schedule_names()
    )


def summary(schedule: type[Schedule]) -> str:
    """Returns the summary of a class's docstring in plain text, without its markup."""
    first = (inspect.getdoc(schedule) or "").partition("\n\n")[0]
    return " ".join(re.sub(r"(?::\w+:)?(`+)(.*?)\1", r"\2", first).split())


def describe(schedule: Schedule, max_steps: int) -> str:
    """Describes a schedule: summary, curve in block characters, table of factors, boundaries.

    Example:
        >>> from lightning_bigopt import WarmupStableDecay
        >>> print(describe(WarmupStableDecay(), 100).splitlines()[-1].strip())
        boundaries: warmup ends 2, cooldown starts 80
    """
    from lightning_bigopt.durations.horizon import Horizon

    resolved = schedule.resolve(Horizon.of_steps(max_steps))
    lines = [repr(schedule), f"  {summary(type(schedule))}", f"  {_block_curve(resolved)}"]
    tenths = [tenth / 10 for tenth in range(11)]
    for title, cells in (
        ("update", [f"{tenth * max_steps:.0f}" for tenth in tenths]),
        ("factor", [f"{resolved(tenth):.3g}" for tenth in tenths]),
    ):
        lines.append(f"  {title}" + "".join(cell.rjust(7) for cell in cells))
    ends = [f"{name} {share * max_steps:.6g}" for name, share in resolved.boundaries().items()]
    return "\n".join([*lines, *([f"  boundaries: {', '.join(ends)}"] if ends else [])])


def _block_curve(schedule: Schedule) -> str:
    """Returns the curve in block characters; a full block is the highest factor."""
    factors = [schedule(column / (_WIDTH - 1)) for column in range(_WIDTH)]
    highest = max(factors) or 1.0
    steps = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round(factor / highest * steps)] for factor in factors)


def draw(schedules: Sequence[Schedule], max_steps: int, path: str) -> None:
    """Draws several schedules in one picture.

    Args:
        schedules: The schedules.
        max_steps: Updates in the run.
        path: File to write; its suffix selects the format.

    Raises:
        ValueError: If the file is a folder or cannot be written.
    """
    require("matplotlib", extra="plot")
    from lightning_bigopt.reporting.picture import write_picture

    write_picture(
        lambda: _figure(schedules, max_steps), path, name="picture", example="schedules.png"
    )


def _figure(schedules: Sequence[Schedule], max_steps: int) -> Any:
    from matplotlib.figure import Figure

    from lightning_bigopt.reporting.picture import drawn_label, plain_text
    from lightning_bigopt.reporting.plots import plot_schedule

    with plain_text():
        figure = Figure(figsize=(8, 4), layout="constrained")
        ax = figure.subplots()
        curves = []
        for schedule in schedules:
            count = len(ax.lines)
            plot_schedule(schedule, max_steps, ax=ax)
            curves.append(ax.lines[count])  # the curve is drawn first, then its boundaries
            curves[-1].set_label(drawn_label(repr(schedule)))
        ax.relim()
        ax.autoscale(axis="y")
        ax.set_ylim(bottom=0)
        figure.legend(handles=curves, loc="outside lower center", fontsize="small")
    return figure


SCHEDULES = Command(
    summary="Lists the schedules, or shows some of them as text or as a picture.",
    examples=[
        ("bigopt schedules", "lists all"),
        ("bigopt schedules WarmupStableDecay", "shows one with its defaults"),
        ("bigopt schedules \"WarmupCosine(warmup='5%', end=0.1)\" Linear", "shows two"),
        ("bigopt schedules WarmupStableDecay --picture wsd.png", "also draws it"),
    ],
    parser=make_parser,
    run=run,
)
