"""``bigopt demo``: trains one model with and without the callbacks of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_bigopt.cli.command import Command, require

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["DEMO"]


def make_parser(**texts: Any) -> ArgumentParser:
    """Makes the parser of ``bigopt demo``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(**texts)
    parser.add_argument(
        "--max-steps",
        type=int,
        default=500,
        help="Optimizer updates with the callbacks; the other runs use as many samples.",
    )
    parser.add_argument("--devices", type=int, default=1, help="Processes; a divisor of 32.")
    parser.add_argument("--strategy", type=str, default="auto", help="Strategy, such as ddp.")
    parser.add_argument("--accelerator", type=str, default="cpu", help="Accelerator: cpu or gpu.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights and data order.")
    parser.add_argument(
        "--logdir", type=str, default="runs/demo", help="Folder for the logs and the picture."
    )
    return parser


def run(options: Namespace) -> None:
    """Trains a small GPT with and without the callbacks and prints a comparison."""
    require("matplotlib", extra="plot")
    from lightning_bigopt.examples.demo import Demo

    Demo(**options.as_dict()).run()


DEMO = Command(
    summary="Trains a small GPT with and without the callbacks and prints a comparison.",
    examples=[
        ("bigopt demo", "about 4 minutes on two cores"),
        ("bigopt demo --max-steps 50", "a short run"),
        ("bigopt demo --devices 2 --strategy ddp", "on two processes"),
    ],
    parser=make_parser,
    run=run,
)
