"""Every argument of the batch-size callbacks in a config file."""

from __future__ import annotations

from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from lightning_bigopt import BatchSizeScheduler, GlobalBatchFinder, GradientNoiseScale
from tests.batch_helpers import tokens_of

CONFIG = """
callbacks:
  - class_path: lightning_bigopt.BatchSizeScheduler
    init_args:
      policy:
        class_path: lightning_bigopt.BatchSizeRamp
        init_args: {start: 8, end: 32, over: 50%}
      lr_scaling: sqrt
      beta2_scaling: half-life
      weight_decay_scaling: sqrt
      rewarmup: 2%
      max_kappa: 3.0
      weight: tests.batch_helpers.tokens_of
      tokens: tests.batch_helpers.tokens_of
      micro_batch_size: 4
  - class_path: lightning_bigopt.GradientNoiseScale
    init_args: {decay: 0.95}
  - class_path: lightning_bigopt.GlobalBatchFinder
    init_args: {global_batch_size: 64, search: power}
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_config_file_sets_every_argument_and_loads_after_saving() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    first = parser.parse_string(CONFIG)
    again: Any = parser.instantiate_classes(parser.parse_string(parser.dump(first)))
    scheduler, noise, finder = again.callbacks
    assert isinstance(scheduler, BatchSizeScheduler)
    coupling = scheduler.coupling
    assert (coupling.lr_scaling, coupling.beta2_scaling) == ("sqrt", "half-life")
    assert (coupling.weight_decay_scaling, coupling.max_kappa) == ("sqrt", 3.0)
    assert str(coupling.rewarmup) == "2%"
    assert scheduler.micro_batch_size == 4
    assert scheduler._weights.weight is tokens_of
    assert scheduler.settings.tokens is tokens_of
    assert isinstance(noise, GradientNoiseScale)
    assert noise.estimator.decay == 0.95
    assert isinstance(finder, GlobalBatchFinder)
    assert (finder.global_batch_size, finder.search) == (64, "power")
