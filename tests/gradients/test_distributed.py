"""Distributed tensors, compared with plain ones on two and four processes."""

from __future__ import annotations

import multiprocessing

import pytest
import torch.multiprocessing

from notebooks.run import free_port
from tests.gradients import distributed_checks


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_distributed_tensors_equal_plain_ones(world):
    # The fork server imports everything once and has no threads, so forking is fast and safe.
    multiprocessing.set_forkserver_preload([distributed_checks.__name__])
    torch.multiprocessing.start_processes(
        distributed_checks.run_all, (world, free_port()), nprocs=world, start_method="forkserver"
    )
