"""Converts a horizon to plain numbers for checkpoints, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.durations.progress import Span

__all__ = ["horizon_from_state", "horizon_to_state", "pair"]


def horizon_to_state(horizon: Horizon) -> dict[str, Any]:
    """Returns the fields of a horizon as plain numbers, without those that the Trainer sets."""
    return {  # "overlong" is excluded: it depends on fast_dev_run
        "clock": horizon.clock,
        "budget": horizon.budget,
        "batches_per_epoch": horizon.batches_per_epoch,
        "samples_per_epoch": horizon.samples_per_epoch,
        "epochs": horizon.epochs,
        "others": [horizon_to_state(other) for other in horizon.others],
        "spans": [_span_to_state(span) for span in horizon.spans],
    }


def horizon_from_state(state: dict[str, Any] | None) -> Horizon | None:
    """Returns the horizon of a checkpoint; None if it contains none."""
    if state is None:
        return None
    spans = tuple(
        # The last number is absent if it is 0, and in checkpoints of version 0.1.
        Span(updates=updates, batches=batches, samples=samples, tokens=tokens, left_out=sum(rest))
        for updates, batches, samples, tokens, *rest in state["spans"]
    )
    epochs = state["epochs"] if "epochs" in state else _epochs_of_version_0_1(state)
    others = tuple(filter(None, map(horizon_from_state, state.get("others", []))))
    return Horizon(**{**state, "spans": spans, "epochs": epochs, "others": others})


def _span_to_state(span: Span) -> list[Any]:
    state: list[Any] = [span.updates, span.batches, span.samples, span.tokens]
    return [*state, span.left_out] if span.left_out else state


def _epochs_of_version_0_1(state: dict[str, Any]) -> float | None:
    """Returns the budget in epochs of a state that does not contain it."""
    if state["clock"] == "batches" and state["batches_per_epoch"]:
        return float(state["budget"] / state["batches_per_epoch"])
    if state["clock"] == "samples" and state["samples_per_epoch"]:  # of a GlobalBatchLoader
        epochs = state["budget"] / state["samples_per_epoch"]
        # Other numbers of samples were a budget in samples.
        return float(epochs) if epochs == int(epochs) else None
    return None


def pair(state: Sequence[Any] | None) -> tuple[Any, Any] | None:
    """Returns the two values of a list in a checkpoint as a tuple; None for None.

    Example:
        >>> pair([0.5, 0.1]), pair(None)
        ((0.5, 0.1), None)
    """
    return None if state is None else (state[0], state[1])
