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
    parser.add_argument(
        "--pilots",
        type=str | None,
        default=None,
        help="Folder with logs of short runs, from which the loss is predicted.",
    )
    parser.add_argument(
        "--loss", type=str, default="val_loss", help="Name of the loss in the logs of the pilots."
    )
    parser.add_argument(
        "--start", type=int, default=0, help="Update from which the losses of the pilots count."
    )
    return parser


def run(options: Namespace) -> None:
    """Prints the plan of a run without training, and draws it with ``--picture``."""
    if options.picture is not None:
        require("matplotlib", extra="plot")
    if options.pilots is not None:
        require("scipy", extra="laws")
    from lightning_bigopt.cli.package_of_config import model_path, training_class
    from lightning_bigopt.planning.loss_law import LossLaw
    from lightning_bigopt.reporting.loss_runs import read_loss_curves
    from lightning_bigopt.tuning.run_plan import plan

    law = None
    if options.pilots is not None:
        curves = read_loss_curves(options.pilots, loss=options.loss)
        law = LossLaw.fit(curves, start=options.start)
    training = training_class(model_path(["--config", options.config]))
    configured = training.read(options.config)
    planned = plan(configured.trainer, configured.model, datamodule=configured.datamodule, law=law)
    print(planned)
    if options.picture is not None:
        print(f"picture: {planned.picture(options.picture)}")


PLAN = Command(
    summary="Prints the plan of a run without training.",
    examples=[
        ("bigopt plan examples/gpt.yaml", ""),
        ("bigopt plan examples/gpt.yaml --picture plan.png", "also draws it"),
        ("bigopt plan examples/gpt.yaml --pilots runs/pilots", "also predicts the loss"),
    ],
    parser=make_parser,
    run=run,
)
