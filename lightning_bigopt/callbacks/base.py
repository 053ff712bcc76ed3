"""The one way from Lightning's hooks into the pipeline, shared by every callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from lightning_bigopt import trainer_access
from lightning_bigopt.pipeline import Pipeline

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_bigopt.controllers.base import Controller

__all__ = ["OptimizationCallback"]

# Lightning calls each of these for each callback on every batch, at about 4 µs whether anything is
# done there or not, and passes over what is not callable.
_BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class OptimizationCallback(Callback):
    """Hands every hook to the Trainer's pipeline, which runs each once whatever the list's order.

    The first of ours in the Trainer's list hands over the hooks of a batch, and only those in which
    somebody does something; the others are silent there while they fit. Where batches need not be
    looked at, so is the first after an epoch's first batch has begun. A subclass with a hook of its
    own is called there in any case, and another of ours besides.

    Args:
        controller: What the callback does.
    """

    version = 1

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self._pipeline: Pipeline | None = None
        self._last_run: int | None = None

    # -------------------------------------------------------------------------------- lifetime

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Registers with the pipeline of a Trainer that is about to fit."""
        if stage != "fit":
            return
        self._speak_again()  # somebody else's error may have hidden the end of a former fit
        self._pipeline = Pipeline.of(trainer)
        if self._last_run not in (None, self._pipeline.number):
            self.controller.reset()  # a callback object used again with another Trainer
        self._last_run = self._pipeline.number
        self._pipeline.register(self.controller)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Conflicts raise here."""
        pipeline = self._bound()
        if pipeline.rounds.is_first("fit_start", self):
            pipeline.fit_start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All state is restored; the horizon is fixed."""
        pipeline = self._bound()
        if pipeline.rounds.is_first("train_start", self):
            pipeline.train_start()
        self._fall_silent(trainer, pipeline)

    def _fall_silent(self, trainer: Trainer, pipeline: Pipeline) -> None:
        """Has Lightning pass over hooks that are empty, or that another callback hands over."""
        self._speak_again()
        callbacks = trainer_access.callbacks_of(trainer)
        ours = [c for c in callbacks if isinstance(c, OptimizationCallback)]
        needed = pipeline.batch_hooks()
        for hook in _BATCH_HOOKS:
            plain = [callback for callback in ours if _is_ours(callback, hook)]
            speaks = hook in needed and plain[:1] == [self]
            if self in plain and not speaks:
                self.__dict__[hook] = None

    def _speak_again(self) -> None:
        for hook in _BATCH_HOOKS:
            self.__dict__.pop(hook, None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Undoes every patch: ``teardown`` is not called on errors."""
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undoes every patch."""
        self._end()

    def _end(self) -> None:
        self._speak_again()
        if self._pipeline is not None:
            self._pipeline.end()

    def _bound(self) -> Pipeline:
        if self._pipeline is None:
            raise RuntimeError(
                f"setup must run before the other hooks of {type(self).__name__}, got a hook "
                "without it; call super().setup(...) in the subclass"
            )
        return self._pipeline

    # ----------------------------------------------------------------------------------- loop

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch begins, perhaps with fewer callbacks."""
        pipeline = self._bound()
        self._fall_silent(trainer, pipeline)
        if pipeline.rounds.is_first("epoch_start", self):
            pipeline.epoch_start()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A window may open."""
        pipeline = self._bound()
        if pipeline.rounds.is_first("batch_start", self):
            pipeline.batch_start(batch, batch_idx)
        if not pipeline.hears_of_batches and _is_ours(self, "on_train_batch_start"):
            self.__dict__["on_train_batch_start"] = None  # until the next epoch begins

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """A micro-batch's loss is known."""
        pipeline = self._bound()
        if pipeline.rounds.is_first("before_backward", self):
            pipeline.before_backward(loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Rescale, measure, decide, clip, observe."""
        pipeline = self._bound()
        if pipeline.rounds.is_first("before_step", self):
            pipeline.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch counts as consumed."""
        pipeline = self._bound()
        if pipeline.rounds.is_first("batch_end", self):
            pipeline.batch_end(outputs, batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch has ended."""
        pipeline = self._bound()
        if pipeline.rounds.is_first("epoch_end", self):
            pipeline.epoch_end()

    # ---------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The clock and what the controller keeps, as plain numbers, strings and tensors."""
        clock = None if self._pipeline is None else self._pipeline.clock.state_dict()
        return {"version": self.version, "clock": clock, **self.controller.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a checkpoint's state; it acts from ``on_train_start`` on."""
        state = dict(state_dict)
        version = state.pop("version", None)
        if version != self.version:
            raise ValueError(
                f"the checkpoint's {type(self).__name__} state must have version {self.version}, "
                f"got {version!r}; resume with the release that wrote it"
            )
        clock = state.pop("clock")
        if self._pipeline is not None:
            if not self._pipeline.fitting:  # Trainer.test(ckpt_path=) restores callbacks too
                return
            if clock is not None:
                self._pipeline.clock.load_state_dict(clock)
        self.controller.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles must not take the Trainer along: neither our pipeline nor the bound
        # methods of the module that Lightning puts on every callback.
        left_out = ("_pipeline", "_last_run", "log", "log_dict", *_BATCH_HOOKS)
        return {
            **{k: v for k, v in self.__dict__.items() if k not in left_out},
            "_pipeline": None,
            "_last_run": None,
        }


def _is_ours(callback: OptimizationCallback, hook: str) -> bool:
    """Whether a hook is not a subclass's own."""
    inherited: object = getattr(OptimizationCallback, hook)
    return getattr(type(callback), hook) is inherited
