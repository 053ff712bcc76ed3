"""Compares the defaults of this package with a tuned bare AdamW that trains more updates.

    python benchmarks/half_the_updates.py --write  # writes docs/benchmarks/half_the_updates.md
    python benchmarks/half_the_updates.py --quick  # only tests that the script runs
    python benchmarks/half_the_updates.py --folder /tmp/half  # an interrupted run can continue
    python benchmarks/half_the_updates.py --folder /tmp/half --share 0.6  # reuses the bare runs

The sides are the configs examples/bare_adamw.yaml and examples/half_the_updates.yaml. Only the
learning rate is tuned, on both sides from a tenth to ten times its value in the config, with as
many trials. Then each side trains with its best learning rate at eight seeds, which are not that of
the search.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import optuna
import torch
import yaml

from lightning_bigopt.cli.config_trainings import ConfigTrainings
from lightning_bigopt.tuning.compare import run_comparison
from lightning_bigopt.tuning.comparison_plan import ComparisonPlan
from lightning_bigopt.tuning.comparison_result import Comparison
from lightning_bigopt.tuning.space import Log

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "half_the_updates.md"
BARE, OURS = "bare_adamw.yaml", "half_the_updates.yaml"
PATHS = ("lr", "model.optimizer.lr")
# From a tenth to ten times the learning rate in each config.
RATES = (Log(3e-4, 3e-2), Log(1e-3, 1e-1))
P_VALUE = 0.01


def config(name: str, folder: Path, updates: int | None) -> Path:
    """Returns the path of a config of the examples with another number of updates."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "examples" / name).read_text())
    if updates is not None:
        content["trainer"] |= {"max_steps": updates, "val_check_interval": updates}
    path = folder / name
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def compared(arguments: argparse.Namespace) -> Comparison:
    """Runs the comparison."""
    quick = arguments.quick
    plan = ComparisonPlan(
        seeds=2 if quick else arguments.seeds,
        tune=PATHS[0],
        tune_b=PATHS[1],
        space=dict(zip(PATHS, RATES, strict=True)),
        trials=2 if quick else arguments.trials,
        pruner=None,
        folder=arguments.folder,
    )
    bare = yaml.safe_load((ROOT / "examples" / BARE).read_text())["trainer"]["max_steps"]
    ours = None if arguments.share is None else round(arguments.share * bare)
    with TemporaryDirectory() as folder:
        paths = (
            config(BARE, Path(folder), 4 if quick else None),
            config(OURS, Path(folder), 2 if quick else ours),
        )
        first, second = (ConfigTrainings(path, seed=0) for path in paths)
        return run_comparison((first, second), names=(BARE, OURS), plan=plan)


def searched(found: Comparison) -> Iterator[str]:
    """Yields a row of the table of searches for each side."""
    for side in (found.a, found.b):
        assert side.study is not None
        best = next(iter(side.best_values.values()))
        complete = [trial for trial in side.study.trials if trial.loss is not None]
        rates = sorted((next(iter(t.values.values())), t.loss) for t in complete)
        tried = ", ".join(f"{rate:.2g}: {loss:.3f}" for rate, loss in rates)
        yield f"| `{side.name}` | {best:.3g} | {len(side.study.trials)} | {tried} |"


def losses(found: Comparison) -> Iterator[str]:
    """Yields the rows of the table of losses."""
    head, *rows = found.rows()
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def answer(found: Comparison) -> str:
    """Returns whether the claim holds, in words."""
    is_met = found.winner is found.b and found.p_value < P_VALUE
    return (
        f"**{'Met' if is_met else 'Not met'}** at {found.updates_ratio:.2f} × the updates: "
        f"{found.verdict}."
    )


def page(found: Comparison) -> str:
    """Returns the page."""
    test, search = found.test, found.a.study
    assert test is not None
    assert search is not None
    table, searches = "\n".join(losses(found)), "\n".join(searched(found))
    edges = "".join(f"- {text}.\n" for text in found.edges())
    return f"""\
# Half the updates

Run with `python benchmarks/half_the_updates.py --share {found.updates_ratio:.2f} --write`. Measured
on {time.strftime("%Y-%m-%d")} on an {platform.machine()} CPU, one thread, with torch
{torch.__version__}.

Does a config with the defaults of this package reach the loss of a tuned bare AdamW in fewer
updates? Both sides train the GPT of the demo (0.4M parameters) on 32 windows of 64 bytes in every
update. `{BARE}` is AdamW at a constant learning rate with a bare Trainer, for
{found.a.updates:.0f} updates. `{OURS}` is `MuonAdamW` with `WarmupLinear`,
`GradientClipping(ZClip())` and `StepGuard`, all with their defaults, for
{found.b.updates:.0f} updates. Both files are in `examples/`. Only the learning rate is tuned, on
both sides with {len(search.trials)} trials of TPE at seed 0, from a tenth to ten times the value in
the config: {RATES[0].low:g} to {RATES[0].high:g}, and {RATES[1].low:g} to {RATES[1].high:g}.
Then each side trains at its best learning rate at {len(found.seeds)} other seeds, which set the
initial weights and the order of the samples on both sides ({{py:func}}`~lightning_bigopt.compare`).

{answer(found)} The claim asks for a lower loss with p < {P_VALUE} in a two-sided paired t-test.

The loss is the validation loss in nats per byte on 1,024 windows after the last update, the same
windows on both sides.

{table}

- Mean difference b - a: {test.difference:.4f}, 95 % interval {test.interval[0]:.4f} to
  {test.interval[1]:.4f}, t = {test.statistic:.2f}, p = {test.p_value:.2g}.
- The smallest difference that these seeds show with a probability of 0.8: {test.detectable:.4f}.
- Seconds of these trainings: {found.a.seconds:,.0f} and {found.b.seconds:,.0f}. An update with Muon
  takes longer, in a model as small as this one much longer: on a CPU, fewer updates are not fewer
  seconds here.

| side | best learning rate | trials | loss of each trial by learning rate |
|---|---|---|---|
{searches}

{edges}
The bare side is AdamW as many scripts have it: a constant learning rate, no warm-up, no clipping.
The comparison says what the defaults together are worth for this model, these data and this length
of run. It does not say which of them is.
"""


def main() -> None:
    """Runs the comparison, prints it, and writes page, report and picture on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--quick", action="store_true", help="a few updates only")
    parser.add_argument("--folder", type=Path, help="folder of an interrupted run")
    parser.add_argument(
        "--share", type=float, help="updates of our side per update of the bare one"
    )
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds")
    parser.add_argument("--trials", type=int, default=16, help="trials of each search")
    parser.add_argument("--report", type=Path, help="file for the report, such as half.html")
    parser.add_argument("--picture", type=Path, help="file for the picture, such as half.png")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    progress = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    progress.setLevel(logging.INFO)
    progress.addFilter(lambda r: r.getMessage().startswith(("Trial ", "Seed ", "Tuning ")))
    torch.set_num_threads(1)
    found = compared(arguments)
    print(f"{found}\n\n{answer(found)}")
    if arguments.report is not None:
        print(found.report(arguments.report))
    if arguments.picture is not None:
        print(found.picture(arguments.picture))
    if arguments.write and not arguments.quick:
        PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
