"""``bigopt report``: writes the report of a run as one HTML file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_bigopt.cli.command import Command, require

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["REPORT"]


def make_parser(**texts: Any) -> ArgumentParser:
    """Makes the parser of ``bigopt report``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(**texts)
    parser.add_argument("logdir", type=str, help="Log folder of a run.")
    parser.add_argument(
        "--beside", type=str, default=None, help="Log folder of another run, shown beside it."
    )
    parser.add_argument("--output", type=str, default="report.html", help="HTML file to write.")
    return parser


def run(options: Namespace) -> None:
    """Writes the report of a run as one HTML file."""
    require("matplotlib", extra="plot")
    from lightning_bigopt.reporting.report import write_report

    folders = [options.logdir] if options.beside is None else [options.logdir, options.beside]
    print(write_report(folders, options.output))


REPORT = Command(
    summary="Writes the report of a run as one HTML file.",
    examples=[
        ("bigopt report runs/gpt/version_0", "an interrupted run works too"),
        ("bigopt report runs/gpt/version_0 --beside runs/gpt/version_1", "two runs side by side"),
    ],
    parser=make_parser,
    run=run,
)
