"""Fits the loss law to some loss curves of a file, and predicts the others."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from scipy.optimize import least_squares

from benchmarks.laws.page import write_section
from lightning_bigopt import (
    LossCurve,
    LossLaw,
    MultiPowerLaw,
    MultiStep,
    Schedule,
    WarmupConstant,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)
from lightning_bigopt.planning.multi_power_law import RateHistory

TITLE = "The loss of a schedule"
FITTED = ("cosine_24000", "constant_24000", "wsdcon_9")
"""Schedules of the published file that are fitted; the others are predicted."""

Curves = Mapping[str, LossCurve]


def curves(
    path: Path | None, *, fitted: Sequence[str], quick: bool = False, write: bool = False
) -> None:
    """Fits the curves of each model, predicts its other curves, and prints the errors.

    Args:
        path: File with the columns model, schedule, step, learning_rate and loss; None for curves
            generated from a law.
        fitted: Schedules to fit.
        quick: Whether to generate short curves.
        write: Whether to write the section of the page.
    """
    models = generated_curves(300 if quick else 6000) if path is None else read_curves(path)
    rows = []
    for model, known in models.items():
        missing = sorted(set(fitted) - set(known))
        if missing:
            raise SystemExit(f"the file has no schedule {missing} of {model}; pass --fit NAMES")
        start = time.process_time()
        law = LossLaw.fit([known[name] for name in fitted])
        seconds = time.process_time() - start
        errors = {name: _errors(law, c) for name, c in known.items() if name not in fitted}
        inside = {name: _inside(law, known[name]) for name in errors}
        error = mean(float(np.abs(each).mean()) for each in errors.values())
        print(f"MAE {error:.5f} {model}", flush=True)
        rows.append((model, law, errors, inside, seconds, _plain_error(known, fitted)))
    if write:
        write_section(TITLE, _section(rows, fitted))


def read_curves(path: Path) -> dict[str, dict[str, LossCurve]]:
    """Reads the curves of each model by schedule.

    The curves begin after a linear warm-up from 0 to the peak, which ends at the first step of the
    model in the file.
    """
    points: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            known = points.setdefault(row["model"], {})
            values = (int(row["step"]), float(row["learning_rate"]), float(row["loss"]))
            known.setdefault(row["schedule"], []).append(values)
    found = {}
    for model, schedules in points.items():
        warmup = min(steps[0][0] for steps in schedules.values())
        found[model] = {
            name: LossCurve.from_points(
                steps=[step for step, _, _ in values],
                learning_rates=[rate for _, rate, _ in values],
                updates=[step for step, _, _ in values],
                losses=[loss for _, _, loss in values],
                warmup=warmup,
                name=name,
            )
            for name, values in schedules.items()
        }
    return found


def generated_curves(updates: int) -> dict[str, dict[str, LossCurve]]:
    """Returns noisy curves of a law, with the names of the schedules that are fitted."""
    law = MultiPowerLaw(
        floor=3.0, scale=0.52, alpha=0.5, drop=400, drop_speed=2.0, beta=0.58, gamma=0.64
    )
    longer = 3 * updates
    schedules: dict[str, tuple[Schedule, int]] = {
        "cosine_24000": (WarmupCosine(warmup="10%", end=0.1), updates),
        "constant_24000": (WarmupConstant(warmup="10%"), updates),
        "wsdcon_9": (MultiStep(milestones=[("50%", 0.3)]), updates),
        "linear": (WarmupLinear(warmup="10%", end=0.0), longer),
        "wsd": (WarmupStableDecay(warmup="10%", decay="20%"), longer),
        "cosine": (WarmupCosine(warmup="10%", end=0.1), longer),
    }
    generator = np.random.default_rng(0)
    found = {}
    for name, (schedule, count) in schedules.items():
        rates = schedule.values(count, base=3e-4)
        ends = range(count // 100, count + 1, count // 100)
        losses = law.losses(rates, list(ends)) + 0.002 * generator.standard_normal(len(ends))
        found[name] = LossCurve(
            learning_rates=rates, updates=ends, losses=losses.tolist(), name=name
        )
    return {"generated": found}


def _errors(law: LossLaw, curve: LossCurve) -> np.ndarray:
    predicted = law.law.losses(curve.learning_rates, curve.updates)
    return np.asarray(predicted - np.asarray(curve.losses))


def _inside(law: LossLaw, curve: LossCurve) -> float:
    """Returns the share of the losses inside the band."""
    found = law.predict_learning_rates(curve.learning_rates)
    low = np.interp(curve.updates, found.updates, found.low)
    high = np.interp(curve.updates, found.updates, found.high)
    losses = np.asarray(curve.losses)
    return float(((losses >= low) & (losses <= high)).mean())


def _plain_error(known: Curves, fitted: Sequence[str]) -> float:
    """Returns the error of a plain least-squares fit of all seven parameters, without bounds."""
    runs = [known[name] for name in fitted]
    histories = [RateHistory(run.learning_rates, run.updates) for run in runs]
    logs = np.log(np.concatenate([run.losses for run in runs]))

    def law_of(point: np.ndarray) -> MultiPowerLaw:
        names = ("floor", "scale", "alpha", "drop", "drop_speed", "beta", "gamma")
        return MultiPowerLaw(**dict(zip(names, map(float, np.exp(point)), strict=True)))

    def residuals(point: np.ndarray) -> np.ndarray:
        law = law_of(point)
        return np.log(np.concatenate([law.losses_of(each) for each in histories])) - logs

    start = np.log([3.0, 0.5, 0.5, 300.0, 2.0, 0.5, 0.6])
    law = law_of(least_squares(residuals, start, loss="soft_l1", f_scale=1e-3).x)
    return mean(
        float(np.abs(law.losses(curve.learning_rates, curve.updates) - curve.losses).mean())
        for name, curve in known.items()
        if name not in fitted
    )


def _section(rows: Sequence[tuple], fitted: Sequence[str]) -> str:
    lines = []
    for model, law, errors, inside, seconds, plain in rows:
        means = {name: float(np.abs(each).mean()) for name, each in errors.items()}
        pooled = float(np.abs(np.concatenate(list(errors.values()))).mean())
        lines.append(
            f"| {model} | **{mean(means.values()):.4f}** | {pooled:.4f} | {plain:.4f} | "
            f"{mean(inside.values()):.0%} | {law.unseen:.4f} | {seconds:.1f} s |"
        )
    of_each = [
        f"| {model} | {name} | {np.abs(each).mean():.4f} | {each[-1]:+.4f} | {inside[name]:.0%} |"
        for model, _, errors, inside, _, _ in rows
        for name, each in errors.items()
    ]
    return f"""\
Run with `python benchmarks/loss_law.py --curves FILE --write`; measured on
{time.strftime("%Y-%m-%d")}. The file has loss curves of language models under nine schedules each,
published with the Multi-Power Law (Luo et al., ICLR 2025). `LossLaw.fit` sees
{", ".join(f"`{name}`" for name in fitted)} and predicts the others, three times as long in part.

| model | mean absolute error | over all points | plain fit | in band | unseen pilot | CPU time |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}

The error is in nats: the mean over the schedules of the mean over their points. "Over all points"
weights a schedule by its number of points, so that the longest runs dominate. "In the band" is the
share of points in the band of 90 %, "unseen pilot" the error that the law reports for a pilot as
predicted from the others. The authors report 0.0038 (25M) and 0.0044 (100M); how they average over
schedules was not checked. The plain fit is scipy's `least_squares` for all seven parameters
without bounds: it is closer to the curves that it sees and farther from the others, because three
runs do not determine both exponents of the drop. The package ties them (`beta = gamma`) and bounds
them by 0.4 and 0.8.

| model | predicted schedule | mean absolute error | error at the end | points in the band |
|---|---|---|---|---|
{chr(10).join(of_each)}

The law fails most for the cosine schedule of three times the length: it expects a lower loss than
was measured all along the run. The rule of the band was chosen with these curves and those of the
next section, so that its coverage here is no independent test.
"""
