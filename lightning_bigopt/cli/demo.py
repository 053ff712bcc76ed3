"""``bigopt demo``: the same model with and without our callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_bigopt.cli.command import Command, require

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["DEMO"]


def make_parser(**texts: Any) -> ArgumentParser:
    """The options of ``bigopt demo``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(**texts)
    parser.add_argument(
        "--max-steps",
        type=int,
        default=500,
        help="Optimizer updates of the run with our callbacks; the others see as many samples.",
    )
    parser.add_argument("--devices", type=int, default=1, help="Processes; a divisor of 32.")
    parser.add_argument("--strategy", type=str, default="auto", help="Such as ddp.")
    parser.add_argument("--accelerator", type=str, default="cpu", help="Such as cpu or gpu.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights and data order.")
    parser.add_argument("--logdir", type=str, default="runs/demo", help="For logs and picture.")
    return parser


def run(options: Namespace) -> None:
    """Trains a small GPT with and without our callbacks and prints the difference."""
    require("matplotlib", extra="plot")
    from lightning_bigopt.examples.demo import Demo

    Demo(**options.as_dict()).run()


DEMO = Command(
    summary="Trains a small GPT with and without our callbacks and prints the difference.",
    examples=[
        ("bigopt demo", "three to four minutes on two cores"),
        ("bigopt demo --max-steps 50", "a glance"),
        ("bigopt demo --devices 2 --strategy ddp", "on two processes"),
    ],
    parser=make_parser,
    run=run,
)
