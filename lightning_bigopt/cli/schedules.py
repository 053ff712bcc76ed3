"""``bigopt schedules``: lists them, or shows some over a budget as text or picture."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_bigopt.cli.command import Command, require
from lightning_bigopt.cli.expressions import parse_schedule, schedule_names

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from lightning_bigopt.schedules import Schedule

__all__ = ["SCHEDULES"]

_BLOCKS = " ▁▂▃▄▅▆▇█"
_WIDTH = 64


def make_parser(**texts: Any) -> ArgumentParser:
    """The options of ``bigopt schedules``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(**texts)
    parser.add_argument(
        "schedules",
        nargs="*",
        type=str,
        default=[],
        help="Schedules to show, with or without arguments; none: list all.",
    )
    parser.add_argument("--max-steps", type=int, default=1000, help="Updates of the whole run.")
    parser.add_argument(
        "--picture", type=str, default=None, help="Draw them all in one file, such as wsd.png."
    )
    return parser


def run(options: Namespace) -> None:
    """Lists all schedules, or shows those that are named."""
    if options.max_steps <= 0:
        raise ValueError(f"max-steps must be positive, got {options.max_steps!r}")
    if not options.schedules:
        if options.picture is not None:
            raise ValueError("picture must come with the schedules to draw, got none of them")
        print(listing())
        return
    chosen = [parse_schedule(text) for text in options.schedules]
    print("\n\n".join(described(schedule, options.max_steps) for schedule in chosen))
    if options.picture is not None:
        draw(chosen, options.max_steps, options.picture)
        print(f"\npicture: {options.picture}")


def listing() -> str:
    """Every schedule with a sentence."""
    from lightning_bigopt import schedules

    width = max(map(len, schedule_names()))
    return "\n".join(
        f"{name.ljust(width)}  {sentence(getattr(schedules, name))}" for name in schedule_names()
    )


def sentence(schedule: type[Schedule]) -> str:
    """The first sentence of a docstring, in plain text."""
    first = (inspect.getdoc(schedule) or "").partition("\n\n")[0]
    return " ".join(re.sub(r"(?::\w+:)?(`+)(.*?)\1", r"\2", first).split())


def described(schedule: Schedule, max_steps: int) -> str:
    """A schedule in words, its seams and its factors as a line of blocks and as numbers.

    Example:
        >>> from lightning_bigopt import WarmupStableDecay
        >>> print(described(WarmupStableDecay(), 100).splitlines()[-1].strip())
        seams: warmup ends 2, cooldown starts 80
    """
    from lightning_bigopt.durations import Horizon

    resolved = schedule.resolve(Horizon.of_steps(max_steps))
    lines = [repr(schedule), f"  {sentence(type(schedule))}", f"  {_blocks(resolved)}"]
    tenths = [tenth / 10 for tenth in range(11)]
    for title, cells in (
        ("update", [f"{tenth * max_steps:.0f}" for tenth in tenths]),
        ("factor", [f"{resolved(tenth):.3g}" for tenth in tenths]),
    ):
        lines.append(f"  {title}" + "".join(cell.rjust(7) for cell in cells))
    seams = [f"{name} {share * max_steps:.6g}" for name, share in resolved.boundaries().items()]
    return "\n".join([*lines, *([f"  seams: {', '.join(seams)}"] if seams else [])])


def _blocks(schedule: Schedule) -> str:
    """The curve in blocks, the highest of them for the highest factor."""
    factors = [schedule(column / (_WIDTH - 1)) for column in range(_WIDTH)]
    highest = max(factors) or 1.0
    steps = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round(factor / highest * steps)] for factor in factors)


def draw(schedules: Sequence[Schedule], max_steps: int, path: str) -> None:
    """Draws schedules over each other.

    Args:
        schedules: What to draw.
        max_steps: Updates of the whole run.
        path: The file; its ending is its format.
    """
    require("matplotlib", extra="plot")
    from matplotlib.figure import Figure

    from lightning_bigopt.reporting.plots import plot_schedule

    figure = Figure(figsize=(8, 4), layout="constrained")
    ax = figure.subplots()
    curves = []
    for schedule in schedules:
        first = len(ax.lines)
        plot_schedule(schedule, max_steps, ax=ax)
        curves.append(ax.lines[first])
        curves[-1].set_label(repr(schedule))
    ax.relim()
    ax.autoscale(axis="y")
    ax.set_ylim(bottom=0)
    figure.legend(handles=curves, loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=120)


SCHEDULES = Command(
    summary="Lists the schedules, or shows some of them as text or picture.",
    examples=[
        ("bigopt schedules", "all, with a sentence each"),
        ("bigopt schedules WarmupStableDecay", "one, with its defaults"),
        ("bigopt schedules \"WarmupCosine(warmup='5%', end=0.1)\" Linear", "with arguments; two"),
        ("bigopt schedules WarmupStableDecay --picture wsd.png", "drawn"),
    ],
    parser=make_parser,
    run=run,
)
