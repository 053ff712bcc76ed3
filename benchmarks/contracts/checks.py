"""The contracts that every optimizer is checked for, each with an oracle of its own.

A check returns ``"y"`` for equality to the bit or a bound that holds, and ``"≈"`` for equality up
to rounding. It returns ``"refused: "`` and the message of the error that the fit starts with,
``"own: "`` and a fault that the optimizer shows in a bare Trainer or a plain loop, too, or
``"fault: "`` and what is wrong.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.contracts.catalog import Entry
from benchmarks.contracts.training import BATCH, Module, SaveAt, difference, fit, loop
from benchmarks.skipped_updates import ManualModel, Model, problem
from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateScheduler,
    MaxUpdateRatio,
    NormClip,
    WarmupLinear,
)

__all__ = ["CHECKS", "amplified_rounding", "bare_fault", "run_check"]

MAX_NORM = 0.05
RATIO = 1e-3
STEPS = 12
ROUNDING = 1e-5


def schedule() -> LearningRateScheduler:
    """Makes the schedule whose factors :func:`factor` computes."""
    return LearningRateScheduler(WarmupLinear(warmup=3))


def factor(step: int) -> float:
    """Returns the factor of WarmupLinear: 3 updates of warm-up, then linear to zero."""
    return step / 3 if step < 3 else (STEPS - step) / (STEPS - 3)


def clipping() -> GradientClipping:
    return GradientClipping(NormClip(max_norm=MAX_NORM))


def equal(entry: Entry, found: Module, expected: Module, **options: Any) -> str:
    """Compares weights: equal to the bit, to rounding, or not."""
    size = difference(found, expected)
    if size == 0:
        return "y"
    if size < ROUNDING:
        return "≈"
    alone = amplified_rounding(entry, **options)
    if size < 30 * alone:
        return f"≈ amplifies rounding: {size:.0e}, a plain loop {alone:.0e}"
    return f"fault: weights differ by {size:.1e}, by rounding alone {alone:.0e}"


def amplified_rounding(entry: Entry, **options: Any) -> float:
    """Returns how much plain loops differ whose thresholds differ by a few roundings.

    A sign, a quantized state, a difference of gradients and a weight that is rounded to bfloat16
    amplify rounding, each only where a value is near a boundary; hence several thresholds.
    """
    plain = loop(entry, **{**options, "max_norm": MAX_NORM})
    shifts = (1.2e-7, -1.2e-7, 2.4e-7, -2.4e-7, 4.8e-7, -4.8e-7)
    loops = (loop(entry, **{**options, "max_norm": MAX_NORM * (1 + shift)}) for shift in shifts)
    return max(difference(shifted, plain) for shifted in loops)


def follows_schedule(entry: Entry) -> str:
    found = fit(entry, schedule())
    expected = loop(entry, factor=factor)
    base = loop(entry, steps=1).rates[0]
    planned = [base * factor(step) for step in range(STEPS)]
    if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(found.rates, planned, strict=True)):
        return f"fault: learning rates {found.rates[:4]}, planned {planned[:4]}"
    return equal(entry, found, expected, factor=factor)


def clips(entry: Entry) -> str:
    return equal(entry, fit(entry, clipping()), loop(entry, max_norm=MAX_NORM))


def skips(entry: Entry) -> str:
    kind = ManualModel if entry.is_manual else Model
    found = problem(partial(kind, entry.build, second_order=entry.second_order))
    return f"fault: {found}" if found else "y"


def limits_ratio(entry: Entry) -> str:
    free = fit(entry)
    limited = fit(entry, GradientClipping(MaxUpdateRatio(ratio=RATIO)))
    # The comparison of two rounded float32 weights.
    if max(limited.ratios) > RATIO * (1 + 1e-3):
        return f"fault: an update of {max(limited.ratios):.2e} × the weights, limit {RATIO}"
    return "y" if max(free.ratios) > RATIO else "fault: the limit is never reached"


def couples_to_batch(entry: Entry) -> str:
    ramp = BatchSizeSteps({"0%": BATCH, "50%": 4 * BATCH})
    # Three windows of one batch and three of four, in six-batch epochs: of 4 and 2.
    found = fit(entry, BatchSizeScheduler(ramp, lr_scaling="sqrt"), max_steps=6)
    base = loop(entry, steps=1).rates[0]
    used = sorted({round(rate / base, 5) for rate in found.rates})
    return "y" if used == [1.0, 2.0] else f"fault: factors {used}"


def resumes(entry: Entry, *callbacks: L.Callback) -> str:
    made = partial(_callbacks, callbacks)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mid.ckpt")
        straight = fit(entry, *made(), SaveAt(path, 4))
        resumed = fit(entry, *made(), ckpt_path=path)
    size = difference(resumed, straight)
    return "y" if size == 0 else f"fault: weights differ by {size:.1e}"


def _callbacks(given: tuple[L.Callback, ...]) -> list[L.Callback]:
    return list(given) or [schedule(), clipping()]


def trains_in_bfloat16(entry: Entry) -> str:
    found = fit(entry, clipping(), precision="bf16-mixed")
    return equal(entry, found, loop(entry, max_norm=MAX_NORM, bfloat16=True), bfloat16=True)


CHECKS: Mapping[str, Callable[[Entry], str]] = {
    "schedule": follows_schedule,
    "clip": clips,
    "exact skip": skips,
    "MaxUpdateRatio": limits_ratio,
    "batch coupling": couples_to_batch,
    "resume": resumes,
    "bf16-mixed": trains_in_bfloat16,
}


class Nothing(L.Callback):
    """An ordinary callback: the Trainer is bare."""


def bare_fault(entry: Entry, contract: str) -> str:
    """Returns the fault that a bare Trainer or a plain loop shows; empty if none."""
    try:
        if contract == "resume":
            found = resumes(entry, Nothing())
            return found.removeprefix("fault: ") if found.startswith("fault") else ""
        options = {"precision": "bf16-mixed"} if contract == "bf16-mixed" else {}
        bare = fit(entry, **options)
        if options or contract in {"schedule", "clip"}:
            plain = loop(entry, bfloat16=bool(options))
            found = equal(entry, bare, plain)
            if found.startswith("fault"):
                return f"a bare Trainer and a loop without it: {found.removeprefix('fault: ')}"
    except Exception as error:  # noqa: BLE001 - the table shows it
        return shortened(error)
    return ""


def shortened(error: Exception) -> str:
    """Returns the first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:240] if text else ''}"


def run_check(entry: Entry, contract: str) -> str:
    """Returns the result of a contract for an optimizer."""
    try:
        found = CHECKS[contract](entry)
    except ValueError as error:
        found = f"refused: {shortened(error).removeprefix('ValueError: ')}"
    except Exception as error:  # noqa: BLE001 - the table shows it
        found = f"fault: {shortened(error)}"
    if found[0] in "y≈":
        return found
    bare = bare_fault(entry, contract)
    return f"own: {bare}" if bare else found
