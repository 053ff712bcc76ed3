"""Refuses bad updates before they are made: one decision, the same on every process."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_bigopt import trainer_access
from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.controllers.forensics import RejectedUpdate, WindowRecorder
from lightning_bigopt.controllers.learning_rate import LearningRateController
from lightning_bigopt.controllers.running_statistics import RunningStatistics
from lightning_bigopt.durations import Progress
from lightning_bigopt.gradients import (
    Abort,
    Action,
    Backoff,
    ClipToMedian,
    Detector,
    NonFinite,
    NormSpike,
    Skip,
    Verdict,
    clear_,
    inspect,
    record,
    skip_update_,
)
from lightning_bigopt.gradients.guard import Quantity
from lightning_bigopt.gradients.kernels import wide_dtype
from lightning_bigopt.reporting.tags import tag_name

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_bigopt.pipeline import OptimizerStep, Pipeline

__all__ = ["StepGuardController"]

_REMEMBERED = 100


class StepGuardController(Controller):
    """Inspects every coming update, and skips or shrinks one that a detector rejects.

    Attributes:
        rejections: The last rejected updates of this process, oldest first.
    """

    role = "step guard"
    rank = 40

    def __init__(
        self,
        detectors: Sequence[Detector] | None = None,
        *,
        actions: Sequence[Action] | None = None,
        max_consecutive: int = 10,
        forensics: str | PathLike[str] | None = None,
    ) -> None:
        self.detectors = tuple((NonFinite(), NormSpike()) if detectors is None else detectors)
        self.actions = tuple((Skip(),) if actions is None else actions)
        if not self.detectors or not all(isinstance(d, Detector) for d in self.detectors):
            raise ValueError(
                f"detectors must be a list of detectors, got {detectors!r}; try "
                "[NonFinite(), NormSpike()]"
            )
        if not all(isinstance(action, Action) for action in self.actions):
            raise ValueError(f"actions must be a list of actions, got {actions!r}; try [Skip()]")
        if type(max_consecutive) is not int or max_consecutive < 1:
            raise ValueError(
                f"max_consecutive must be a positive number of updates, got {max_consecutive!r}"
            )
        self._limit = min([max_consecutive, *(a.after for a in self._all(Abort))])
        self._keys = _numbered([type(detector).__name__ for detector in self.detectors])
        self._window = WindowRecorder(None if forensics is None else fspath(forensics))
        self._statistics = RunningStatistics()
        self.reset()

    def _all(self, kind: type[Any]) -> list[Any]:
        return [action for action in self.actions if isinstance(action, kind)]

    # ---------------------------------------------------------------------------- lifetime

    def on_fit_start(self, pipeline: Pipeline) -> None:
        """Refuses what cannot be skipped, and a backoff without a learning rate to lower."""
        if trainer_access.is_deepspeed(pipeline.trainer):
            raise ValueError(
                "strategy must not be DeepSpeed with StepGuard, got "
                f"{type(pipeline.trainer.strategy).__name__}: its engine makes the update by itself"
            )
        for optimizer in pipeline.trainer.optimizers:
            if trainer_access.is_private(optimizer):
                raise ValueError(
                    f"optimizer must not be Opacus' with StepGuard, got {type(optimizer).__name__}:"
                    " to leave out updates by what is in the data breaks the privacy accounting; "
                    "remove StepGuard"
                )
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(
                    "optimizer must look at one gradient an update with StepGuard, got LBFGS, "
                    "which looks at several; remove StepGuard"
                )
        if self._all(Backoff) and pipeline.find(LearningRateController) is None:
            raise ValueError(
                "callbacks must hold a LearningRateScheduler with Backoff, got none; add "
                "LearningRateScheduler(Constant())"
            )

    def on_train_start(self, pipeline: Pipeline) -> None:
        """No window is open: a checkpoint holds no gradients."""
        self._window.clear()
        self._statistics.watch(pipeline.module)

    def on_batch_start(self, pipeline: Pipeline, batch: Any, index: int) -> None:
        """Notes the batch and what it may spoil, and keeps it where it may have to be written."""
        if self._window.is_over:
            self._statistics.remember()
        self._window.begin(pipeline, batch, index)

    def on_loss(self, pipeline: Pipeline, loss: Tensor) -> None:
        """Keeps the loss on the device."""
        self._window.add(pipeline, loss)

    def on_batch_end(self, pipeline: Pipeline, outputs: Any, batch: Any) -> None:
        """A window that is over without an update leaves nothing to the next."""
        if pipeline.module.automatic_optimization and not pipeline.window.is_open:
            self._window.clear()

    def on_epoch_end(self, pipeline: Pipeline) -> None:
        """No window crosses an epoch."""
        self._window.clear()

    def on_fit_end(self, pipeline: Pipeline) -> None:
        """Says what was rejected, and lets go of the batches."""
        self._window.clear()
        self._statistics.forget()
        for optimizer in pipeline.trainer.optimizers:
            clear_(optimizer)
        if self.rejected:
            plural = "s" if self.rejected > 1 else ""
            rank_zero_info(f"StepGuard rejected {self.rejected} update{plural} of this run.")

    # ------------------------------------------------------------------------------ decision

    def wants_norms(self, step: OptimizerStep) -> bool:
        """Every update is looked at."""
        return True

    def decide(self, step: OptimizerStep) -> None:
        """Reads the norm, and the loss where a detector wants it, once; then decides."""
        readings = self._read(step)
        if readings is None:
            self._statistics.mend_()
        else:
            self._judge(step, readings)
        self._window.close()

    def _read(self, step: OptimizerStep) -> dict[Quantity, float] | None:
        """Norm and loss, the same numbers on every process; None for a GradScaler's overflow."""
        trainer, total = step.pipeline.trainer, step.norms.total
        like = total.new_zeros((), dtype=wide_dtype(total.device))
        overflow = like
        if step.overflow_is_handled:
            found = trainer_access.scaler_found_inf(trainer, step.optimizer)
            overflow = like if found is None else found.to(like)
        numbers = [total.to(like), overflow]
        looks_at_loss = any(detector.quantity == "loss" for detector in self.detectors)
        if looks_at_loss:
            numbers += self._window.weighted_loss(like)
        # A mean over processes, exact where they agree: a decision must not hang on the last bit
        # of a norm that each computed for itself.
        summed = trainer.strategy.reduce(torch.stack(numbers), reduce_op="sum")
        norm, overflows, *loss = (number / trainer.world_size for number in summed.tolist())
        if overflows > 0:
            return None
        step.norms.take_value(norm)
        readings: dict[Quantity, float] = {"norm": norm}
        if loss and loss[1] != 0:
            readings["loss"] = loss[0] / loss[1]
        return readings

    def _judge(self, step: OptimizerStep, readings: dict[Quantity, float]) -> None:
        label = trainer_access.optimizer_label(step.pipeline.trainer, step.optimizer)
        guarded = self._guarded.get(label)
        if guarded is None:
            guarded = self._guarded[label] = self._fresh()
        states = [guarded["detectors"][key] for key in self._keys]
        verdict = inspect(self.detectors, states, readings)
        shrunk = None if verdict is None else self._typical(states, readings["norm"], verdict)
        record(self.detectors, states, readings, verdict)
        if verdict is None:
            guarded["consecutive"] = 0
            for backoff, state in zip(self._all(Backoff), self._backoffs, strict=True):
                backoff.accept(state)
            return
        self._reject(step, guarded, verdict, readings["norm"])
        if shrunk is not None:
            step.shrink_(shrunk)
            return
        step.skipped = verdict.reason
        guarded["skipped"] += 1
        skip_update_(step.optimizer)
        self._statistics.restore_()

    def _reject(
        self, step: OptimizerStep, guarded: dict[str, Any], verdict: Verdict, norm: float
    ) -> None:
        if guarded["consecutive"] == 0:
            guarded["checkpoint"] = trainer_access.newest_checkpoint(step.pipeline.trainer)
        guarded["consecutive"] += 1
        guarded["rejected"] += 1
        by = guarded["detected"]
        by[verdict.detector] = by.get(verdict.detector, 0) + 1
        rejected = self._window.report(step, verdict, norm)
        self.rejections.append(rejected)
        rank_zero_info(str(rejected))
        for controller in step.pipeline.controllers.doing("on_rejection"):
            controller.on_rejection(step.pipeline, str(rejected))
        if guarded["consecutive"] >= self._limit:
            healthy = _still_there(guarded["checkpoint"], step.pipeline.trainer)
            raise RuntimeError(
                f"updates must not be rejected {self._limit} times in a row, got: {rejected} "
                + (
                    "No checkpoint was written before; lower the learning rate, or save more often"
                    if healthy is None
                    else f"The last healthy checkpoint is {healthy}; resume from it with a lower "
                    "learning rate or other data"
                )
            )
        for backoff, state in zip(self._all(Backoff), self._backoffs, strict=True):
            backoff.reject(state)

    def _typical(
        self, states: Sequence[dict[str, Any]], norm: float, verdict: Verdict
    ) -> float | None:
        """By how much ClipToMedian shrinks the gradient; None where the update is skipped."""
        if verdict.quantity != "norm" or not self._all(ClipToMedian):
            return None
        for detector, state in zip(self.detectors, states, strict=True):
            if isinstance(detector, NormSpike) and detector.check(norm, state) is not None:
                typical = detector.typical(state)
                return None if typical is None else typical / norm
        return None

    def learning_rate_factor(self, progress: Progress) -> float:
        """What the backoffs of recent rejections leave of the learning rate."""
        factor = 1.0
        for state in self._backoffs:
            factor *= state["level"]
        return factor

    def metrics(self, pipeline: Pipeline) -> Mapping[str, float | Tensor]:
        """What was left out, and what each detector has objected to."""
        names = dict.fromkeys(type(detector).__name__ for detector in self.detectors)
        skipped = sum(guarded["skipped"] for guarded in self._guarded.values())
        return {"guard/skipped": float(skipped)} | {
            tag_name("guard/rejected", name): float(
                sum(guarded["detected"].get(name, 0) for guarded in self._guarded.values())
            )
            for name in names
        }

    # --------------------------------------------------------------------------------- state

    @property
    def rejected(self) -> int:
        """How many updates have been rejected since the beginning of the run."""
        return sum(guarded["rejected"] for guarded in self._guarded.values())

    def _fresh(self) -> dict[str, Any]:
        states = (detector.initial_state() for detector in self.detectors)
        return {
            "detectors": dict(zip(self._keys, states, strict=True)),
            "consecutive": 0,
            "rejected": 0,
            "skipped": 0,
            "detected": {},
            "checkpoint": None,
        }

    def reset(self) -> None:
        """Forgets everything seen."""
        self._guarded: dict[str, dict[str, Any]] = {}
        self._backoffs = [backoff.initial_state() for backoff in self._all(Backoff)]
        self.rejections: deque[RejectedUpdate] = deque(maxlen=_REMEMBERED)

    def state_dict(self) -> dict[str, Any]:
        """What the detectors have seen, an optimizer each, and the level of each backoff."""
        return {"guarded": copy.deepcopy(self._guarded), "backoffs": copy.deepcopy(self._backoffs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a checkpoint's; a detector or backoff that it does not know begins anew."""
        self.reset()
        for label, saved in state["guarded"].items():
            fresh = self._fresh()
            known = {k: v for k, v in saved["detectors"].items() if k in fresh["detectors"]}
            detectors = {**fresh["detectors"], **copy.deepcopy(known)}
            self._guarded[label] = {**fresh, **saved, "detectors": detectors}
        if len(state["backoffs"]) == len(self._backoffs):
            self._backoffs = copy.deepcopy(state["backoffs"])


def _still_there(checkpoint: str | None, trainer: Trainer) -> str | None:
    """The checkpoint, or one that has taken its place: a skip leaves weights as they were."""
    if checkpoint is None or trainer_access.checkpoint_exists(checkpoint):
        return checkpoint
    return trainer_access.newest_checkpoint(trainer)


def _numbered(names: Sequence[str]) -> list[str]:
    """The names, told apart where one comes again."""
    return [
        f"{name}-{names[:index].count(name)}" if name in names[:index] else name
        for index, name in enumerate(names)
    ]
