"""Parameter groups, combined optimizers, scheduled fields, and schedules as torch schedulers."""

from lightning_bigopt.optimizers.combined import CombinedOptimizer, combine_optimizers
from lightning_bigopt.optimizers.group_field import GroupField
from lightning_bigopt.optimizers.groups import parameter_groups
from lightning_bigopt.optimizers.lr_scheduler import ScheduleLR, as_lr_scheduler
from lightning_bigopt.optimizers.muon import Muon
from lightning_bigopt.optimizers.muon_adamw import MuonAdamW, muon_adamw
from lightning_bigopt.optimizers.parameter_group import ParameterGroup

__all__ = [
    "CombinedOptimizer",
    "GroupField",
    "Muon",
    "MuonAdamW",
    "ParameterGroup",
    "ScheduleLR",
    "as_lr_scheduler",
    "combine_optimizers",
    "muon_adamw",
    "parameter_groups",
]
