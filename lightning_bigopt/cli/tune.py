"""``bigopt tune``: searches fields of a config with Optuna, and writes the best config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bigopt.checks import shown
from lightning_bigopt.cli.command import Command, require
from lightning_bigopt.cli.expressions import parse_range
from lightning_bigopt.tuning.space import Choice, Integer, Log, Range, Uniform

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from lightning_bigopt.tuning.study_result import Study

__all__ = ["TUNE", "read_space"]


def make_parser(**texts: Any) -> ArgumentParser:
    """Makes the parser of ``bigopt tune``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(**texts)
    options: list[tuple[str, Any, Any, str]] = [
        ("config", str, None, "Config file as for bigopt fit: trainer, model, data."),
        ("space", str, None, "File with the range of each field by path."),
        ("trials", int, 16, "Trials after which the study ends, those in the storage included."),
        ("storage", str | None, None, "File study.db or study.journal, or a URL; goes on there."),
        ("name", str, "study", "Name of the study in the storage."),
        ("monitor", str, "val_loss", "Name of the value that the validation logs."),
        ("direction", str, "minimize", "minimize or maximize."),
        ("sampler", str, "TPE", "Sampler of Optuna, such as TPE, GP, Random or QMC."),
        (
            "pruner",
            str | None,
            "auto",
            "Pruner of Optuna, such as median or none; auto: halving with budgets, else median.",
        ),
        ("seed", int, 0, "Seed of the sampler, and of trainings whose config sets none."),
        ("budgets", str | None, None, "Budgets of trials with one trunk, such as 25%,50%,100%."),
        ("folder", str | None, None, "Folder for the checkpoints of trunks."),
        ("output", str, "best.yaml", "File for the config with the best values."),
        ("report", str | None, None, "File for a report, such as report.html."),
        ("picture", str | None, None, "File for a picture, such as study.png."),
    ]
    for option, kind, default, text in options:
        is_required = option in ("config", "space")
        given = {"required": True} if is_required else {"default": default}
        parser.add_argument(f"--{option}", type=kind, help=text, **given)
    return parser


def run(options: Namespace) -> None:
    """Runs the study, prints it, and writes best config, report and picture."""
    require("optuna", extra="tune")
    if options.report is not None or options.picture is not None:
        require("matplotlib", extra="plot")
    from lightning.pytorch.utilities import rank_zero_only

    from lightning_bigopt.cli.config_trainings import ConfigTrainings
    from lightning_bigopt.trainer_access.output_paths import file_error
    from lightning_bigopt.tuning.hyperparameter_study import run_study

    files = {name: options[name] for name in ("output", "report", "picture")}
    for name, path in files.items():
        if path is not None and (error := file_error(name, path, example="best.yaml")):
            raise error
    found = run_study(
        ConfigTrainings(options.config, seed=options.seed),
        space=read_space(options.space),
        trials=options.trials,
        monitor=options.monitor,
        direction=options.direction,
        sampler=options.sampler,
        pruner=options.pruner,
        storage=options.storage,
        name=options.name,
        seed=options.seed,
        budgets=None if options.budgets is None else _budgets(options.budgets),
        folder=options.folder,
    )
    rank_zero_only(_write)(found, options)


def _write(found: Study, options: Namespace) -> None:
    print(found)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(found.config, encoding="utf-8")
    print(f"\nbest config: {options.output}")
    if options.report is not None:
        print(f"report: {found.report(options.report)}")
    if options.picture is not None:
        print(f"picture: {found.picture(options.picture)}")


def read_space(path: str | Path) -> dict[str, Range]:
    """Reads a search space from a YAML file.

    A range is an expression, as in ``lr: Log(1e-4, 1e-1)``, or a ``class_path`` with ``init_args``.

    Args:
        path: The file.

    Raises:
        ValueError: If there is no such file, or it contains something else.
    """
    import yaml

    if not Path(path).is_file():
        raise ValueError(
            f"space must be a file, got {str(path)!r}, which does not exist; write one such as "
            "examples/space.yaml"
        )
    try:
        read = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_loader())  # noqa: S506
    except yaml.YAMLError as error:
        raise ValueError(f"space must be a YAML file, got {str(path)!r}: {error}") from error
    if not isinstance(read, dict) or not read:
        raise ValueError(
            f"space must be ranges by path, got {shown(read)} in {str(path)!r}; write a line such "
            "as lr: Log(1e-4, 1e-1)"
        )
    return {str(field): _range(str(field), value) for field, value in read.items()}


def _loader() -> Any:
    """Returns a safe loader that reads ``1e-3`` as a number, as Python and YAML 1.2 do."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads numbers without a point, too."""

    number = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def _range(field: str, value: Any) -> Range:
    if isinstance(value, str):
        return parse_range(value)
    if isinstance(value, dict) and "class_path" in value:
        kinds = {kind.__name__: kind for kind in (Choice, Integer, Log, Uniform)}
        kind = kinds.get(str(value["class_path"]).rpartition(".")[2])
        if kind is not None and value.keys() <= {"class_path", "init_args"}:
            try:
                return kind(**(value.get("init_args") or {}))
            except TypeError as error:
                raise ValueError(str(error)) from error
    advice = f"write {field}: Log(1e-4, 1e-1)"
    if isinstance(value, list):
        advice = f"write {field}: Choice({value})"
    raise ValueError(f"space must contain ranges, got {shown(value)} for {field!r}; {advice}")


def _budgets(text: str) -> list[Any]:
    """Returns the budgets in a text such as ``25%,50%,100%``."""
    parts = [part.strip() for part in text.strip("[]()").split(",")]
    return [int(part) if part.isdigit() else part.strip("'\"") for part in parts]


TUNE = Command(
    summary="Searches fields of a config with Optuna, and writes the best config.",
    examples=[
        (
            "bigopt tune --config examples/gpt.yaml --space examples/space.yaml",
            "writes best.yaml for bigopt fit",
        ),
        (
            "bigopt tune --config my.yaml --space my_space.yaml --storage study.db",
            "goes on after an interruption",
        ),
        (
            "bigopt tune --config my.yaml --space my_space.yaml --budgets 25%,50%,100%",
            "one trunk per trial",
        ),
    ],
    parser=make_parser,
    run=run,
)
