"""Trains random configurations and compares every update with an independent oracle.

The learning rate of every parameter group is read by torch's hook before the optimizer's step, and
the samples of every update are recorded in ``training_step``. The expected values come from
:mod:`tests.faults.run_oracle`, which does not import the package.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bigopt import (
    BatchSizePolicy,
    BatchSizeRamp,
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    LearningRateScheduler,
    NonFinite,
    NormClip,
    Schedule,
    StepGuard,
)
from tests.faults.random_schedules import Maker, Run
from tests.faults.run_oracle import Curve, Limit, Part, Size, TooLong, Update, simulate
from tests.helpers import QUIET, Regression, SaveAt, cpu_precision

TOLERANCE = 1e-9  # relative
TEXT = """\
Random configurations are trained. The samples and the learning rate of every update, in each
parameter group, are compared with a simulation that does not use this package: plain formulas for
the schedules, the batch sizes and the length of the run. The relative tolerance is 1e-9. A skipped
update must be one whose loss is NaN.
"""


class Stop(Exception):  # noqa: N818
    """Ends the first part of a resumed run."""


class StopAt(L.Callback):
    """Raises at the first batch after some updates."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise Stop


class PositionedLoader(DataLoader[Any]):
    """A DataLoader without shuffling that saves its position, for resumes within an epoch."""

    position = 0

    def __iter__(self) -> Any:
        start, self.position = self.position, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.position = (index + 1) % len(self)
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Recorder(L.LightningModule):
    """Records the samples of every update, and the learning rates of every step.

    Args:
        lrs: Learning rate of each parameter group.
        bad: Updates whose loss is NaN.
    """

    def __init__(self, lrs: tuple[float, ...], bad: frozenset[int]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(4, 3) for _ in lrs)
        self.lrs, self.bad = lrs, bad
        self.windows: list[tuple[int, ...]] = []
        self.seen: dict[int, tuple[float, ...]] = {}
        self.open: list[int] = []
        self.done = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": layer.parameters(), "lr": lr}
            for layer, lr in zip(self.layers, self.lrs, strict=True)
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        optimizer.register_step_pre_hook(self._record)
        return optimizer

    def _record(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.seen[self.trainer.global_step] = tuple(g["lr"] for g in optimizer.param_groups)

    def on_train_start(self) -> None:
        self.open, self.done = [], self.trainer.global_step

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, _, index = batch
        self.open += index.tolist()
        output = sum(layer(x) for layer in self.layers)
        loss = nn.functional.mse_loss(output, torch.ones_like(output))
        return loss * math.nan if self.trainer.global_step in self.bad else loss

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step > self.done:
            self.windows.append(tuple(self.open))
            self.open, self.done = [], self.trainer.global_step


@dataclass
class Configuration:
    """A random run, and what it must give."""

    seed: int
    data: int
    micro: int
    limit: Limit
    limit_by: str
    accumulate: int
    policy: BatchSizePolicy | None
    exact: bool
    schedule: Schedule
    curve: Curve
    lrs: tuple[float, ...]
    max_lr: float | None
    scaling: str | None
    precision: str
    clips: bool
    bad: frozenset[int]
    resume: int | None
    updates: list[Update] = field(repr=False)
    axis: dict[str, list[float]] = field(repr=False)

    def trainer(self, *extra: Any) -> L.Trainer:
        """Makes the Trainer, with new callbacks."""
        budget = None
        options: dict[str, Any] = {"max_epochs": -1}
        if self.limit_by == "max_steps":
            options = {"max_steps": int(self.limit.value), "max_epochs": -1}
        elif self.limit_by == "max_epochs":
            options = {"max_epochs": int(self.limit.value)}
        else:
            budget = f"{self.limit.value:g} {self.limit.unit}"
        callbacks: list[L.Callback] = [
            LearningRateScheduler(self.schedule, max_lr=self.max_lr, budget=budget)
        ]
        if self.policy is not None:
            callbacks.append(BatchSizeScheduler(self.policy, lr_scaling=self.scaling))
        else:
            options["accumulate_grad_batches"] = self.accumulate
        if self.clips:
            callbacks.append(GradientClipping(NormClip(0.5)))
        if self.bad:
            callbacks.append(StepGuard([NonFinite()]))
        random.Random(self.seed).shuffle(callbacks)
        options |= {**QUIET, **cpu_precision(self.precision), "callbacks": [*callbacks, *extra]}
        return L.Trainer(**options)

    def loader(self) -> Any:
        """Makes the loader: one whose position is saved, because some runs are resumed."""
        if self.exact:
            return GlobalBatchLoader(
                Regression(self.data), micro_batch_size=self.micro, shuffle="sequential"
            )
        return PositionedLoader(Regression(self.data), batch_size=self.micro)

    def expected_lrs(self, update: Update) -> tuple[float, ...]:
        """Returns the learning rate of every group: base × factor × scaling, up to the bound."""
        factor = self.curve(min(update.fraction, 1.0), Part(self.axis))
        if self.scaling is not None and update.planned is not None:
            first = self.updates[0].planned
            assert first is not None
            kappa = update.planned / first
            factor *= kappa if self.scaling == "linear" else math.sqrt(kappa)
        bound = math.inf if self.max_lr is None else self.max_lr
        return tuple(min(lr * factor, bound) for lr in self.lrs)


def configuration(seed: int) -> Configuration:
    """Draws a configuration."""
    rng = random.Random(seed)
    micro = rng.randint(1, 4)
    data = rng.randint(5 * micro, 12 * micro)
    exact = rng.random() < 0.35
    accumulate = rng.randint(1, 3)
    policy: BatchSizePolicy | None = None
    size: Size | None = None
    if exact or rng.random() < 0.5:
        policy, size = _policy(rng, data, micro, exact=exact)
    limit, limit_by = _limit(rng, data)
    updates, axis = simulate(
        data, micro, limit=limit, size=size, accumulate=accumulate, exact=exact
    )
    run = Run(len(updates), axis["samples"][-1], axis["epochs"][-1])  # type: ignore[arg-type]
    schedule, curve = Maker(rng, run).make()
    varies = policy is not None and not isinstance(policy, ConstantBatchSize)
    bad = frozenset(rng.sample(range(len(updates)), min(2, len(updates) - 1)))
    return Configuration(
        seed=seed,
        data=data,
        micro=micro,
        limit=limit,
        limit_by=limit_by,
        accumulate=accumulate,
        policy=policy,
        exact=exact,
        schedule=schedule,
        curve=curve,
        lrs=tuple(round(rng.uniform(0.001, 0.01), 4) for _ in range(rng.randint(1, 3))),
        max_lr=0.004 if rng.random() < 0.2 else None,
        scaling=rng.choice((None, "linear", "sqrt")) if varies else None,
        precision=rng.choice(("32", "32", "bf16-mixed", "16-mixed")),
        clips=rng.random() < 0.5,
        bad=bad if rng.random() < 0.4 else frozenset(),
        resume=rng.randint(1, len(updates) - 1)
        if rng.random() < 0.4 and len(updates) > 1
        else None,
        updates=updates,
        axis=axis,
    )


def _limit(rng: random.Random, data: int) -> tuple[Limit, str]:
    kind = rng.choice(("max_steps", "max_epochs", "steps", "samples", "epochs"))
    if kind in ("max_steps", "steps"):
        return Limit(rng.randint(5, 30), "steps"), kind
    if kind in ("max_epochs", "epochs"):
        return Limit(rng.randint(1, 3), "epochs"), kind
    return Limit(rng.randint(data // 2, 3 * data), "samples"), kind


def _policy(
    rng: random.Random, data: int, micro: int, *, exact: bool
) -> tuple[BatchSizePolicy, Size]:
    """Draws a policy, with its rule in plain numbers; sizes are multiples of the micro-batch."""
    grain = 1 if exact else micro
    most = max(2, min(data // grain, 4 if not exact else 12))
    sizes = [grain * rng.randint(1, most) for _ in range(3)]
    kind = rng.choice(("constant", "steps", "ramp"))
    if kind == "constant":
        return ConstantBatchSize(sizes[0]), lambda consumed: sizes[0]
    unit: Any = rng.choice(("percent", "steps", "samples", "epochs"))
    word = "%" if unit == "percent" else f" {unit}"
    most_of = {"percent": 80, "steps": 10, "samples": data, "epochs": 1}[unit]
    if kind == "steps" and len(set(sizes)) > 1:
        first = max(1, round(most_of * rng.uniform(0.2, 0.5)))
        second = first + max(1, round(most_of * 0.3))
        table = {f"0{word}": sizes[0], f"{first}{word}": sizes[1], f"{second}{word}": sizes[2]}

        def steps(consumed: Callable[[Any], float]) -> int:
            amount = consumed(unit)
            passed = (amount >= first * (1 - 1e-12)) + (amount >= second * (1 - 1e-12))
            return sizes[passed]

        return BatchSizeSteps(table), steps
    start = sizes[0]
    increments = min(rng.randint(1, 3), (data - start) // grain)  # at most the data of an epoch
    over = max(1, round(most_of * rng.uniform(0.4, 1.0)))
    if not increments:
        return ConstantBatchSize(start), lambda consumed: start

    def ramp(consumed: Callable[[Any], float]) -> int:
        passed = math.floor(consumed(unit) / over * increments * (1 + 1e-12))
        return start + grain * min(passed, increments)

    policy = BatchSizeRamp(
        start, end=start + grain * increments, over=f"{over}{word}", increment=grain
    )
    return policy, ramp


def check(seed: int) -> str:
    """Trains a configuration; returns the first difference from the oracle, or an empty string."""
    config = configuration(seed)
    try:
        config.expected_lrs(config.updates[0])
    except TooLong:
        return _check_error(config)
    windows, seen = _train(config)
    expected = [update.rows for update in config.updates]
    if config.exact:  # padding repeats a sample with weight 0 on no process here
        windows = [tuple(sorted(rows)) for rows in windows]
    if windows != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(windows, expected, strict=False)) if a != b),
            min(len(windows), len(expected)),
        )
        return (
            f"update {at} of {len(expected)} has the samples {windows[at : at + 1]} instead of "
            f"{expected[at : at + 1]} ({len(windows)} updates)"
        )
    for step, update in enumerate(config.updates):
        if step in config.bad:
            if step in seen:
                return f"update {step} was not skipped"
            continue
        lrs = config.expected_lrs(update)
        if step not in seen:
            return f"update {step} was skipped"
        near = zip(seen[step], lrs, strict=True)
        if not all(math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-15) for a, b in near):
            return f"update {step} of {len(expected)} has the rates {seen[step]} instead of {lrs}"
    return ""


def _check_error(config: Configuration) -> str:
    try:
        _train(config)
    except ValueError as error:
        return "" if "must be at most" in str(error) else f"another error: {error}"
    return "a schedule that is longer than the run was accepted"


def _train(config: Configuration) -> tuple[list[tuple[int, ...]], dict[int, tuple[float, ...]]]:
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        module = Recorder(config.lrs, config.bad)
        if config.resume is None:
            config.trainer().fit(module, config.loader())
            return module.windows, module.seen
        path = Path(folder, "checkpoint.ckpt")
        trainer = config.trainer(SaveAt(path, config.resume), StopAt(config.resume))
        with contextlib.suppress(Stop):
            trainer.fit(module, config.loader())
        resumed = Recorder(config.lrs, config.bad)
        config.trainer().fit(resumed, config.loader(), ckpt_path=path, weights_only=True)
        windows = module.windows[: config.resume] + resumed.windows
        return windows, {**module.seen, **resumed.seen}


def describe(config: Configuration) -> str:
    """Returns the configuration in one line, for a report."""
    return repr(config)


def measure(*, cases: int = 600, first: int = 0) -> str:
    """Trains random configurations; returns the counts as Markdown, and the differences."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    traits: Counter[str] = Counter()
    updates, failed = 0, []
    for seed in range(first, first + cases):
        config = configuration(seed)
        try:
            problem = check(seed)
        except Exception as error:  # noqa: BLE001  # a run that raises is a difference
            last = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        updates += len(config.updates)
        traits.update(_traits(config))
        if problem:
            failed.append(f"- seed {seed}: {problem}\n  `{describe(config)}`")
    lines = [
        TEXT,
        "| runs | updates | differences |",
        "|---:|---:|---:|",
        f"| {cases} | {updates:,} | {len(failed)} |",
        "",
        "| trait | runs |",
        "|---|---:|",
        *(f"| {trait} | {count} |" for trait, count in sorted(traits.items())),
        "",
        *failed[:30],
    ]
    return "\n".join(lines)


def _traits(config: Configuration) -> list[str]:
    return [
        f"schedule: {type(config.schedule).__name__}",
        f"limit: {config.limit_by}",
        f"policy: {'none' if config.policy is None else type(config.policy).__name__}",
        f"loader: {'GlobalBatchLoader' if config.exact else 'DataLoader'}",
        f"precision: {config.precision}",
        *([f"lr_scaling: {config.scaling}"] if config.scaling else []),
        *(["a smaller last batch"] if config.data % config.micro else []),
        *(["skipped updates"] if config.bad else []),
        *(["resumed"] if config.resume is not None else []),
        *(["several parameter groups"] if len(config.lrs) > 1 else []),
        *(["max_lr"] if config.max_lr is not None else []),
        *(["clipping"] if config.clips else []),
    ]
