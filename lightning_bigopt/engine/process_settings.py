"""Compares the capabilities and their arguments over all processes, before the first batch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import distributed

from lightning_bigopt.checks import as_code, without_addresses
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.trainer_access import strategies

__all__ = ["check_processes", "publish_settings"]

_RESULT = "lightning_bigopt/settings/difference"
_CLOCK_SETTINGS = ("budget", "on_resume", "cooldown")


def publish_settings(fit: Fit) -> None:
    """Publishes the settings of this process. Not a collective."""
    trainer = fit.trainer
    store = strategies.process_store(trainer)
    if store is None:
        return
    if trainer.global_rank == 0:
        store.delete_key(_RESULT)  # of an earlier fit
    store.set(_key(trainer.global_rank), json.dumps(_settings(fit)))


def check_processes(fit: Fit) -> None:
    """Raises if processes have other callbacks of this package, other arguments or budgets.

    Args:
        fit: The fit, when its clock has started.

    Raises:
        ValueError: If processes differ.
    """
    _check_settings(fit)
    _check_horizons(fit)


def _check_settings(fit: Fit) -> None:
    """Raises if a process has other callbacks of this package, or other arguments.

    Called when all processes have passed a barrier after :func:`publish_settings`. A process
    without a callback of this package does not get here: a collective would wait for it.

    Raises:
        ValueError: If the settings differ, on every process that has callbacks of this package.
    """
    trainer = fit.trainer
    store = strategies.process_store(trainer)
    if store is None:
        return
    keys = [_key(rank) for rank in range(trainer.world_size)]
    is_complete = store.check(keys)
    if not is_complete:
        missing = next(rank for rank, key in enumerate(keys) if not store.check([key]))
        difference = f"none on process {missing}"
    elif trainer.global_rank == 0:
        difference = _first_difference(store, trainer.world_size)
        store.set(_RESULT, difference)
    else:
        difference = store.get(_RESULT).decode()  # waits for process 0
    if not difference:
        return
    if is_complete:
        distributed.barrier()  # process 0, which may hold the store, must not end first
    raise ValueError(
        "the callbacks of lightning_bigopt and their arguments must be the same on every process, "
        f"got {difference}; create them in code that every process runs"
    )


def _check_horizons(fit: Fit) -> None:
    """Raises if the budget of the run differs between processes. A collective.

    Called after :func:`_check_settings`: all processes get here.

    Raises:
        ValueError: If a process has another budget, because its data set has another length, for
            example.
    """
    horizon = fit.clock.horizon
    if fit.trainer.world_size == 1 or horizon is None or not distributed.is_initialized():
        return
    # Lengths of epochs may differ where the run ends after a number of steps.
    batches = None if horizon.epochs is None else horizon.batches_per_epoch
    mine = (horizon.budget, horizon.clock, batches)
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, mine)
    for rank, other in enumerate(gathered):
        if other != gathered[0]:
            raise ValueError(
                "the length of the run must be the same on every process, got "
                f"{_length(*gathered[0])} on process 0 and {_length(*other)} on process {rank}; "
                "give every process as many batches, or limit the run by max_steps"
            )


def _length(budget: float, unit: str, batches: int | None) -> str:
    return f"{budget:g} {unit}" + ("" if batches is None else f" (epochs of {batches} batches)")


def _settings(fit: Fit) -> dict[str, str]:
    """Returns the settings that must be equal on all processes, as code by name."""
    length = int(fit.trainer.accumulate_grad_batches)
    settings = {"accumulate_grad_batches of the Trainer": str(length)}
    for name in _CLOCK_SETTINGS:
        settings[name] = as_code(getattr(fit.clock.settings, name))
    for capability in fit.capabilities:
        # Listed also if it has no specification: other processes must have it, too.
        label = f"{type(capability).__name__} ({capability.owns})"
        settings[label] = without_addresses(capability.specification())
        for name, code in capability.settings_as_code().items():
            settings[f"{name} of {label}"] = code
    # The number of a device differs between processes.
    return {name: re.sub(r"\b(cuda|xpu|hpu):\d+", r"\1", text) for name, text in settings.items()}


def _key(rank: int) -> str:
    return f"lightning_bigopt/settings/{rank}"


def _first_difference(store: Any, processes: int) -> str:
    """Describes how a process differs from process 0; returns an empty text if none does."""
    first, *others = [json.loads(store.get(_key(rank))) for rank in range(processes)]
    differences = (_differences(first, other, rank) for rank, other in enumerate(others, start=1))
    return next(filter(None, differences), "")


def _differences(first: Mapping[str, str], other: Mapping[str, str], rank: int) -> str:
    parts = []
    for name in {**first, **other}:
        mine, theirs = first.get(name), other.get(name)
        owner = name.partition(" of ")[2]
        if (owner in first) != (owner in other):
            continue  # the capability itself is named
        if mine is None or theirs is None:
            parts.append(f"{name} on process {rank if mine is None else 0} only")
        elif _tokens(mine) != _tokens(theirs):
            parts.append(f"{name}: {mine} on process 0, {theirs} on process {rank}")
    return "; ".join(parts)


def _tokens(text: str) -> list[str]:
    """Returns the names and numbers of a code in sorted order.

    The order in a set, and in a dict that is made from one, differs between processes.
    """
    return sorted(re.findall(r"[\w.+-]+", text))
