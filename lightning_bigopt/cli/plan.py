"""``bigopt plan``: a whole run before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_bigopt.cli.command import Command, require

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["PLAN"]


def make_parser(**texts: Any) -> ArgumentParser:
    """The options of ``bigopt plan``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(**texts)
    parser.add_argument(
        "config", type=str, help="A config as for bigopt fit: trainer, model, data."
    )
    parser.add_argument("--picture", type=str, default=None, help="Draw it, such as plan.png.")
    return parser


def run(options: Namespace) -> None:
    """Prints a whole run before anything is trained."""
    if options.picture is not None:
        require("matplotlib", extra="plot")
    from lightning_bigopt.cli.config import ConfiguredTraining
    from lightning_bigopt.reporting.plan import plan

    configured = ConfiguredTraining.read(options.config)
    found = plan(configured.trainer, configured.model, datamodule=configured.datamodule)
    print(found)
    if options.picture is not None:
        print(f"picture: {found.picture(options.picture)}")


PLAN = Command(
    summary="Prints a whole run before anything is trained.",
    examples=[
        ("bigopt plan examples/gpt.yaml", ""),
        ("bigopt plan examples/gpt.yaml --picture plan.png", "and draws it"),
    ],
    parser=make_parser,
    run=run,
)
