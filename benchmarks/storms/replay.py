"""Storms of spikes, and rules that process recorded values of runs with or without a storm."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_bigopt.gradients import Detector, inspect, record

FACTORS = (10, 30, 100, 300, 1000)
CALM = 50
"""The first updates are never bad: a rule needs a history."""


@dataclass(frozen=True)
class Spike:
    """A bad update: its factor, and whether it is one of four in a row."""

    factor: int
    burst: bool


def draw_storm(seed: int, updates: int, *, singles: int = 12, bursts: int = 2) -> dict[int, Spike]:
    """Draws single spikes and bursts of four; positions and factors depend on the seed."""
    rng, storm = random.Random(seed), dict[int, Spike]()  # noqa: S311
    for number in range(singles + bursts):
        length = 4 if number < bursts else 1
        spike = Spike(rng.choice(FACTORS), length > 1)
        while True:
            first = rng.randrange(CALM, updates - length + 1)
            if not any(update in storm for update in range(first - 4, first + length + 4)):
                break
        storm |= dict.fromkeys(range(first, first + length), spike)
    return storm


def replay(rule: Detector, values: Sequence[float], storm: dict[int, Spike]) -> set[int]:
    """Returns the updates that a rule rejects; those of the storm are multiplied."""
    states, found = [rule.initial_state()], set()
    for update, value in enumerate(values):
        factor = storm[update].factor if update in storm else 1
        readings: Any = {rule.quantity: value * factor}
        verdict = inspect([rule], states, readings)
        record([rule], states, readings, verdict)
        if verdict is not None:
            found.add(update)
    return found
