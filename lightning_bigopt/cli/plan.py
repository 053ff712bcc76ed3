"""``bigopt plan``: prints the plan of a run without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_bigopt.cli.command import Command, require

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["PLAN"]


def make_parser(**texts: Any) -> ArgumentParser:
    """Makes the parser of ``bigopt plan``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(**texts)
    parser.add_argument(
        "config", type=str, help="Config file as for bigopt fit: trainer, model, data."
    )
    parser.add_argument(
        "--picture", type=str, default=None, help="File for a picture, such as plan.png."
    )
    return parser


def run(options: Namespace) -> None:
    """Prints the plan of a run without training, and draws it with ``--picture``."""
    if options.picture is not None:
        require("matplotlib", extra="plot")
    from lightning_bigopt.cli.package_of_config import model_path, training_class
    from lightning_bigopt.tuning.run_plan import plan

    training = training_class(model_path(["--config", options.config]))
    configured = training.read(options.config)
    planned = plan(configured.trainer, configured.model, datamodule=configured.datamodule)
    print(planned)
    if options.picture is not None:
        print(f"picture: {planned.picture(options.picture)}")


PLAN = Command(
    summary="Prints the plan of a run without training.",
    examples=[
        ("bigopt plan examples/gpt.yaml", ""),
        ("bigopt plan examples/gpt.yaml --picture plan.png", "also draws it"),
    ],
    parser=make_parser,
    run=run,
)
