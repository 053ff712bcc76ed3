"""OptimizationMonitor: logs learning rates, norms, clipping, batch sizes and step times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.callbacks.run_output import RunOutput
from lightning_bigopt.checks import as_code, check_choice, check_count
from lightning_bigopt.engine.batch_contents import BatchCount
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.clock_settings import ClockSettings
from lightning_bigopt.engine.stage import Batch, Fit
from lightning_bigopt.engine.update import Rejection, Update
from lightning_bigopt.gradients.gradient_norms import unread_total
from lightning_bigopt.monitoring import logging
from lightning_bigopt.monitoring.activations import ActivationMonitor, check_activations
from lightning_bigopt.monitoring.layer_monitors import LayerMonitors
from lightning_bigopt.monitoring.layers import LayerValue, check_layers, layer_values
from lightning_bigopt.monitoring.logged_axis import LoggedAxis, XAxis
from lightning_bigopt.monitoring.metric_buffer import MetricBuffer
from lightning_bigopt.monitoring.stability import Stability
from lightning_bigopt.monitoring.step_timer import StepTimer
from lightning_bigopt.monitoring.tags import tag_name
from lightning_bigopt.monitoring.update_values import (
    add_clipping,
    add_hyperparameters,
    batch_values,
    for_progress_bar,
    is_due,
    without_unknown,
)
from lightning_bigopt.parameters import tied_names
from lightning_bigopt.trainer_access import loggers, precision
from lightning_bigopt.type_checks import path_or_none

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["OptimizationMonitor"]


@explain_arguments
class OptimizationMonitor(Capability):
    """Logs the values that the updates used, to all loggers and the progress bar.

    The values of a logged update stay on the device until its end, and are transferred in one copy.
    TensorBoard gets one event for each logged update, and a dashboard (tab *Custom scalars*).

    Args:
        every: Log every n-th update; None follows ``Trainer(log_every_n_steps=)``.
        layers: Layers to measure: ``"blocks"`` (by the name of a parameter up to its first number),
            ``"parameters"``, patterns by name of layer such as
            ``{"attention": "*.attn.*", "mlp": "*.mlp.*"}``, or None.
        per_layer: Values to log for each layer: ``"grad_norm"``, ``"weight_norm"``,
            ``"update_ratio"`` (copies the weights during a logged update) and ``"zeros"``; None for
            all.
        activations: Modules whose outputs, and the gradients of these, are measured in logged
            updates: ``"blocks"``, patterns by label such as ``{"attention": "*.attn"}``, or None.
        histograms_every: Write histograms of all gradients to TensorBoard every n-th update, which
            copies them to the host; None for no histograms.
        x_axis: Unit of the steps in all loggers: ``"updates"``, the batches that have made an
            update as Lightning counts them, from 0; ``"samples"`` or ``"tokens"``, those consumed
            by the run up to the end of the update, over all processes.
        samples: Counts the samples of a batch (a function, or the name of a field); None for the
            batch size of the loader.
        tokens: Counts the tokens of a batch: a function, or the name of an ids or mask field.
        report: File for the report of the run, written when the fit ends, also after an error;
            None for no report. It needs a TensorBoardLogger, a CSVLogger or ``event_folder``.
        event_folder: Folder for TensorBoard events of the run, beside the Trainer's loggers, for
            ``report`` and ``bigopt report``; None for no events. A new run replaces the events of
            an earlier one in the same folder.

    Logs:
        All tags of the table ``lightning_bigopt.monitoring.TAGS``; ``lr``, ``grad_norm``,
        ``global_batch`` and ``skipped`` on the progress bar. With several optimizers the tags
        contain the names of their classes. Values that need an unknown number of samples are not
        logged.

    State:
        ``stability``: for loss and norm of each optimizer, the last 128 values and the counts of
        spikes and comparisons; ``axis``: the amount that rollbacks have added to the x axis.

    Raises:
        ValueError: If an argument is out of range; at fit start if ``report`` or ``event_folder``
            cannot be written, or there are no logs to read from; at train start if a pattern
            matches no parameter; if the unit of ``x_axis`` cannot be counted.
        ImportError: At fit start for ``report`` without matplotlib or jinja2.

    Example:
        >>> from lightning_bigopt import OptimizationMonitor
        >>> OptimizationMonitor(every=10, layers="blocks").every
        10
    """

    owns = "monitor"
    rank = 90
    logs_all_metrics = True
    needs_step_hook = False
    may_reject = False
    changes_before_step = False

    def __init__(
        self,
        *,
        every: int | None = None,
        layers: Literal["blocks", "parameters"] | dict[str, str] | None = "blocks",
        per_layer: Sequence[LayerValue] | None = None,
        activations: Literal["blocks"] | dict[str, str] | None = None,
        histograms_every: int | None = None,
        x_axis: XAxis = "updates",
        samples: BatchCount = None,
        tokens: BatchCount = None,
        report: str | None = None,
        event_folder: str | None = None,
    ) -> None:
        if every is not None:
            check_count("every", every, of="updates", hint="None follows log_every_n_steps")
        if histograms_every is not None:
            check_count("histograms_every", histograms_every, of="updates", hint="try None")
        check_activations(activations)
        check_choice("x_axis", x_axis, XAxis, hint="'updates' is what Lightning counts")
        self.per_layer = layer_values(layers, per_layer)
        self.every, self.histograms_every, self.x_axis = every, histograms_every, x_axis
        self.layers, self.activations = layers, activations
        self.report = path_or_none("report", report, hint="write 'report.html'")
        self.event_folder = path_or_none("event_folder", event_folder, hint="write 'runs/events'")
        self._output = RunOutput(report=self.report, event_folder=self.event_folder, x_axis=x_axis)
        self.settings = ClockSettings(samples=samples, tokens=tokens)
        self.needs_samples = "required" if x_axis == "samples" else "optional"
        self.reset()

    def reset(self) -> None:
        """Clears the histories of losses and norms, the buffers and the timer."""
        self._stability, self._axis = Stability(), LoggedAxis(self.x_axis)
        self._clear()

    def _clear(self) -> None:
        self._values = MetricBuffer()
        self._layers = LayerMonitors(self.layers, self.per_layer)
        self._activations = ActivationMonitor(self.activations)
        self._timer = StepTimer()
        self._bar_is_empty = True
        self._due = self._stepped = False
        self._micro_size: int | None = None

    def __repr__(self) -> str:
        return f"OptimizationMonitor(every={self.every!r})"

    # ------------------------------------------------------------------------- start and end

    def start(self, fit: Fit) -> None:
        """Checks the report, the patterns of layers and the x axis, and starts the timer."""
        self._output.check(fit)
        check_layers(fit.parameter_names(), self.layers, tied_names(fit.module))
        self._clear()
        scale = partial(precision.loss_scale_tensor, fit.trainer)
        self._activations = ActivationMonitor(self.activations, scale)
        self._activations.start(fit.module)
        device, counts = fit.trainer.strategy.root_device, fit.clock.counts()
        self._timer.start(device, samples=counts.trained_samples, tokens=counts.tokens)
        self._stability.start(device=device, processes=fit.trainer.world_size)

    def announce(self, fit: Fit) -> None:
        """Writes the plan of the run to TensorBoard."""
        self._output.announce(fit, self._axis)
        if self.histograms_every is not None:
            logging.warn_without_histograms(fit.trainer)

    def end(self, fit: Fit) -> None:
        """Writes hyperparameters with final metrics, and the report."""
        self._activations.detach()
        self._clear()
        self._output.end(fit)

    # ----------------------------------------------------------------------------- an update

    def begin_batch(self, batch: Batch) -> None:
        """Measures activations in a window whose update is logged."""
        if self.activations and batch.opens_window and is_due(batch.fit.trainer, self.every):
            self._activations.attach()

    def observe_loss(self, batch: Batch, loss: Tensor) -> None:
        """Records the loss, on the device."""
        self._stability.add_loss(loss, samples=batch.samples)

    def rescale(self, update: Update) -> None:
        """Determines whether the update is logged; the first stage of an update."""
        assert self.fit is not None  # set by the engine
        self._due = is_due(self.fit.trainer, self.every)
        self._stepped = True

    def needs_norms(self, update: Update) -> bool:
        """Returns whether the update is logged, or the progress bar shows no values yet."""
        return self._due or self._bar_is_empty

    def decide(self, update: Update) -> Rejection | None:
        """Writes histograms of the gradients of an accepted update, before they are clipped."""
        assert self.fit is not None  # set by the engine
        every = None if update.is_repeated else self.histograms_every
        if every and is_due(self.fit.trainer, every):
            logging.write_histograms(self.fit, update, self._axis)
        return None

    def observe_rejection(self, update: Update, reason: str) -> None:
        """Writes the reason for a rejection to TensorBoard."""
        if self.fit is not None:
            logging.write_rejection(self.fit, reason, self._axis)

    def observe(self, update: Update) -> None:
        """Collects the values of the update, on the device."""
        self._stability.observe(update.label, update.measured_norms)
        if self.activations is not None and self.fit and self.fit.module.automatic_optimization:
            self._activations.pause()  # further evaluations of the closure are not measured
        if not self.needs_norms(update):
            return
        values, label = self._values, update.label
        values.add(tag_name("grad_norm/total", label), unread_total(update.norms))
        add_hyperparameters(values, update.optimizer, label)
        if not self._due:
            return
        if update.decision is not None:
            add_clipping(values, update.decision, label)
        self._layers.before_step(update, into=values)

    def after_step(self, update: Update) -> None:
        """Measures the norm of the change in the weights, and counts the update."""
        self._stability.accept(update.label, found_inf=update.found_inf, is_logged=self._due)
        self._layers.after_step(update, into=self._values)

    def end_batch(self, batch: Batch) -> None:
        """Transfers all values in one copy, and logs them if the update is logged."""
        if batch.closes_window:
            self._activations.detach()
            self._axis.mark(batch.fit)
            if batch.fit.module.automatic_optimization:
                self._stability.clear_window()
        if not self._stepped:
            return
        self._stepped = False
        self._timer.step()
        if not self._values:
            return
        values, self._values = self._values, MetricBuffer()
        fit, trainer, clock, due = batch.fit, batch.fit.trainer, batch.fit.clock, self._due
        self._bar_is_empty, self._micro_size = False, batch.samples
        self._layers.end_batch(into=values)
        if due:
            for tag, value in fit.metrics().items():
                values.add(tag, value)
            self._stability.add_scores(into=values)
            self._activations.add_values(into=values)
        if not trainer.is_global_zero:
            return
        if batch.samples is not None:
            values.add("batch/global_size", float(clock.window.trained_samples))
        fetched = without_unknown(values.fetch())
        loggers.show_on_progress_bar(trainer, for_progress_bar(fetched))
        if due:
            # After the transfer, which waits for the GPU: the events of its updates are complete.
            times = MetricBuffer()
            counted = None if batch.samples is None else clock.counts().trained_samples
            self._timer.report(samples=counted, tokens=clock.tokens, into=times)
            fetched.update(times.fetch())
            fetched.update(self._layers.update_ratio_quantiles(fetched))
            logging.log_values(fit, fetched, self._axis)

    def metrics(self, fit: Fit) -> Mapping[str, float | Tensor]:
        """Returns sizes of the batch, and samples and tokens consumed by the run."""
        return batch_values(fit.clock, self._micro_size)

    def begin_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        """Pauses timer and activations: a validation within a window does not count."""
        self._timer.pause()
        self._activations.pause()

    def end_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        """Resumes timer and activations."""
        self._timer.resume()
        self._activations.resume()

    def end_epoch(self, fit: Fit) -> None:
        """Sums the losses over the processes, for a checkpoint that is saved after the fit."""
        self._stability.reduce()

    def saved_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Sums the losses over the processes: all of them collect the weights of a checkpoint."""
        self._stability.reduce()
        return state_dict

    def saved_state(self) -> dict[str, Any]:
        """Returns the spike scores, and by how much rollbacks have moved the x axis."""
        return {"stability": self._stability.state_dict(), "axis": self._axis.state_dict()}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the spike scores and the x axis."""
        self._stability, self._axis = Stability(), LoggedAxis(self.x_axis)
        for name, part in (("stability", self._stability), ("axis", self._axis)):
            if name in state:  # not in checkpoints of earlier versions
                part.load_state_dict(state[name])

    def snapshot(self) -> dict[str, Any]:
        """Returns the spike scores, with losses that are not yet summed over the processes."""
        return self._stability.snapshot()

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Restores the spike scores; the x axis goes on."""
        self._stability.restore(snapshot)
        assert self.fit is not None  # set by the engine
        undone = self._axis.go_on(self.fit)
        self._timer.rewind(samples=undone.trained_samples, tokens=undone.tokens)

    def settings_as_code(self) -> dict[str, str]:
        """Returns the arguments that determine which updates are measured, and how."""
        names = ("every", "layers", "per_layer", "activations", "histograms_every", "x_axis")
        return {name: as_code(getattr(self, name)) for name in names}
