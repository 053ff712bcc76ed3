"""The modes of the optimizers of a fit, and the weights of evaluation in its checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_bigopt.gradients.sharding import to_local
from lightning_bigopt.optimizers import modes
from lightning_bigopt.optimizers.names import unwrapped
from lightning_bigopt.optimizers.object_snapshot import copied
from lightning_bigopt.parameters import named_parameters
from lightning_bigopt.trainer_access import saved_weights, strategies, trial_runs
from lightning_bigopt.trainer_access.callbacks import find_lightning_callback
from lightning_bigopt.trainer_access.packages import classes
from lightning_bigopt.trainer_access.saved_weights import Collect

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["OptimizerModes", "prepare_trial", "train_optimizers"]

_OWNER = "training_weights"  # of the second weights of a sharded checkpoint


def prepare_trial(trainer: Trainer) -> None:
    """Switches optimizers to training mode before the first batch.

    A finder of Lightning may train before :class:`OptimizerModes` is there, and restores all state.
    """

    def train() -> None:
        trial_runs.call_before_batch(trainer, None)
        train_optimizers(trainer)

    trial_runs.call_before_batch(trainer, train)


def train_optimizers(trainer: Trainer) -> None:
    """Switches optimizers to training mode, for a trial that restores all state."""
    for optimizer in _with_modes(trainer):
        optimizer.train()


def _with_modes(trainer: Trainer) -> list[Any]:
    return [one for one in map(unwrapped, trainer.optimizers) if modes.has_modes(one)]


class OptimizerModes:
    """Switches optimizers with ``train()`` and ``eval()``.

    They are in training mode while batches are trained, and in evaluation mode from the beginning
    of an evaluation to the next batch, at the end of a fit, and in every checkpoint. A checkpoint
    contains the weights of evaluation mode as the model's, so that they are what
    ``load_from_checkpoint`` and a file of weights give, and the training weights beside them.

    ``train()`` after ``eval()`` computes the training weights only up to rounding. They are copied
    instead: neither an evaluation nor saving changes the training, and a run that is resumed
    without an evaluation that the other one had equals it to the bit.

    Args:
        trainer: The Trainer, while it fits.
        module: The module that is trained.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        # The training weights of a checkpoint, until they are loaded into the module.
        self._restored: Mapping[str, Any] | None = None
        # Those of the run, with their parameters, while it evaluates.
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        # Those of the checkpoint that is being saved.
        self._collected: Mapping[str, Any] | None = None
        self._is_training = False

    # ------------------------------------------------------------------------------- the modes

    def prepare(self) -> None:
        """Prepares for loading a checkpoint, and for the first batch.

        Raises:
            ValueError: If the strategy is FSDP1, whose parameters are parts of flat tensors, or a
                callback of Lightning averages the weights, too.
        """
        optimizers = _with_modes(self._trainer)
        if optimizers:
            _check_fit(self._trainer, type(optimizers[0]).__name__)
        # A checkpoint has the weights of evaluation, and the mode only if it is in param_groups.
        # A sharded strategy loads a state after a step, with a learning rate of 0, has created it.
        is_sharded = strategies.shards_gradients(self._trainer)
        for optimizer in optimizers:
            if not optimizer.state:
                for method in ("eval", "train") if is_sharded else ("train", "eval"):
                    modes.switch(optimizer, method)
                # Those of schedulefree create empty states, with which torch omits that step.
                for parameter in [p for p, state in optimizer.state.items() if not state]:
                    del optimizer.state[parameter]
        self._switch_before_batch()

    def read_shards(self) -> None:
        """Reads the training weights of a sharded checkpoint; a collective."""
        optimizers = _with_modes(self._trainer)
        if optimizers and self._restored is None:
            weights = {n: torch.empty_like(p.detach()) for n, p in self._parameters(optimizers)}
            if saved_weights.read_second_weights(self._trainer, weights, owner=_OWNER):
                self._restored = weights

    def restore(self, weights: Mapping[str, Any] | None) -> None:
        """Stores the training weights of a checkpoint, whose optimizers have their own mode."""
        self._restored, self._kept = weights, None
        self._switch_before_batch()

    def _switch_before_batch(self) -> None:
        """Switches to training mode before the next batch, also if it is one of a trial."""
        self._is_training = False
        self._collected = None
        function = self._train if _with_modes(self._trainer) else None
        trial_runs.call_before_batch(self._trainer, function)

    def follow_changes(self) -> None:
        """Switches new optimizers and parameter groups to training mode, if the others are."""
        if self._is_training:
            self._train()

    def state(self) -> Mapping[str, Any] | None:
        """Returns the training weights for the state of the engine; None for none, or shards."""
        weights = self._collected if self._restored is None else self._restored
        return None if weights is None or saved_weights.is_sharded(weights) else weights

    def _train(self) -> None:
        trial_runs.call_before_batch(self._trainer, None)
        for optimizer in _with_modes(self._trainer):
            modes.switch(optimizer, "train")
        if self._restored is not None:
            saved_weights.load_weights_(self._trainer, self._restored)
        elif self._kept is not None:
            _write(self._kept)
        self._restored = self._kept = None
        self._is_training = True

    def evaluate(self) -> None:
        """Switches to evaluation mode, and keeps the training weights."""
        optimizers = _with_modes(self._trainer)
        kept = self._copies(optimizers)
        if self._evaluate(optimizers):
            self._kept = kept
        self._switch_before_batch()

    def end(self) -> Mapping[str, Any] | None:
        """Switches to evaluation mode at the end of the fit; uses no collectives.

        Returns:
            The training weights that differ from those of evaluation; None for none, and if they
            are sharded.
        """
        optimizers, collect = _with_modes(self._trainer), self._collect
        if not optimizers or self._restored is not None:
            self._evaluate(optimizers)
            return self.state()
        kept = self._kept or self._copies(optimizers)
        if not self._evaluate(optimizers) and self._kept is None:
            return None
        if strategies.shards_gradients(self._trainer):
            return None
        return _different(self._with(kept, collect, optimizers), collect()) or None

    def _collect(self) -> dict[str, Any]:
        return saved_weights.collect_weights(self._trainer)

    def _evaluate(self, optimizers: Iterable[Optimizer]) -> list[Optimizer]:
        """Switches optimizers to evaluation mode, and returns those that were in training mode."""
        return [
            optimizer
            for optimizer in optimizers
            if modes.switch(optimizer, "eval")
            # Or one that shows its mode nowhere.
            or (self._is_training and not modes.shows_mode(optimizer))
        ]

    # -------------------------------------------------------------------------------- checkpoints

    def collect_weights(self, collect: Collect) -> dict[str, Any]:
        """Collects the weights of evaluation mode; keeps the training weights for the state.

        Those of a sharded checkpoint are added under reserved keys.
        """
        optimizers = _with_modes(self._trainer)
        if not optimizers:
            return collect()
        training = self._restored
        with self._evaluation_mode(optimizers) as switched:
            weights = self._copy_live_tensors(collect(), optimizers)
            if training is None and self._kept is not None:
                training = self._with(self._kept, collect, optimizers)
        if training is None and switched:
            training = collect()
        self._collected = None
        if training is None:
            return weights
        if saved_weights.is_sharded(weights):
            names = [name for name, _ in self._parameters(optimizers) if name in training]
            second = {name: training[name] for name in names}
            return saved_weights.with_second_weights(weights, second, owner=_OWNER)
        self._collected = _different(training, weights) or None
        return weights

    def collect_optimizer(self, optimizer: Optimizer, collect: Collect) -> dict[str, Any]:
        """Collects the state of an optimizer in evaluation mode, to which the weights belong."""
        one = unwrapped(optimizer)
        if not modes.has_modes(one):
            return collect()
        versions = modes.state_versions(one)
        with self._evaluation_mode([one]):
            state = collect()
            # An optimizer that exchanges the weights with its state changes this again.
            return copied(state) if modes.state_versions(one) != versions else state

    @contextmanager
    def _evaluation_mode(self, optimizers: Sequence[Optimizer]) -> Iterator[list[Optimizer]]:
        """Switches to evaluation mode and, to the bit, back; yields what was in training mode."""
        weights = self._copies(optimizers)
        switched = self._evaluate(optimizers)
        try:
            yield switched
        finally:
            for optimizer in switched:
                modes.switch(optimizer, "train")
            if switched:
                _write(weights)

    def _with(
        self,
        weights: Iterable[tuple[Tensor, Tensor]],
        collect: Collect,
        optimizers: Sequence[Optimizer],
    ) -> dict[str, Any]:
        """Collects the state of the module with other weights."""
        current = self._copies(optimizers)
        _write(weights)
        try:
            return self._copy_live_tensors(collect(), optimizers)
        finally:
            _write(current)

    def _copies(self, optimizers: Iterable[Optimizer]) -> list[tuple[Tensor, Tensor]]:
        """Returns the parameters of the optimizers with copies of their local parts."""
        parameters = [parameter for _, parameter in self._parameters(optimizers)]
        return [(p, to_local(p.detach()).clone()) for p in parameters]

    def _parameters(self, optimizers: Iterable[Optimizer]) -> list[tuple[str, Tensor]]:
        return [pair for one in optimizers for pair in named_parameters(self._module, one)]

    def _copy_live_tensors(
        self, weights: dict[str, Any], optimizers: Iterable[Optimizer]
    ) -> dict[str, Any]:
        """Replaces tensors that share memory with parameters of the optimizers by copies."""
        live = {_address(parameter) for _, parameter in self._parameters(optimizers)}
        for name, value in weights.items():
            if isinstance(value, Tensor) and _address(value) in live:
                weights[name] = value.detach().clone()
        return weights


def _check_fit(trainer: Trainer, optimizer: str) -> None:
    """Raises for what cannot be right beside an optimizer with two modes."""
    modes_of = "an optimizer that has a training and an evaluation mode"
    if isinstance(trainer.strategy, classes("strategies.FSDPStrategy")):
        raise ValueError(
            f"strategy must not be FSDPStrategy with {modes_of}, got {optimizer}; use "
            "ModelParallelStrategy (FSDP2) or DDP"
        )
    for kind in ("WeightAveraging", "StochasticWeightAveraging"):
        if (average := find_lightning_callback(trainer, kind)) is not None:
            # They load their average at the end of the fit, and eval() would change it.
            raise ValueError(
                f"callbacks must not contain {type(average).__name__} with {modes_of}, got "
                f"{optimizer}, which averages the weights itself; remove one of them"
            )


@torch.no_grad()
def _write(weights: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Writes copies of the local parts of parameters back."""
    for parameter, weight in weights:
        to_local(parameter).copy_(weight)


def _address(tensor: Tensor) -> int:
    return to_local(tensor.detach()).untyped_storage().data_ptr()


def _different(weights: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors that differ from those of the same name."""
    return {
        name: value
        for name, value in weights.items()
        if isinstance(value, Tensor) and not torch.equal(value, others[name])
    }
