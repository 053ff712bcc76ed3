"""``bigopt fit``: trains what a config describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_bigopt.cli.command import Command

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["FIT"]


def make_parser(**texts: Any) -> ArgumentParser:
    """The options of ``bigopt fit``: Lightning's, for Trainer, model, data and optimizer."""
    from lightning_bigopt.cli.config import ConfiguredTraining

    return ConfiguredTraining.parser_for(**texts)


def run(options: Namespace) -> None:
    """Trains what a config describes, and saves the config beside its logs."""
    from lightning_bigopt.cli.config import ConfiguredTraining

    ConfiguredTraining(options).fit()


FIT = Command(
    summary="Trains what a LightningCLI config describes; our classes go by their bare names.",
    examples=[
        ("bigopt fit --config examples/gpt.yaml", "a few minutes on two cores"),
        ("bigopt fit --config examples/gpt.yaml --trainer.max_steps 20", "overrides the file"),
        ("bigopt fit --config examples/gpt.yaml --trainer.callbacks+ StepGuard", "adds to it"),
        ("bigopt fit --config runs/gpt/version_0/config.yaml", "trains again as saved"),
        ("bigopt fit --config my.yaml --ckpt_path last.ckpt", "resumes"),
        (
            "bigopt fit --config examples/gpt.yaml --print_config",
            "the whole config, and no training",
        ),
        ("bigopt fit --trainer.callbacks.help LearningRateScheduler", "a class's arguments"),
    ],
    parser=make_parser,
    run=run,
)
