"""What a schedule costs, and our ``step()`` beside that of torch's LambdaLR.

Contenders take turns in one process (so that a busy machine slows all of them alike); medians.
``python benchmarks/schedules.py --write`` renews docs/benchmarks/schedules.md.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

from lightning_bigopt import schedules
from lightning_bigopt.controllers.learning_rate import (
    LearningRateController,
)
from lightning_bigopt.controllers.scheduled_rate import ScheduledLearningRate
from lightning_bigopt.durations import Horizon
from lightning_bigopt.pipeline import Pipeline
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
    """The time of one call, over ``repeat`` of them."""
    start = time.process_time_ns()  # of this process only, whoever else is at work
    for _ in range(repeat):
        call()
    return (time.process_time_ns() - start) / repeat


def evaluate(curve: Schedule, fractions: list[float]) -> None:
    """Calls a curve and throws the factors away."""
    for fraction in fractions:
        curve(fraction)


def evaluation(trials: int) -> dict[str, float]:
    """Microseconds to evaluate each curve, over fractions spread over the run."""
    fractions = [i / 97 for i in range(97)]
    found: dict[str, list[float]] = {}
    curves = {type(c).__name__: c.resolve(Horizon.of_steps(STEPS)) for c in CURVES}
    for _ in range(trials):
        for name, curve in curves.items():
            each = partial(evaluate, curve, fractions * 20)
            found.setdefault(name, []).append(nanoseconds(each, repeat=1) / (len(fractions) * 20e3))
    return {name: median(times) for name, times in found.items()}


def steppers(count: int) -> dict[str, Callable[[], object]]:
    """By name, ``step`` on an optimizer with ``count`` groups; all follow the same curve."""

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [{"params": [torch.zeros(1)], "lr": 0.1 * (i + 1)} for i in range(count)]
        )

    def cosine(update: int) -> float:
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, update / STEPS))

    curve = schedules.Cosine(end=0.1)
    trainer = Trainer(
        accelerator="cpu", max_steps=STEPS, logger=False, enable_checkpointing=False, barebones=True
    )
    pipeline = Pipeline.of(trainer)
    pipeline.clock.horizon = Horizon.of_steps(STEPS)
    controller = LearningRateController(curve)
    pipeline.register(controller)
    theirs = LambdaLR(optimizer(), cosine)
    theirs.optimizer.step()
    ours = ScheduledLearningRate(optimizer(), controller, pipeline, label="")
    ours.replan()
    ours.keep_alive = trainer  # type: ignore[attr-defined]  # a pipeline holds its Trainer weakly
    return {
        "LambdaLR": theirs.step,
        "LearningRateScheduler": ours.step,
        "as_lr_scheduler": curve.as_lr_scheduler(optimizer(), STEPS).step,
    }


def stepping(trials: int) -> dict[int, dict[str, float]]:
    """Microseconds of one ``step``, by number of groups and contender."""
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
    """Both in Markdown."""
    names = list(stepped[1])
    first = ["| groups | " + " | ".join(f"`{n}`, µs" for n in names) + " | ours / torch |"]
    first.append("|---|" + "---|" * (len(names) + 1))
    for count, found in stepped.items():
        cells = " | ".join(f"{found[name]:.1f}" for name in names)
        ratio = found["LearningRateScheduler"] / found["LambdaLR"]
        first.append(f"| {count} | {cells} | {ratio:.2f} |")
    second = ["| schedule | µs |", "|---|---|"]
    second += [f"| `{name}` | {time:.2f} |" for name, time in sorted(evaluated.items())]
    return "\n".join(first), "\n".join(second)


def page(first: str, second: str, trials: int) -> str:
    """The page that holds the tables."""
    return f"""# What a schedule costs

## A step, beside torch's

One `step()` of the scheduler, once an update. All follow the same cosine; `LambdaLR` evaluates a
plain Python function. `LearningRateScheduler` is what Lightning steps in a fit, the clock read
and every controller asked for its factor; `as_lr_scheduler` is the same schedule in a loop without
Lightning. Medians over {trials} trials; the contenders take turns.

{first}

## Evaluating a schedule

One call, with the durations resolved, over fractions spread over the run.

{second}

Measured with Python {platform.python_version()} and torch {torch.__version__} on {os.cpu_count()}
cores ({platform.machine()}), in processor time. Renew this page with
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
