"""``bigopt fit``: trains the model of a LightningCLI config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_bigopt.cli.command import Command

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["FIT"]

_USAGE = "bigopt fit --config CONFIG [--trainer.max_steps N] [other options of the config]"


def make_parser(*, arguments: Sequence[str] = (), **texts: Any) -> ArgumentParser:
    """Makes the parser of ``bigopt fit``, with Lightning's options for Trainer, model and data."""
    from lightning_bigopt.cli.package_of_config import model_path, training_class

    # The list of all options takes more than a hundred lines, above every error message.
    return training_class(model_path(arguments)).parser_for(usage=_USAGE, **texts)


def run(options: Namespace) -> None:
    """Trains the model of a config, and saves the config in the log folder."""
    from lightning_bigopt.cli.package_of_config import training_class

    training_class(getattr(options.model, "class_path", ""))(options).fit()


FIT = Command(
    summary="Trains the model of a LightningCLI config; package classes need no module path.",
    examples=[
        ("bigopt fit --config examples/gpt.yaml", "a few minutes on two cores"),
        ("bigopt fit --config examples/gpt.yaml --trainer.max_steps 20", "overrides the file"),
        ("bigopt fit --config examples/gpt.yaml --trainer.callbacks+ StepGuard", "adds a callback"),
        ("bigopt fit --config runs/gpt/version_0/config.yaml", "repeats a saved run"),
        ("bigopt fit --config my.yaml --ckpt_path last.ckpt", "resumes"),
        (
            "bigopt fit --config examples/gpt.yaml --print_config",
            "prints the config, no training",
        ),
        ("bigopt fit --trainer.callbacks.help LearningRateScheduler", "a class's arguments"),
    ],
    parser=make_parser,
    run=run,
)
