"""Measures the time of a schedule, and of writing learning rates compared with torch's LambdaLR.

The variants take turns in one process, so that other work on the machine affects all of them alike;
results are medians. ``python benchmarks/schedules.py --write`` regenerates
docs/benchmarks/schedules.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.optim.lr_scheduler import LambdaLR

from lightning_bigopt import schedules
from lightning_bigopt.durations import Horizon, Progress
from lightning_bigopt.optimizers import as_lr_scheduler
from lightning_bigopt.optimizers.group_schedule import GroupSchedule
from lightning_bigopt.schedules import Schedule

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "schedules.md"
STEPS = 10_000
GROUPS = (1, 10, 100)

CURVES: tuple[Schedule, ...] = (
    schedules.Constant(),
    schedules.Linear(),
    schedules.Cosine(end=0.1),
    schedules.Polynomial(power=2.0),
    schedules.Exponential(decay=0.5, every="10%"),
    schedules.StepDecay(decay=0.5, every="10%"),
    schedules.MultiStep(milestones={"30%": 0.1, "60%": 0.01}),
    schedules.InverseSquareRoot(timescale=1000),
    schedules.Power(exponent=-0.51, timescale=1000),
    schedules.PiecewiseLinear(points={"0%": 0.0, "10%": 1.0, "100%": 0.0}),
    schedules.REX(),
    schedules.OneCycle(),
    schedules.Cyclic(),
    schedules.CosineWithRestarts(first_cycle="10%", cycle_multiplier=2.0),
    schedules.TriStage(),
    schedules.Noam(warmup=1000),
    schedules.WarmupLinear(warmup="2%"),
    schedules.WarmupCosine(warmup="2%"),
    schedules.WarmupStableDecay(warmup="2%", decay="20%"),
    schedules.WarmupInverseSquareRoot(warmup=1000),
    schedules.WarmupConstant(warmup="2%"),
    schedules.InfiniteSchedule(),
    schedules.Warmup(duration="2%", schedule=schedules.Cosine()),
    schedules.Clamp(schedule=schedules.Cosine(), low=0.1),
    schedules.Seesaw(schedule=schedules.Cosine()),
)


def nanoseconds(call: Callable[[], object], *, repeat: int) -> float:
    """Returns the mean time of a call."""
    start = time.process_time_ns()  # of this process only
    for _ in range(repeat):
        call()
    return (time.process_time_ns() - start) / repeat


def evaluate(curve: Schedule, fractions: list[float]) -> None:
    """Evaluates a curve at each fraction."""
    for fraction in fractions:
        curve(fraction)


def evaluation(trials: int) -> dict[str, float]:
    """Measures the evaluation of each curve in microseconds, over fractions of the whole run."""
    fractions = [i / 97 for i in range(97)]
    found: dict[str, list[float]] = {}
    curves = {type(c).__name__: c.resolve(Horizon.of_steps(STEPS)) for c in CURVES}
    for _ in range(trials):
        for name, curve in curves.items():
            each = partial(evaluate, curve, fractions * 20)
            found.setdefault(name, []).append(nanoseconds(each, repeat=1) / (len(fractions) * 20e3))
    return {name: median(times) for name, times in found.items()}


def steppers(count: int) -> dict[str, Callable[[], object]]:
    """Returns ``step`` by variant, on an optimizer with ``count`` groups and the same curve."""

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [{"params": [torch.zeros(1)], "lr": 0.1 * (i + 1)} for i in range(count)]
        )

    def cosine(update: int) -> float:
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, update / STEPS))

    curve = schedules.Cosine(end=0.1)
    reference = LambdaLR(optimizer(), cosine)
    reference.optimizer.step()
    groups, resolved = GroupSchedule([("", optimizer())]), curve.resolve(Horizon.of_steps(STEPS))
    groups.claim("lr")
    groups.follow("lr", lambda *_: resolved, owner=None)
    updates = itertools.count()

    def write() -> None:
        update = next(updates) % STEPS
        groups.write(Progress(fraction=update / STEPS, steps=update))

    return {
        "LambdaLR": reference.step,
        "LearningRateScheduler": write,
        "as_lr_scheduler": as_lr_scheduler(curve, optimizer(), STEPS).step,
    }


def stepping(trials: int) -> dict[int, dict[str, float]]:
    """Measures one ``step`` in microseconds, by number of groups and variant."""
    rows: dict[int, dict[str, float]] = {}
    for count in GROUPS:
        calls, found = steppers(count), {}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for trial in range(trials):
            for name in list(calls) if trial % 2 else list(calls)[::-1]:
                times[name].append(nanoseconds(calls[name], repeat=2000 // count) / 1e3)
        found = {name: median(each) for name, each in times.items()}
        rows[count] = found
    return rows


def tables(evaluated: dict[str, float], stepped: dict[int, dict[str, float]]) -> tuple[str, str]:
    """Formats both tables in Markdown."""
    names = list(stepped[1])
    first = [
        "| groups | " + " | ".join(f"`{n}`, µs" for n in names) + " | lightning_bigopt / torch |"
    ]
    first.append("|---|" + "---|" * (len(names) + 1))
    for count, found in stepped.items():
        cells = " | ".join(f"{found[name]:.1f}" for name in names)
        ratio = found["LearningRateScheduler"] / found["LambdaLR"]
        first.append(f"| {count} | {cells} | {ratio:.2f} |")
    second = ["| schedule | µs |", "|---|---|"]
    second += [f"| `{name}` | {time:.2f} |" for name, time in sorted(evaluated.items())]
    return "\n".join(first), "\n".join(second)


def page(first: str, second: str, trials: int) -> str:
    """Returns the page with both tables."""
    return f"""# The cost of a schedule

## One step of a scheduler

The time of writing the learning rates of all parameter groups once per update. All variants
follow the same cosine. `LambdaLR` evaluates a plain Python function. `LearningRateScheduler`
is the call that writes the parameter groups at the end of an update in a fit.
`as_lr_scheduler` is the same schedule in a loop without Lightning. Medians over {trials} trials;
the variants take turns.

{first}

## One evaluation of a schedule

One call of a resolved schedule, at fractions spread over the run.

{second}

Measured with Python {platform.python_version()} and torch {torch.__version__} on {os.cpu_count()}
cores ({platform.machine()}), in processor time. Regenerate this page with
`python benchmarks/schedules.py --write`.
"""


def main() -> None:
    """Prints the tables, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=31, help="odd; medians are taken")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    first, second = tables(evaluation(arguments.trials), stepping(arguments.trials))
    print(first, second, sep="\n\n")
    if arguments.write:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(first, second, arguments.trials), encoding="utf-8")


if __name__ == "__main__":
    main()
