"""Compares rules that detect spikes of the gradient norm, on clean runs and in storms of spikes.

    python benchmarks/spike_rules.py                # the two fastest of 16 tasks
    python benchmarks/spike_rules.py --all --write  # all; writes docs/benchmarks/spike_rules.md
    python benchmarks/spike_rules.py --all --workers 2 --runs /tmp/runs  # keeps the recordings

Every task is trained without a guard and its norms and losses are recorded. Each rule processes the
recorded norms unchanged, which gives its false rejections, and with some of them multiplied, which
gives its recall. Accepted spikes then enter the history of the rule, but do not change the weights.
Therefore the tasks are also trained in storms, with different protections.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.storms.replay import FACTORS, Spike, draw_storm, replay
from benchmarks.storms.tasks import CELLS, Result, Task
from lightning_bigopt.gradients import (
    ClippingRule,
    Detector,
    LossSpike,
    NormClip,
    NormSpike,
    ZClip,
)
from lightning_bigopt.gradients.detectors import spread

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "spike_rules.md"
UPDATES = 1000
SEEDS = range(5)
STORMS = 4
"""Storms for each recording, so 20 for each task."""
TRAINED_UPDATES = 200
DRAWS = range(20)
OTHERS = (
    Task("GPT", "AdamW", size=2),
    Task("LSTM", "AdamW", size=2),
    Task("MLP", "AdamW", size=8),
    Task("MLP", "AdamW", noise=0.1),
    Task("CNN", "SGD", noise=0.1),
)
TRAINED = (
    Task("MLP", "SGD"),
    Task("MLP", "AdamW"),
    Task("CNN", "SGD"),
    Task("LSTM", "SGD"),
    Task("GPT", "AdamW"),
)
TrialT = TypeVar("TrialT")
FoundT = TypeVar("FoundT")


class MeanDeviation(NormSpike):
    """Six standard deviations above the mean of the last 128 accepted norms, as in OLMo."""

    def limit(self, state: dict[str, Any]) -> float:
        norms = [math.exp(score) for score in state["accepted"]]
        if len(norms) < self.armed:
            return math.inf
        return fmean(norms) + self.threshold * pstdev(norms)


class RuleOf01(NormSpike):
    """The rule of version 0.1: the median of the last quarter, and only the limit by the spread."""

    def limit(self, state: dict[str, Any]) -> float:
        accepted = state["accepted"]
        if len(accepted) < self.armed:
            return math.inf
        middle = median(accepted[-self.window // 4 :])
        return self.unscore(middle + max(self.threshold * spread(accepted), math.log(4.0)))


BEFORE, CURRENT = RuleOf01(), NormSpike()
RULES: dict[str, Detector] = {
    "mean + 6 standard deviations": MeanDeviation(),
    "version 0.1": BEFORE,
    "`ratio=5, margin=inf`": NormSpike(margin=math.inf),
    "`ratio=5, margin=4`": NormSpike(margin=4.0),
    "`ratio=5, margin=3`": NormSpike(margin=3.0),
    "`ratio=5, margin=2.5`": NormSpike(margin=2.5),
    "`ratio=5, margin=2` (default)": CURRENT,
    "`ratio=5, margin=1.5`": NormSpike(margin=1.5),
    "`ratio=4, margin=2`": NormSpike(ratio=4.0),
    "`ratio=8, margin=2`": NormSpike(ratio=8.0),
    "`threshold=12`": NormSpike(threshold=12.0),
    "`window=64`": NormSpike(64),
}
PROTECTIONS: dict[str, tuple[ClippingRule | None, tuple[Detector, ...]]] = {
    "nothing": (None, ()),
    "NormClip(1)": (NormClip(1.0), ()),
    "ZClip()": (ZClip(), ()),
    "guard of 0.1": (None, (BEFORE,)),
    "guard": (None, (CURRENT,)),
}


class Counts:
    """Rejections of one rule in the runs of one task."""

    def __init__(self) -> None:
        self.good = self.wrong = 0
        self.spikes: dict[Spike, list[bool]] = {}

    def add(self, rejected: set[int], storm: dict[int, Spike], updates: int) -> None:
        self.good += updates - len(storm)
        self.wrong += len(rejected - storm.keys())
        for update, spike in storm.items():
            self.spikes.setdefault(spike, []).append(update in rejected)

    @property
    def per_thousand(self) -> float:
        return 1000 * self.wrong / self.good

    def recall(self, factor: int | None = None, *, burst: bool | None = None) -> float:
        """The share of the spikes that are rejected; all factors have the same weight."""
        if factor is None:
            return fmean(self.recall(each, burst=burst) for each in FACTORS)
        return fmean(
            caught
            for spike, found in self.spikes.items()
            if spike.factor == factor and burst in {None, spike.burst}
            for caught in found
        )


# ----------------------------------------------------------------------------------- measurement


def run_record(trial: tuple[Task, int], folder: Path | None) -> Result:
    """Trains without a guard, or reads the recording of an earlier run of this script."""
    task, seed = trial
    file = None if folder is None else folder / f"{task}, seed {seed}.json"
    if file is not None and file.exists():
        norms, losses, validation = json.loads(file.read_text())
        return Result(norms, losses, set(), validation)
    result = task.train(seed, UPDATES)
    if file is not None:
        file.write_text(json.dumps((result.norms, result.losses, result.validation)))
    return result


def run_replay(trial: tuple[Detector, Task], folder: Path) -> tuple[Counts, Counts]:
    """Returns the counts of a rule on the clean recordings of a task, and in 20 storms."""
    rule, task = trial
    clean, stormy = Counts(), Counts()
    for seed in SEEDS:
        result = run_record((task, seed), folder)
        values = result.norms if rule.quantity == "norm" else result.losses
        clean.add(replay(rule, values, {}), {}, len(values))
        for number in range(STORMS if rule.quantity == "norm" else 0):
            storm = draw_storm(100 * seed + number, len(values))
            stormy.add(replay(rule, values, storm), storm, len(values))
    return clean, stormy


def run_storm(trial: tuple[Task, int]) -> tuple[float, dict[str, tuple[float, Counts]]]:
    """Trains clean, and with every protection in the same storm."""
    task, seed = trial
    storm = draw_storm(seed, TRAINED_UPDATES, singles=4)
    factors = {update: float(spike.factor) for update, spike in storm.items()}
    found = {}
    for name, (clip, detectors) in PROTECTIONS.items():
        result = task.train(seed, TRAINED_UPDATES, bad=factors, clip=clip, detectors=detectors)
        counts = Counts()
        counts.add(result.rejected, storm, TRAINED_UPDATES)
        found[name] = result.validation, counts
    return task.train(seed, TRAINED_UPDATES).validation, found


def each(
    function: Callable[[TrialT], FoundT], trials: Iterable[TrialT], workers: int
) -> list[FoundT]:
    """Calls a function with every trial, in several processes."""
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, trials))


# -------------------------------------------------------------------------------------- tables


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Formats rows in Markdown; numbers have two digits after the point."""
    titles = list(head)
    lines = [f"| {' | '.join(titles)} |\n", "|---" * len(titles) + "|\n"]
    for row in rows:
        cells = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def replayed(
    tasks: Iterable[Task], rules: dict[str, Detector], folder: Path, workers: int
) -> dict[str, dict[Task, tuple[Counts, Counts]]]:
    """Returns the counts of every rule on every task."""
    tasks = list(tasks)
    trials = [(rule, task) for rule in rules.values() for task in tasks]
    found = iter(each(partial(run_replay, folder=folder), trials, workers))
    return {name: {task: next(found) for task in tasks} for name in rules}


def task_table(found: dict[str, dict[Task, tuple[Counts, Counts]]], name: str, old: str) -> str:
    """Returns false rejections and recall of a rule for each task, beside an older rule."""
    head = ["task", "false rejections", "recall", *(f"×{f}" for f in FACTORS)]
    head += ["0.1: false rejections", "0.1: recall"]
    rows = [
        [
            task,
            clean.per_thousand,
            stormy.recall(),
            *(stormy.recall(factor) for factor in FACTORS),
            found[old][task][0].per_thousand,
            found[old][task][1].recall(),
        ]
        for task, (clean, stormy) in found[name].items()
    ]
    means = [fmean(float(row[column]) for row in rows) for column in range(1, len(head))]
    return table(head, [*rows, ["**mean**", *means]])


def rule_table(found: dict[str, dict[Task, tuple[Counts, Counts]]]) -> str:
    """Returns means over the tasks and the worst task, for each rule."""
    rows = []
    for name, tasks in found.items():
        wrong = {task: clean.per_thousand for task, (clean, _) in tasks.items()}
        recall = {task: stormy.recall() for task, (_, stormy) in tasks.items()}
        most, least = max(wrong, key=wrong.__getitem__), min(recall, key=recall.__getitem__)
        rows.append(
            [
                name,
                fmean(wrong.values()),
                f"{wrong[most]:.1f} ({most})",
                fmean(recall.values()),
                f"{recall[least]:.2f} ({least})",
            ]
        )
    head = ["rule", "false rejections", "most", "recall", "least"]
    return table(head, rows)


def factor_table(found: dict[str, dict[Task, tuple[Counts, Counts]]], names: list[str]) -> str:
    """Returns the recall of single spikes and of bursts, for each factor."""
    rows = [
        [
            f"{name}, {'bursts of four' if burst else 'single'}",
            *(
                fmean(stormy.recall(factor, burst=burst) for _, stormy in found[name].values())
                for factor in FACTORS
            ),
        ]
        for name in names
        for burst in (False, True)
    ]
    return table(["rule, spikes", *(f"×{factor}" for factor in FACTORS)], rows)


def storm_tables(tasks: list[Task], workers: int) -> str:
    """Trains in storms; returns the losses, and the decisions of the guards."""
    trials = [(task, seed) for task in tasks for seed in DRAWS]
    results = iter(each(run_storm, trials, workers))
    losses, decisions = [], []
    for task in tasks:
        runs = [next(results) for _ in DRAWS]
        losses.append([task, f"{fmean(clean for clean, _ in runs):.3f}"])
        decisions.append([task])
        for name, (_, detectors) in PROTECTIONS.items():
            excess = [found[name][0] - clean for clean, found in runs]
            error = pstdev(excess) / math.sqrt(len(excess) - 1)
            losses[-1].append(f"{fmean(excess):+.3f} ± {error:.3f}")
            if detectors:
                counts = [found[name][1] for _, found in runs]
                caught = [c for count in counts for s in count.spikes.values() for c in s]
                wrong = sum(count.wrong for count in counts) / sum(c.good for c in counts)
                decisions[-1] += [fmean(caught), 1000 * wrong]
    guards = [name for name, (_, detectors) in PROTECTIONS.items() if detectors]
    columns = [f"{name}: {what}" for name in guards for what in ("recall", "false rejections")]
    losses_table = table(["task", "clean", *PROTECTIONS], losses)
    return losses_table + "\n" + table(["task", *columns], decisions)


RESULTS = """\
Results:

- As means over the tasks, the default rejects 0.96 of 1,000 good updates and 95.4 % of the spikes.
  With the LSTM, the GPT, and the MLP with AdamW it rejects at most 0.8 good updates of 1,000. The
  worst task is the MLP with SGD and no warm-up, with 5.6 good updates of 1,000 and 82 % of the
  spikes. The CNN (1.2 to 1.8) and the MLP with SGD and a warm-up (1.2) are also above 1.
- Nearly all missed spikes are of ×10 and ×30, in networks that have memorized their data. The
  norms of good batches then span several powers of ten, and ten times a small norm is less than
  the norms of other good batches. No rule on the norm can detect such a spike. It does little harm:
  in the storms, the guarded CNN and MLP with SGD end at most 0.004 above the clean run.
- The rule of 0.1 has no limit for norms that swing: there, six standard deviations are a factor of
  100 or more. It rejects 78 % of the spikes. It also rejects good updates when norms rise, 23 of
  1,000 with the MLP and SGD in storms. `margin` exchanges one error for the other: with 3, 0.25 of
  1,000 good updates and 93 % of the spikes are rejected.
- Without a protection, the spikes ruin every run with SGD. The guard skips twelve of 200 updates,
  which costs up to 0.024 here. Clipping can lose less, because these bad gradients have the right
  direction and only the wrong length: so do ZClip on the LSTM, and ZClip and NormClip(1) with
  AdamW. With the MLP and SGD, where the norms swing, the guard loses least. The loss with
  NormClip(1) depends on whether 1 suits the norms of the model. A bad batch with another direction,
  or with a NaN, is [another case](bad_batches.md).
"""


def page(parts: dict[str, str]) -> str:
    """Returns the page with the tables."""
    return f"""\
# Rules that detect spikes of the gradient norm

Measured with `python benchmarks/spike_rules.py --all --write`, torch {torch.__version__}. The data
are real: scikit-learn's digits for the CNN (with batch normalization) and the MLP, the source of
Python's standard library for the LSTM and the GPT. The optimizers are SGD with momentum 0.9, and
AdamW, at the best learning rate of a grid.
With a warm-up, the learning rate rises over the first tenth and falls along a cosine; without one,
it is constant. Nothing is clipped.

## Clean runs and recorded storms

Each of the 16 tasks is trained with {len(SEEDS)} seeds, {UPDATES:,} updates each, and its norms are
recorded. False rejections are counted per 1,000 updates of the clean recordings. The recall is the
fraction of the bad updates that a rule rejects, in {len(SEEDS) * STORMS} storms for each task: 20
norms of 1,000, after the first 50, are multiplied by 10 to 1,000, twelve of them single and eight
in two bursts of four. The columns "0.1" show the rule of that version, with the median $m$ of the
last 32 accepted norms: $\\log g > m + \\max(6 \\sigma, \\log 4)$.

{parts["tasks"]}
{parts["factors"]}
`LossSpike()` rejects {parts["losses"]} of the {len(CELLS) * len(SEEDS) * UPDATES:,} clean updates.

## Arguments

Means over the 16 tasks. What is not named has its default value.

{parts["rules"]}
## Other settings

The same for batches of other sizes, and with random labels.

{parts["others"]}
## Training in storms

Each task is trained for {TRAINED_UPDATES} updates with {len(DRAWS)} seeds. The gradients of twelve
updates, after the first 50, are multiplied by 10 to 1,000: four single updates and two bursts of
four. A seed determines weights, batches and storm. The table shows the validation loss of the clean
run, and the difference from it with different protections: the mean over the seeds and its standard
error.

{parts["storms"]}
{RESULTS}"""


def main() -> None:
    """Prints the tables, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="all tasks, instead of two fast ones")
    parser.add_argument("--runs", type=Path, help="folder that keeps the recordings")
    parser.add_argument("--workers", type=int, default=1, help="number of processes")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    temporary, workers = tempfile.TemporaryDirectory(), arguments.workers
    folder = arguments.runs or Path(temporary.name)
    folder.mkdir(parents=True, exist_ok=True)
    cells = [task for task in CELLS if arguments.all or (task.kind, task.warmup) == ("MLP", True)]
    others = OTHERS if arguments.all else ()
    trials = [(task, seed) for task in (*cells, *others) for seed in SEEDS]
    each(partial(run_record, folder=folder), trials, workers)
    found = replayed(cells, RULES, folder, workers)
    current = "`ratio=5, margin=2` (default)"
    before = "version 0.1"
    losses = replayed(cells, {"LossSpike()": LossSpike()}, folder, workers)["LossSpike()"]
    parts = {
        "tasks": task_table(found, current, before),
        "factors": factor_table(found, [before, current]),
        "losses": str(sum(clean.wrong for clean, _ in losses.values())),
        "rules": rule_table(found),
    }
    if others:
        two = {name: RULES[name] for name in (before, current)}
        parts["others"] = task_table(replayed(others, two, folder, workers), current, before)
    for part in parts.values():
        print(part, flush=True)
    parts["storms"] = storm_tables([task for task in TRAINED if task in cells], workers)
    print(parts["storms"])
    if arguments.write:
        PAGE.write_text(page(parts), encoding="utf-8")
    temporary.cleanup()


if __name__ == "__main__":
    main()
