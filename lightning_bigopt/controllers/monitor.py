"""Collects what an update used on the device, and hands it to the loggers in one piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from torch import Tensor

from lightning_bigopt import trainer_access
from lightning_bigopt.clock import ClockSettings
from lightning_bigopt.controllers import written
from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.controllers.collected import Collected
from lightning_bigopt.controllers.layers import LayerMonitor, Layers, LayerValue, check_layers
from lightning_bigopt.controllers.throughput import StepTimer
from lightning_bigopt.reporting.tags import tag_name

if TYPE_CHECKING:
    from lightning_bigopt.gradients import ClipDecision
    from lightning_bigopt.pipeline import OptimizerStep, Pipeline

__all__ = ["MonitorController", "XAxis"]

XAxis: TypeAlias = Literal["updates", "samples", "tokens"]


class MonitorController(Controller):
    """Logs what every n-th update used."""

    role = "monitor"
    rank = 90

    def __init__(
        self,
        *,
        every: int | None = None,
        layers: Layers = None,
        per_layer: Sequence[LayerValue] = (),
        histograms_every: int | None = None,
        x_axis: XAxis = "updates",
        settings: ClockSettings | None = None,
    ) -> None:
        for name, number in (("every", every), ("histograms_every", histograms_every)):
            if number is not None and (type(number) is not int or number < 1):
                raise ValueError(
                    f"{name} must be a positive number of updates or None, got {number!r}; None "
                    + ("follows Trainer(log_every_n_steps=)" if name == "every" else "writes none")
                )
        if x_axis not in get_args(XAxis):
            raise ValueError(
                f"x_axis must be 'updates', 'samples' or 'tokens', got {x_axis!r}; 'updates' is "
                "what Lightning counts"
            )
        LayerMonitor(layers, per_layer)  # refuses what it does not know
        self.every, self.histograms_every, self.x_axis = every, histograms_every, x_axis
        self.layers, self.per_layer = layers, tuple(per_layer)
        self.settings = settings or ClockSettings()
        self._start()

    def _start(self) -> None:
        self._values = Collected()
        self._layers: dict[str, LayerMonitor] = {}
        self._timer = StepTimer()
        self._bar_is_empty = True
        self._due = self._stepped = False

    # ------------------------------------------------------------------------------- hooks

    def on_train_start(self, pipeline: Pipeline) -> None:
        """Shows the plan; the progress bar of a new fit is empty."""
        if self.x_axis == "tokens" and pipeline.clock.settings.tokens is None:
            raise ValueError(
                "tokens must be counted for x_axis='tokens', got nobody who does; pass tokens=a "
                "function of the batch, or the name of its ids or mask"
            )
        check_layers(pipeline.parameter_names, self.layers)
        self._start()
        clock = pipeline.clock
        self._timer.start(
            pipeline.trainer.strategy.root_device, samples=clock.samples, tokens=clock.tokens
        )
        written.write_start(pipeline, self.x_axis)

    def rescale(self, step: OptimizerStep) -> None:
        """Asks once an update whether it is logged."""
        trainer = step.pipeline.trainer
        if self.every is None:
            self._due = trainer_access.should_log(trainer)
        else:
            self._due = (trainer_access.batches_that_stepped(trainer) + 1) % self.every == 0
        self._stepped = True

    def wants_norms(self, step: OptimizerStep) -> bool:
        """The norm is taken where it will be shown."""
        return self._due or self._bar_is_empty

    def decide(self, step: OptimizerStep) -> None:
        """Takes histograms of what was not clipped yet."""
        every = self.histograms_every
        if every is None or step.skipped is not None:
            return
        if (trainer_access.batches_that_stepped(step.pipeline.trainer) + 1) % every == 0:
            written.write_histograms(step, self.x_axis)

    def observe(self, step: OptimizerStep) -> None:
        """Keeps the update's values on the device."""
        label = step.label
        if not self.wants_norms(step):
            return
        values = self._values
        norms = step.norms
        total = norms.value if norms.is_on_host else norms.total
        values.add(tag_name("grad_norm/total", label), total)
        groups = step.optimizer.param_groups
        for name, group in zip(written.group_names(groups), groups, strict=True):
            for tag, value in _hyperparameters(group).items():
                values.add(tag_name(tag, label, name), value)
        if not self._due:
            return
        if step.decision is not None:
            self._show_clip(step.decision, label)
        if self.layers is not None:
            monitor = self._layers.get(label)
            if monitor is None:
                monitor = LayerMonitor(self.layers, self.per_layer, label=label)
                self._layers[label] = monitor
            shards, refused = step.pipeline.shard_group, step.skipped is not None
            monitor.before_step(norms, group=shards, into=values, is_refused=refused)

    def _show_clip(self, decision: ClipDecision, label: str) -> None:
        """Factor and threshold; the share of clipped updates comes from who counts them."""
        for pattern, part in decision.by_group.items():
            factor, threshold = part.coefficient, part.threshold
            if factor is None and part.coefficients is not None:
                factor = part.coefficients.mean()
            if factor is not None:
                self._values.add(tag_name("clip/coefficient", label, pattern), factor)
            if threshold is not None and (not isinstance(threshold, Tensor) or threshold.ndim == 0):
                self._values.add(tag_name("clip/threshold", label, pattern), threshold)

    def on_rejection(self, pipeline: Pipeline, why: str) -> None:
        """Writes what the guard says."""
        written.write_rejection(pipeline, why, self.x_axis)

    def on_batch_end(self, pipeline: Pipeline, outputs: Any, batch: Any) -> None:
        """Fetches everything in one transfer and logs it at Lightning's own step."""
        if not self._stepped:
            return
        self._stepped = False
        self._timer.step()
        values = self._values
        if not values:
            return
        self._values = Collected()
        trainer, due = pipeline.trainer, self._due
        self._bar_is_empty = False
        if due:
            for monitor in self._layers.values():
                monitor.after_step(group=pipeline.shard_group, into=values)
            for controller in pipeline.controllers:
                for tag, value in controller.metrics(pipeline).items():
                    values.add(tag, value)
        if not trainer.is_global_zero:
            return
        clock = pipeline.clock
        values.add("batch/global_size", float(pipeline.window.samples))
        found = values.fetch()
        trainer_access.show_on_progress_bar(trainer, self._shown(found))
        if due:
            rest = Collected()
            self._timer.report(samples=clock.samples, tokens=clock.tokens, into=rest)
            found.update(rest.fetch())
            written.log_values(pipeline, found, self.x_axis)

    def _shown(self, found: Mapping[str, float]) -> dict[str, float]:
        shown = {
            "grad_norm": next(v for k, v in found.items() if k.startswith("grad_norm/total")),
            "global_batch": found["batch/global_size"],
        }
        rate = next((v for k, v in found.items() if k.startswith("optim/lr")), None)
        if rate is not None:
            shown = {"lr": rate, **shown}
        if found.get("guard/skipped"):
            shown["skipped"] = found["guard/skipped"]
        return shown

    def metrics(self, pipeline: Pipeline) -> Mapping[str, float | Tensor]:
        """What it knows of the whole run."""
        clock = pipeline.clock
        known = {
            "batch/micro_size": float(pipeline.window.batch_samples),
            "batch/accumulate": float(clock.batches - pipeline.progress.batches),
            "progress/samples": float(clock.samples),
        }
        if clock.settings.tokens is not None:
            known["progress/tokens"] = float(clock.tokens)
        return known

    def pause(self) -> None:
        """Validation begins, which is no part of a step."""
        self._timer.pause()

    def resume(self) -> None:
        """Validation is over."""
        self._timer.resume()

    def on_fit_end(self, pipeline: Pipeline) -> None:
        """Writes the final metrics beside the hyperparameters."""
        self._values = Collected()
        self._layers = {}
        written.write_end(pipeline)

    def reset(self) -> None:
        """Forgets a former Trainer's run."""
        self._start()


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, float | Tensor]:
    """What of a parameter group is worth a curve.

    Schedulers write into tensors in place, before the values of an update are fetched.
    """
    momentum = group.get("momentum")
    if momentum is None and group.get("betas"):
        momentum = group["betas"][0]
    found = {
        "optim/lr": group.get("lr"),
        "optim/weight_decay": group.get("weight_decay"),
        "optim/momentum": momentum,
    }
    return {
        tag: value.detach().clone() if isinstance(value, Tensor) else value
        for tag, value in found.items()
        if value is not None  # an optimizer may find its own, as Adafactor does
    }
