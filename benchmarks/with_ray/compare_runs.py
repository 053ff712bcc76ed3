"""Trains with Ray Train and Ray Tune, and compares with the same runs without Ray, to the bit.

    make test-ray   # installs Ray into build/ray and runs this file; takes 10 to 25 minutes

Prints the tables of docs/compatibility.md, and exits with 1 if a run differs.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "guides" / "launchers.md"


def train_without_ray(folder: Path) -> None:
    """Trains the run of Ray Train as two processes of Lightning's DDPStrategy."""
    from notebooks.run import free_port

    folder.mkdir()
    code = (
        "import sys; from ray_train_runs import CASE; "
        "from tests.faults.killed_training import train; "
        "train(sys.argv[1], CASE, run=0, ckpt=None, rank=int(sys.argv[2]), port=int(sys.argv[3]))"
    )
    port = free_port()
    command = [sys.executable, "-c", code, str(folder)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(port)])  # noqa: S603
        for rank in range(2)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise RuntimeError((folder / "output-0-0.txt").read_text())


def script_of_the_page(folder: Path) -> Iterator[str]:
    """Runs the script of the page on launchers, and compares what it logs with the page."""
    from lightning_bigopt.reporting.runs import read_run

    folder.mkdir()
    page = PAGE.read_text(encoding="utf-8")
    for language, name in (("python", "train.py"), ("py", "train_ray.py")):
        (code,) = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        (folder / name).write_text(code)
    done = subprocess.run(
        [sys.executable, "train_ray.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        yield done.stderr
        return
    curves = read_run(folder / "runs").curves
    tags = ("optim/lr", "grad_norm/total", "batch/global_size")
    rows = list(zip(*(curves[tag] for tag in tags), strict=True))
    if len(rows) != 2:
        yield f"{len(rows)} rows instead of 2"
    for (step, lr), (_, norm), (_, size) in rows:
        row = f"| {step} | {lr:.4g} | {norm:.4g} | {size:g} |"
        if row not in page:
            yield f"the page does not contain {row}"


def train_runs(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Runs Ray Train; returns title, what happened, and differences from the run without Ray."""
    from ray_train_runs import CASE, Run, start

    from tests.faults.run_differences import differences

    plain = folder / "plain"
    train_without_ray(plain)
    for run in (
        Run("uninterrupted", "uninterrupted"),
        Run("`RayTrainReportCallback`", "epochs", kills=((1, 12), (0, 40))),
        Run(
            "reports every 5 updates, also within an epoch, before our callbacks",
            "updates",
            kills=((1, 17), (0, 39)),
            reports=5,
            report_first=True,
        ),
    ):
        start(run, folder / run.folder)
        found = differences(plain, folder / run.folder, CASE)
        if run.reports == "epoch":  # Lightning's own number of epochs; see docs/compatibility.md
            found = [
                text for text in found if not text.startswith(("epoch: ", "TensorBoard epoch"))
            ]
        marks = [mark.stem for mark in sorted((folder / run.folder).glob("resumed-*"))]
        resumed = {int(mark.split("-")[1]): mark.split("-")[2] for mark in marks}
        happened = "; ".join(
            f"rank {rank} killed at update {update}, resumed from {resumed.get(part, 'the start')}"
            for part, (rank, update) in enumerate(run.kills, 1)
        )
        if len(list((folder / run.folder).glob("killed-*"))) != len(run.kills):
            found.append("not all workers were killed")
        yield run.title, happened or "no kill", found


def read_records(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def compare_trial(config_file: Path, alone: Path) -> tuple[int, list[str]]:
    """Compares a trial with its configuration trained alone.

    Returns:
        The number of updates of the trial, and the differences.
    """
    import torch
    from ray_tune_trials import train

    alone.unlink(missing_ok=True)
    module = train(json.loads(config_file.read_text()), alone)
    expected = {record[0]: record for record in read_records(alone)}
    records = read_records(config_file.with_suffix(".jsonl"))
    found = [f"{r} instead of {expected[r[0]]}" for r in records if r != expected[r[0]]]
    weights = config_file.with_suffix(".pt")
    if weights.exists():  # trained to its end
        state = torch.load(weights)
        own = module.state_dict()
        found += [f"{name} differs" for name, value in own.items() if not value.equal(state[name])]
    return len({record[0] for record in records}), found


def searches(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Runs Ray Tune; returns title, what happened, and differences from trials without Ray."""
    import ray_tune_trials as trials
    from ray_study import study_on_ray

    searched: tuple[tuple[str, Callable[[Path], Any]], ...] = (
        ("ASHA, learning rate × `max_norm` × decay", trials.asha),
        ("every trial killed at update 23, `FailureConfig(max_failures=1)`", trials.killed),
    )
    for title, search in searched:
        results = search(folder / search.__name__)
        found = [f"a trial failed: {result.error}" for result in results if result.error]
        lengths = []
        for config_file in sorted((folder / search.__name__).glob("*.json")):
            updates, differing = compare_trial(config_file, folder / "alone.jsonl")
            lengths.append(updates)
            found += differing
        shown = ", ".join(map(str, sorted(lengths)))
        yield title, f"{len(lengths)} trials of {shown} updates", found
    yield "the space of a study", "4 trials", study_on_ray(folder / "study")
    yield ('population-based training, `base_lr="config"`', *population(folder))


def population(folder: Path) -> tuple[str, list[str]]:
    """Compares every learning rate with the trial's current base times the schedule's factor."""
    from ray_tune_trials import population as search
    from ray_tune_trials import train

    random.seed(0)
    search(folder / "population")
    config_files = sorted((folder / "population").glob("*.json"))
    config = json.loads(config_files[0].read_text())
    (folder / "alone.jsonl").unlink(missing_ok=True)
    train({**config, "lr": 1.0}, folder / "alone.jsonl")
    factors = {record[0]: float(record[2]) for record in read_records(folder / "alone.jsonl")}
    found, bases = [], []
    for config_file in config_files:
        records = read_records(config_file.with_suffix(".jsonl"))
        bases.append(len({record[1] for record in records}))
        for step, base, lr, *_ in records:
            if float(lr) != base * factors[step]:
                found.append(f"update {step}: {lr} instead of {base} × {factors[step]}")
    if max(bases) == 1:
        found.append("no trial has changed its learning rate")
    return f"{len(bases)} trials with {' and '.join(map(str, bases))} base learning rates", found


def table(title: str, rows: Iterator[tuple[str, str, list[str]]]) -> bool:
    """Prints a table; returns whether nothing differs."""
    lines, same = [f"| {title} | | differences |", "|---|---|---|"], True
    for name, happened, found in rows:
        lines.append(f"| {name} | {happened} | {len(found) or 'none'} |")
        same = same and not found
        for text in found[:10]:
            print(f"{name}: {text}", file=sys.stderr)
    # At once, because Ray prints its own lines when a worker dies.
    print("", *lines, sep="\n", flush=True)
    return same


def main() -> int:
    """Runs everything; returns the exit status."""
    sys.path[:0] = [str(ROOT), str(HERE)]
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),  # of the workers
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    import ray

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        differing = list(script_of_the_page(folder / "page"))
        print("`train_ray.py`:", "; ".join(differing) or "logs the values of the page", flush=True)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        (folder / "train").mkdir()
        (folder / "tune").mkdir()
        same = not differing
        same = table("Ray Train, 2 workers", train_runs(folder / "train")) and same
        same = table("Ray Tune, 2 trials at a time", searches(folder / "tune")) and same
        ray.shutdown()
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
