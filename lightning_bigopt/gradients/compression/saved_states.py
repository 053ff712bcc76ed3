"""Gathers the states of all processes for a checkpoint, and selects those of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from lightning_bigopt.gradients.compression.error_feedback import RESIDUAL, ParameterState

__all__ = ["States", "gathered_states", "states_of_process"]

States: TypeAlias = dict[str, ParameterState]
"""The states of the parameters of one process, by name."""


def gathered_states(states: States, group: ProcessGroup | None) -> list[States] | None:
    """Gathers the states of all processes on the first one; a collective.

    Args:
        states: The states of this process; all processes have the same parameters.
        group: The process group.

    Returns:
        The states of each process, on the host, and without what is equal on all of them except for
        the first; None on the other processes.
    """
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    gathered: list[States] = [{} for _ in range(size)]
    for name, state in states.items():  # one parameter at a time, to need little memory
        residual = state[RESIDUAL].contiguous()
        parts: list[Tensor] | None = None
        if rank == 0:
            parts = [torch.empty_like(residual) for _ in range(size)]
        distributed.gather(residual, parts, group=group, group_dst=0)
        for index, part in enumerate(parts or ()):
            gathered[index][name] = {RESIDUAL: part.cpu()}
        if rank == 0:
            gathered[0][name] |= {k: v.cpu() for k, v in state.items() if k != RESIDUAL}
    return gathered if rank == 0 else None


def states_of_process(saved: Sequence[States], rank: int, size: int) -> States:
    """Selects the states of one process from those of a checkpoint.

    Args:
        saved: The states of each process that saved them.
        rank: Rank of this process.
        size: Number of processes. If it differs from that of the checkpoint, every process gets the
            mean of the residuals: the mean gradient then contains what was not sent.

    Example:
        >>> saved = [{"w": {"residual": torch.tensor([v])}} for v in (1.0, 3.0)]
        >>> states_of_process(saved, 1, 2), states_of_process(saved, 0, 1)
        ({'w': {'residual': tensor([3.])}}, {'w': {'residual': tensor([2.])}})
    """
    found: States = {}
    for name, common in saved[0].items():
        parts = [states[name][RESIDUAL] for states in saved]
        residual = parts[rank] if len(saved) == size else torch.stack(parts).mean(0)
        found[name] = {**common, RESIDUAL: residual}
    return found
