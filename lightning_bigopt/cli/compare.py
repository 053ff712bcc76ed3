"""``bigopt compare``: two configs, each at its own best values, paired by seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bigopt.cli.command import Command, require
from lightning_bigopt.cli.tune import read_space

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from lightning_bigopt.tuning.comparison_result import Comparison

__all__ = ["COMPARE"]


def make_parser(**texts: Any) -> ArgumentParser:
    """Makes the parser of ``bigopt compare``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(**texts)
    parser.add_argument("a", type=str, help="Config file of the first side, as for bigopt fit.")
    parser.add_argument("b", type=str, help="Config file of the second side.")
    options: list[tuple[str, Any, Any, str]] = [
        ("seeds", int, 8, "Number of seeds, from --seed + 1 on."),
        ("tune", str | None, None, "Paths of the fields to tune on both sides, such as lr."),
        ("tune-b", str | None, None, "Paths of the second side, if they differ."),
        ("space", str | None, None, "File with ranges by path; for lr: 1/16 to 16 × its value."),
        ("trials", int, 16, "Trials of each search."),
        ("monitor", str, "val_loss", "Name of the value that the validation logs."),
        ("direction", str, "minimize", "minimize or maximize."),
        ("sampler", str, "TPE", "Sampler of Optuna, such as TPE, GP, Random or QMC."),
        ("pruner", str | None, "auto", "Pruner of Optuna, such as median or none; auto: median."),
        ("seed", int, 0, "Seed of the searches, instead of those in the configs."),
        ("relevant", float | None, None, "Smallest difference of the value that matters."),
        ("folder", str | None, None, "Keeps what is trained; an interrupted comparison goes on."),
        ("report", str | None, None, "File for a report, such as comparison.html."),
        ("picture", str | None, None, "File for a picture, such as comparison.png."),
    ]
    for option, kind, default, text in options:
        parser.add_argument(f"--{option}", type=kind, default=default, help=text)
    return parser


def run(options: Namespace) -> None:
    """Runs the comparison, prints it, and writes report and picture."""
    require("scipy", extra="laws")
    if options.tune is not None or options.tune_b is not None:
        require("optuna", extra="tune")
    if options.report is not None or options.picture is not None:
        require("matplotlib", extra="plot")
    from lightning.pytorch.utilities import rank_zero_only

    from lightning_bigopt.cli.config_trainings import ConfigTrainings
    from lightning_bigopt.trainer_access.output_paths import file_error
    from lightning_bigopt.tuning.compare import run_comparison
    from lightning_bigopt.tuning.comparison_plan import ComparisonPlan

    files = {"report": "comparison.html", "picture": "comparison.png"}
    for name, example in files.items():
        path = options[name]
        if path is not None and (error := file_error(name, path, example=example)):
            raise error
    plan = ComparisonPlan(
        seeds=options.seeds,
        tune=_paths(options.tune),
        tune_b=_paths(options.tune_b),
        space=None if options.space is None else read_space(options.space),
        trials=options.trials,
        monitor=options.monitor,
        direction=options.direction,
        sampler=options.sampler,
        pruner=options.pruner,
        seed=options.seed,
        relevant=options.relevant,
        folder=options.folder,
    )
    sides = [ConfigTrainings(path, seed=options.seed) for path in (options.a, options.b)]
    for side in sides:
        side.check_starts_anew()
    found = run_comparison((sides[0], sides[1]), names=_names(options.a, options.b), plan=plan)
    rank_zero_only(_write)(found, options)


def _names(a: str, b: str) -> tuple[str, str]:
    """Returns the names of the files; their paths if the names are equal."""
    names = Path(a).name, Path(b).name
    return names if names[0] != names[1] else (a, b)


def _paths(text: str | None) -> list[str] | None:
    """Returns the paths in a text such as ``lr,weight_decay``."""
    return None if text is None else [part.strip() for part in text.split(",")]


def _write(found: Comparison, options: Namespace) -> None:
    print(found)
    if options.report is not None:
        print(f"\nreport: {found.report(options.report)}")
    if options.picture is not None:
        print(f"picture: {found.picture(options.picture)}")


COMPARE = Command(
    summary="Compares two configs, each at its own best values, with a paired t-test.",
    examples=[
        ("bigopt compare a.yaml b.yaml --tune lr", "tunes both, then trains 8 seeds each"),
        (
            "bigopt compare a.yaml b.yaml --tune lr --folder runs/ab",
            "goes on after an interruption",
        ),
        ("bigopt compare a.yaml b.yaml --seeds 16", "as they are"),
        ("bigopt compare a.yaml b.yaml --tune lr --tune-b optimizer.lr", "other names on b"),
    ],
    parser=make_parser,
    run=run,
)
