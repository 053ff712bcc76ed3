"""ModelAveraging: averages the weights, and evaluates, saves and returns an average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.averaging.average import Average
from lightning_bigopt.averaging.weights import Weights
from lightning_bigopt.callbacks.averaging import conflicts
from lightning_bigopt.callbacks.averaging.average_names import (
    TRAINING,
    AnyAverages,
    checked_device,
    checked_dtype,
    named_averages,
    used,
)
from lightning_bigopt.callbacks.averaging.averaged_tensors import AveragedTensors
from lightning_bigopt.callbacks.averaging.other_validations import validate_others
from lightning_bigopt.callbacks.averaging.running_averages import RunningAverages
from lightning_bigopt.callbacks.averaging.saved_averages import SavedAverages
from lightning_bigopt.callbacks.resume_report import report_changed_settings
from lightning_bigopt.checks import as_code, check_choice, check_count
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Batch, Fit
from lightning_bigopt.type_checks import check_instance

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["ModelAveraging"]


@explain_arguments
class ModelAveraging(Capability):
    """Averages the weights of the run; training itself does not change.

    The average that ``use`` names is the model everywhere but in training: in validations, as the
    weights of every checkpoint (weights-only files too), and in the module after the fit. Until it
    begins, as before ``EMA(start=…)``, the model is the current weights. The training weights are
    in the checkpoint, too: a resumed run equals an uninterrupted one to the bit. The other averages
    are validated after each validation, in passes over the same loaders.

    Trainable parameters are averaged, and finite floating-point buffers such as the statistics of
    BatchNorm. All else is that of training. With FSDP2 every process averages its shards.

    Args:
        averages: An average, such as ``EMA(half_life="1%")``, or several by name.
        use: Name of the average that is the model; ``"training"`` for the training weights, so that
            averages are only logged. None for the only average.
        device: Device of the averages; None for that of the weights. Averages on the CPU take no
            memory of an accelerator; weights are copied to it while training continues.
        dtype: Data type of the averages, such as ``"float32"``; None for float32 if that of a
            weight is narrower, and otherwise the same.
        every: Average the weights after every n-th update.
        buffers: ``"average"``, or ``"current"`` for those of training.
        evaluate_others: Whether the averages that ``use`` does not name are validated.

    Logs:
        At validations ``averages/<name>/<metric>`` for every metric that the module logs and every
        average that ``use`` does not name. ``ModelCheckpoint(monitor=…)`` accepts these names.

    Raises:
        ValueError: If an argument is out of range; at fit start with FSDP1 or DeepSpeed, beside
            WeightAveraging or StochasticWeightAveraging of Lightning, or with an optimizer that has
            ``train()`` and ``eval()``; at train start for a duration in a unit that the run does
            not count, a TailMean longer than the budget, or one with ``on_resume="cooldown"``.

    State:
        ``averages``: for each name its copies of the weights and plain numbers; ``training``: the
        training weights, while the checkpoint's model is an average; ``settings``: the averages as
        code. A sharded checkpoint has the tensors among its weights, under reserved names.

    Example:
        >>> from lightning_bigopt import EMA, ModelAveraging
        >>> ModelAveraging(EMA(half_life="1%"))
        ModelAveraging({'ema': EMA(...)}, use='ema')
    """

    owns = "model averaging"
    rank = 70

    def __init__(
        self,
        averages: AnyAverages,
        *,
        use: str | None = None,
        device: str | None = "cpu",
        dtype: str | None = None,
        every: int = 1,
        buffers: Literal["average", "current"] = "average",
        evaluate_others: bool = True,
    ) -> None:
        self.averages: dict[str, Average] = named_averages(averages)
        self.use = used(use, self.averages)
        check_count("every", every, of="updates")
        check_choice("buffers", buffers, ("average", "current"))
        check_instance("evaluate_others", evaluate_others, bool, hint="write True")
        self.device, self.dtype, self.every, self.buffers = device, dtype, every, buffers
        self._device, self._dtype = checked_device(device), checked_dtype(dtype)
        self.evaluate_others = evaluate_others
        self.needs_horizon = any(a.needs_horizon for a in self.averages.values())
        units = {d.unit for average in self.averages.values() for d in average.durations}
        self.needs_samples = "required" if "samples" in units else None
        self.reset()

    def reset(self) -> None:
        """Clears the averages."""
        self._running = RunningAverages(self.averages, device=self._device, dtype=self._dtype)
        self._training: Weights | None = None  # while the module has an average
        self._tensors: AveragedTensors | None = None
        self._saved = SavedAverages()
        self._progress: Progress | None = None  # after the last update
        self._steps = 0
        self._budget: list[Any] | None = None
        self._saved_settings: dict[str, str] | None = None

    # ------------------------------------------------------------------------------ lifetime

    def check_fit(self, fit: Fit) -> None:
        """Raises for strategies without whole parameters, and other callbacks that average."""
        conflicts.check_conflicts(fit)

    def check_optimizers(self, fit: Fit) -> None:
        """Raises for an optimizer that averages the weights itself."""
        conflicts.check_optimizers(fit)

    def start(self, fit: Fit) -> None:
        """Restores the averages, and writes the training weights into the module."""
        conflicts.check_durations(fit, self.averages)
        tensors = self._tensors = AveragedTensors(
            fit.module, buffers=self.buffers == "average", also=self._saved.names
        )
        continues = self._training is not None and not self._saved.is_loaded
        differ = continues and tensors.differ(self._model() or {})
        if fit.trainer.strategy.reduce_boolean_decision(differ, all=False):
            rank_zero_warn(
                "The weights have changed since ModelAveraging wrote the average into the module. "
                "Training continues from the changed weights, and the averages start again."
            )
            self.reset()
            self._tensors = tensors
        found = self._saved.restore(fit.trainer, tensors, self._running)
        self._training = self._training if found is None else found
        if self._training is not None:
            tensors.write(self._training)
            self._training = None
        self._running.match(tensors.local())
        self._steps, self._progress = fit.trainer.global_step, fit.clock.progress()
        horizon = fit.clock.horizon
        budget = None if horizon is None else [horizon.clock, horizon.budget]
        self._running.count_from(self._progress, another_budget=self._budget not in (None, budget))
        self._budget = budget

    def announce(self, fit: Fit) -> None:
        """Logs changes of the averages since the checkpoint."""
        saved, self._saved_settings = self._saved_settings, None
        report_changed_settings(saved, self._settings())

    def end(self, fit: Fit) -> None:
        """Writes the average into the module; the training weights are kept for another fit."""
        if fit.has_started and self.fit is not None:  # None: the fit goes on without the callback
            self._exchange()
        self._saved.clear()

    # ------------------------------------------------------------------------------- updates

    def begin_batch(self, batch: Batch) -> None:
        """Adds parameters that have become trainable: they were constant until now."""
        self._saved.clear()
        assert self._tensors is not None  # set in start
        if batch.opens_window and self._tensors.follow():
            self._running.match(self._tensors.local())

    def end_batch(self, batch: Batch) -> None:
        """Adds the weights after an update to the averages."""
        self._saved.clear()
        if not batch.closes_window:
            return
        clock, steps = batch.fit.clock, batch.fit.trainer.global_step
        before, self._steps, self._progress = self._steps, steps, clock.progress()
        if steps // self.every == before // self.every:
            return
        assert self._tensors is not None  # set in start
        self._running.add(self._tensors.local(), self._progress, clock.horizon)

    # ----------------------------------------------------------------- evaluation and weights

    def _value(self, name: str) -> Mapping[str, Tensor] | None:
        """Returns an average; None if it equals the training weights."""
        assert self._tensors is not None  # set in start
        if name == TRAINING or self._progress is None:
            return None
        weights = self._tensors.local() if self._training is None else self._training
        return self._running.value(name, weights, self._progress)

    def _model(self) -> Mapping[str, Tensor] | None:
        return self._value(self.use)

    def _exchange(self) -> None:
        """Writes the average into the module, and keeps the training weights."""
        value = self._model()
        if value is not None and self._training is None:
            assert self._tensors is not None  # set in start
            self._training = {
                name: weight.to(self._running.place(weight), copy=True)
                for name, weight in self._tensors.local().items()
            }
            self._tensors.write(value)

    def begin_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        """Writes the average into the module."""
        if self.fit is not None and self.fit.has_started:
            self._exchange()

    def end_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        """Validates the other averages, and writes the training weights back."""
        if self.fit is None or not self.fit.has_started:
            return
        assert self._tensors is not None  # set in start
        try:
            others = {n: self._value(n) for n in self.averages if n != self.use}
            if others and self.evaluate_others and not trainer.interrupted:
                if self._training is None:  # the training weights are the model
                    self._training = self._tensors.copies()
                validate_others(trainer, self._tensors, others, current=self._training)
        finally:
            if self._training is not None:
                self._tensors.write(self._training)
                self._training = None

    def saved_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Returns the average; keeps or adds the training weights and all averages."""
        if self.fit is None or not self.fit.has_started:
            return state_dict
        value = self._model()
        assert self._tensors is not None  # set in start
        return self._saved.collect(
            state_dict, self._tensors, value, training=self._training, states=self._running.states
        )

    # --------------------------------------------------------------------------------- state

    def average(self, name: str | None = None) -> dict[str, Tensor]:
        """Returns a copy of an average, with the names of the module's ``state_dict``.

        Args:
            name: Name of the average; None for the one that ``use`` names.

        Returns:
            Tensors of this process on the device of the averages; the training weights before the
            average begins, and for ``"training"``.

        Raises:
            ValueError: If the name is unknown, or there was no fit.
        """
        name = used(name or self.use, self.averages)
        if self._tensors is None:
            raise ValueError(
                "an average must be read from the callback of a fit, got one without a fit, or a "
                "copy; call fit, or use the callback in trainer.callbacks"
            )
        value = self._value(name)
        if value is None:
            value = self._tensors.local() if self._training is None else self._training
        device = self._running.place
        return {key: tensor.to(device(tensor), copy=True) for key, tensor in value.items()}

    def specification(self) -> str:
        """Returns the averages as code."""
        return ", ".join(f"{name}={average!r}" for name, average in self.averages.items())

    def _settings(self) -> dict[str, str]:
        others = {name: as_code(getattr(self, name)) for name in ("use", "every", "buffers")}
        return others | {f"averages.{n}": as_code(average) for n, average in self.averages.items()}

    def saved_state(self) -> dict[str, Any]:
        """Returns the averages and the training weights, unless a sharded checkpoint has them."""
        self._running.settle()
        return {
            **self._saved.state(self._tensors, self._running, self._training),
            "budget": self._budget,
            "settings": self._settings(),
        }

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the state of a checkpoint."""
        self.reset()
        self._budget, self._saved_settings = state["budget"], state["settings"]
        self._saved.load(state)
        if self.fit is not None and self.fit.has_started:
            self.start(self.fit)  # a finder of Lightning restores its own checkpoint

    def snapshot(self) -> dict[str, Any]:
        """Returns the averages; the training weights are the model's."""
        now = None if self._progress is None else asdict(self._progress)
        return {"averages": self._running.snapshot(), "steps": self._steps, "progress": now}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Restores the averages at the time of :meth:`snapshot`."""
        self._running.restore(snapshot["averages"])
        if self._tensors is not None:  # parameters may have become trainable since
            self._running.match(self._tensors.local())
        self._steps, progress = snapshot["steps"], snapshot["progress"]
        self._progress = None if progress is None else Progress(**progress)

    def __repr__(self) -> str:
        names = {name: type(average).__name__ for name, average in self.averages.items()}
        shown = ", ".join(f"{name!r}: {kind}(...)" for name, kind in names.items())
        return f"ModelAveraging({{{shown}}}, use={self.use!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tensors": None}  # which has the module
