"""The parameters of each optimizer with their names; warns if training loses some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_bigopt.optimizers.names import optimizer_label, unwrapped
from lightning_bigopt.parameters import named_parameters
from lightning_bigopt.trainer_access import strategies

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["OptimizerInfo", "OptimizerInfos"]

_MAX_NAMES = 5


class OptimizerInfo(NamedTuple):
    """An optimizer with its label and the names of its parameters.

    Attributes:
        optimizer: The optimizer.
        parameters: Names and parameters, each tensor once, in the order of the groups. The list is
            the same object until a parameter is added, removed, moved or replaced.
        label: Name of the optimizer; empty if there is only one.
    """

    optimizer: Optimizer
    parameters: list[tuple[str, nn.Parameter]]
    label: str


class _Known(NamedTuple):
    """What is known of an optimizer.

    Attributes:
        info: Its label and parameters.
        identities: The identity of each parameter in its groups.
        in_module: The identities of those that were in the module.
    """

    info: OptimizerInfo
    identities: list[int]
    in_module: set[int]


class OptimizerInfos:
    """Caches labels and parameter names, until the parameters of an optimizer change.

    Args:
        trainer: The Trainer.
        module: The module that is trained.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._cache: dict[int, _Known] = {}
        self._averaged: WeakTensorKeyDictionary | None = None
        self._has_warned = False

    def start(self, optimizers: Sequence[Optimizer]) -> None:
        """Records the parameters of all optimizers, and those that DDP averages."""
        if strategies.averages_initial_parameters(self._trainer):
            self._averaged = WeakTensorKeyDictionary()
            for parameter in self._module.parameters():
                if parameter.requires_grad:
                    self._averaged[parameter] = True
        for optimizer in optimizers:
            self.find(optimizer)

    def find(self, optimizer: Optimizer) -> OptimizerInfo:
        """Returns the label of an optimizer and the names of its current parameters."""
        # The identities and not the number, because a parameter may be replaced by another one, as
        # when an embedding is resized. The cache holds the parameters, so that no identity is used
        # again. 300 parameters take less than a tenth of a percent of a step of 30 ms.
        identities = [id(p) for group in optimizer.param_groups for p in group["params"]]
        known = self._cache.get(id(optimizer))
        if known is not None and known.identities == identities:
            return known.info
        label = optimizer_label(self._trainer.optimizers, unwrapped(optimizer))
        info = OptimizerInfo(optimizer, named_parameters(self._module, optimizer), label)
        current = set(map(id, self._module.parameters()))
        self._cache[id(optimizer)] = _Known(info, identities, current.intersection(identities))
        if known is not None:
            before = set(known.identities)
            added = [pair for pair in info.parameters if id(pair[1]) not in before]
            self._check_added(added, current)
        return info

    def _check_added(self, added: Sequence[tuple[str, nn.Parameter]], current: set[int]) -> None:
        """Warns about new parameters that the module does not use, or that DDP does not average."""
        unused = [name for name, p in added if id(p) not in current and p.grad is None]
        if unused:
            rank_zero_warn(
                "optimizers must hold the parameters of the module, got new ones without a "
                f"gradient that the module does not have: {_some(unused)}; set them in the module, "
                "too (under FSDP2 a parameter cannot be replaced after configure_model)"
            )
        if self._averaged is None:
            return
        local = [name for name, p in added if p not in self._averaged]
        if local:
            rank_zero_warn(
                "parameters must require a gradient when a fit with DDP starts, got new ones in "
                f"the optimizer: {_some(local)}; DDP does not average their gradients, so that the "
                "weights of the processes differ: start a new fit after replacing a parameter, "
                "and do not freeze before the fit what is trained later"
            )

    def check_module(self) -> None:
        """Warns, once, about parameters that an optimizer holds but the module has replaced."""
        if self._has_warned:
            return
        current = set(map(id, self._module.parameters()))
        for known in self._cache.values():
            lost = [
                name
                for name, p in known.info.parameters
                # FSDP2 itself registers other tensors between two passes.
                if id(p) in known.in_module - current and not isinstance(p, DTensor)
            ]
            if lost:
                self._has_warned = True
                rank_zero_warn(
                    "optimizers must hold the parameters of the module, got "
                    f"{type(unwrapped(known.info.optimizer)).__name__} with tensors that the "
                    f"module has replaced or removed: {_some(lost)}; put the new ones into "
                    "optimizer.param_groups, or they are not trained"
                )


def _some(names: Sequence[str]) -> str:
    more = ", …" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
