"""GradientCompression: compresses the gradients that the processes of DDP send to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.callbacks.resume_report import report_changed_settings
from lightning_bigopt.checks import as_code
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Batch, Fit
from lightning_bigopt.engine.update import Update
from lightning_bigopt.gradients.communication_hook import CommunicationHook
from lightning_bigopt.gradients.compression.collectives import Collectives
from lightning_bigopt.gradients.compression.compressor import Compressor, FeedbackCompressor
from lightning_bigopt.gradients.compression.error_feedback import RESIDUAL, ErrorFeedback
from lightning_bigopt.gradients.compression.reduction import CompressedReduction
from lightning_bigopt.gradients.compression.saved_states import (
    States,
    gathered_states,
    states_of_process,
)
from lightning_bigopt.gradients.compression.top_k import TopK
from lightning_bigopt.parameters import plain_name
from lightning_bigopt.trainer_access import ddp_hooks, precision, strategies
from lightning_bigopt.type_checks import check_instance

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["GradientCompression"]

_OWNER = "GradientCompression"
_ROUNDING = 1e-9  # of the budget, far less than one update


@explain_arguments
class GradientCompression(Capability):
    """Compresses the gradients that the processes of DDP send to each other.

    A communication hook of DDP averages compressed gradients. It reads the gradient of a whole
    accumulation window. Clipping, StepGuard and all other callbacks read the average.
    :class:`TopK` and :class:`PowerSGD` keep what an update does not send, and add it to the next
    gradient (error feedback); a skipped update does not change what is kept. On one process TopK
    acts on the gradient of each update, and the other compressors do nothing. With TopK and
    PowerSGD, GradientNoiseScale measures only the updates before ``start``, because the norm of a
    compressed gradient is not that of the mean gradient.

    Compression saves time only if the network is the bottleneck: it costs computation, and TopK and
    PowerSGD do not send while the backward pass runs.

    Args:
        compressor: :class:`FP16`, :class:`BF16`, :class:`TopK` or :class:`PowerSGD`.

    Raises:
        ValueError: At fit start with a strategy other than DDP, with another communication hook, or
            for TopK and PowerSGD with manual optimization.

    Logs:
        With several processes ``communication/bytes`` and ``communication/dense_bytes``.

    State:
        ``states``: for each process the state of each parameter: the residual, and the factor of
        PowerSGD. A checkpoint therefore grows by the size of the float32 weights for each process.
        A run that resumes with another number of processes begins with the mean of the residuals on
        each of them. A checkpoint that is saved after an error has the states of the first process
        only. ``settings``: the compressor as code.

    Example:
        >>> from lightning_bigopt import GradientCompression, PowerSGD
        >>> GradientCompression(PowerSGD(rank=2, start="10%"))
        GradientCompression(PowerSGD(...))
    """

    owns = "gradient compression"
    rank = 15  # on one process, after the gradients are rescaled
    needs_samples = None
    logs_without_monitor = True

    def __init__(self, compressor: Compressor) -> None:
        check_instance("compressor", compressor, Compressor, hint="try PowerSGD(rank=1)")
        self.compressor = compressor
        self.needs_horizon = compressor.needs_horizon
        self._feedback = ErrorFeedback()
        self._hook: CommunicationHook | None = None
        self._reduction: CompressedReduction | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._start = 0.0
        self._gathered: list[States] | None = None  # while a checkpoint is saved
        self._saved_settings: dict[str, str] | None = None

    # ------------------------------------------------------------------------------- lifetime

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adds the engine, and finds a communication hook of the user."""
        super().setup(trainer, pl_module, stage)
        ddp_hooks.share_user_hook(trainer, stage)

    def check_fit(self, fit: Fit) -> None:
        """Raises for other strategies and hooks; uses the communication hook of DDP."""
        trainer = fit.trainer
        strategy = type(trainer.strategy).__name__
        if strategies.is_deepspeed(trainer) or strategies.shards_gradients(trainer):
            raise ValueError(
                f"strategy must be DDP with {_OWNER}, got {strategy}, which averages gradients "
                f"itself; use strategy='ddp', or remove {_OWNER}"
            )
        if not fit.module.automatic_optimization and self._has_feedback:
            raise ValueError(
                f"automatic_optimization must be True with {self.compressor!r}, got False: it is "
                "unknown which backward passes belong to an update; use FP16() or BF16()"
            )
        strategies.check_no_ddp_hook(trainer, _OWNER)
        self._parameters = {plain_name(n): p for n, p in fit.module.named_parameters()}
        self._hook = ddp_hooks.communication_hook(trainer, _OWNER)
        if self._hook is not None:
            group = strategies.ddp_group(trainer)
            names = {id(parameter): name for name, parameter in self._parameters.items()}
            self._reduction = CompressedReduction(
                self.compressor, names, self._feedback, group, self._scale
            )
            self._hook.reduce_by(self._reduction.reduce, owner=_OWNER)
        elif trainer.world_size > 1 and not strategies.averages_initial_parameters(trainer):
            raise ValueError(
                f"strategy must be DDP with {_OWNER}, got {strategy}, which has no communication "
                f"hook; use strategy='ddp', or remove {_OWNER}"
            )

    @property
    def _has_feedback(self) -> bool:
        return isinstance(self.compressor, FeedbackCompressor)

    def _scale(self) -> Tensor | float:
        """Returns the scale of the gradients in DDP's hook, before they are rescaled."""
        assert self.fit is not None  # set by the engine
        scale, factor = precision.loss_scale_tensor(self.fit.trainer), self.fit.rescaling()
        if not isinstance(factor, Tensor):
            return scale / factor
        return scale / torch.where(factor == 0, 1.0, factor)

    def start(self, fit: Fit) -> None:
        """Resolves the start of the compression on the horizon."""
        self._feedback.drop()
        self._start = 0.0
        horizon = fit.clock.horizon
        if self.compressor.needs_horizon and horizon is not None:
            self._start = horizon.fraction(self.compressor.start, name="start")

    def announce(self, fit: Fit) -> None:
        """Logs a change of the compressor since the checkpoint, and where it has no effect."""
        saved, self._saved_settings = self._saved_settings, None
        report_changed_settings(saved, self._settings())
        if fit.trainer.world_size == 1 and not isinstance(self.compressor, TopK):
            rank_zero_info(
                f"{_OWNER} has no effect: one process sends no gradients. Only TopK acts on the "
                "gradient of one process."
            )

    def end(self, fit: Fit) -> None:
        """Ends the compression."""
        self._feedback.drop()
        self._gathered = None
        if self._hook is not None:
            self._hook.release(_OWNER)
        self._hook = self._reduction = None
        self._parameters = {}
        ddp_hooks.restore_user_hook(fit.trainer)

    # ------------------------------------------------------------------------------- a step

    def begin_batch(self, batch: Batch) -> None:
        """Decides at the start of a window whether its update is compressed."""
        if not batch.opens_window:
            return
        self._feedback.drop()
        self._gathered = None
        if self._reduction is not None:
            self._reduction.collectives.clear()
            self._reduction.is_active = self._is_active(batch.fit)

    def _is_active(self, fit: Fit) -> bool:
        if not self._start:
            return True
        return fit.clock.update_progress.fraction >= self._start - _ROUNDING

    def rescale(self, update: Update) -> None:
        """Acts on the gradient of one process; with several ones DDP's hook has done so."""
        compressor = self.compressor
        assert self.fit is not None  # set by the engine
        is_alone = self._reduction is None
        if not self._is_active(self.fit) or (is_alone and not isinstance(compressor, TopK)):
            return
        update.is_approximate = self._has_feedback
        if not is_alone or not isinstance(compressor, TopK):
            return
        kinds: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            if gradient is None or gradient.is_sparse or not gradient.is_floating_point():
                continue
            kinds.setdefault((gradient.device, gradient.dtype), {})[name] = gradient
        for gradients in kinds.values():
            compressor.average_(gradients, self._feedback, Collectives(None))

    def after_step(self, update: Update) -> None:
        """Applies the new residuals: the update was made."""
        # DDP does not write a gradient that no process has computed.
        used = {name for name, p in self._parameters.items() if p.grad is not None}
        self._gathered = None  # by a checkpoint of the weights only
        skipped, fit = update.found_inf, self.fit
        assert fit is not None  # set by the engine
        factor = 1.0 if self._reduction is None else fit.rescaling()
        if isinstance(factor, Tensor):  # 0 for a window without weight: nothing was applied
            skipped = (factor == 0).float() + (0.0 if skipped is None else skipped)
        self._feedback.commit(used, skipped)

    def metrics(self, fit: Fit) -> Mapping[str, float]:
        """Returns the bytes that a process sent for the update, and would send uncompressed."""
        if self._reduction is None or not self._reduction.collectives.dense:
            return {}
        collectives = self._reduction.collectives
        return {
            "communication/bytes": collectives.sent,
            "communication/dense_bytes": collectives.dense,
        }

    # --------------------------------------------------------------------------------- state

    @property
    def residuals(self) -> dict[str, Tensor]:
        """The parts of the gradients that this process has not sent yet, by parameter name."""
        return {n: state[RESIDUAL] for n, state in self._feedback.states.items()}

    def specification(self) -> str:
        """Returns the compressor as code."""
        return repr(self.compressor)

    def _settings(self) -> dict[str, str]:
        return {self.owns: as_code(self.compressor)}

    def reset(self) -> None:
        """Clears the states of all parameters."""
        self._feedback.clear()
        self._saved_settings = None

    def saved_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Gathers the states of all processes, because Lightning saves those of the first one.

        All processes collect the weights for a checkpoint; ``state_dict()`` of a callback may be
        called on one of them.
        """
        assert self.fit is not None  # set by the engine
        if self._reduction is not None and self._has_feedback and self.fit.has_started:
            self._gathered = gathered_states(
                self._feedback.copy_of_states(), self._reduction.collectives.group
            )
        return state_dict

    def saved_state(self) -> dict[str, Any]:
        """Returns the states of the parameters on each process, and the compressor as code."""
        gathered, self._gathered = self._gathered, None
        states = [self._feedback.copy_of_states()] if gathered is None else gathered
        return {"states": states, "settings": self._settings()}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the states of this process."""
        self._saved_settings = state["settings"]
        self._feedback.clear()
        if self.fit is not None and self._has_feedback:
            trainer = self.fit.trainer
            self._feedback.replace(
                states_of_process(state["states"], trainer.global_rank, trainer.world_size)
            )

    def snapshot(self) -> dict[str, Any]:
        """Returns the states of this process."""
        return {"own": self._feedback.copy_of_states()}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Restores the states of this process."""
        self._feedback.replace(snapshot["own"])

    def __repr__(self) -> str:
        return f"GradientCompression({type(self.compressor).__name__}(...))"

    def __getstate__(self) -> dict[str, Any]:
        kept = {**super().__getstate__(), "_hook": None, "_reduction": None, "_gathered": None}
        return {**kept, "_parameters": {}}
