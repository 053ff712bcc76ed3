"""One coming update: the gradients, and what the controllers find and decide of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_bigopt import trainer_access
from lightning_bigopt.controllers.clipping import GradientClippingController
from lightning_bigopt.durations import Progress
from lightning_bigopt.gradients import ClipDecision, GradientNorms, measure, scale_

if TYPE_CHECKING:
    from lightning_bigopt.pipeline.owned import Owned
    from lightning_bigopt.pipeline.run import Pipeline

__all__ = ["OptimizerStep"]


class OptimizerStep:
    """One coming update of one optimizer: the gradients and what was found and decided of them.

    Attributes:
        pipeline: The pipeline that runs it.
        optimizer: The optimizer about to step.
        parameters: Names and parameters of the optimizer.
        label: The optimizer's name, where there are several.
        overflow_is_handled: Whether a GradScaler skips non-finite gradients by itself.
        skipped: Why the update is refused, or None.
        decision: What clipping did, or None.
    """

    def __init__(self, pipeline: Pipeline, owned: Owned, *, has_scaler: bool) -> None:
        self.pipeline = pipeline
        self.optimizer, self.parameters, self.label = owned
        self.overflow_is_handled = has_scaler
        if has_scaler:
            trainer_access.unscale_gradients_(pipeline.trainer, self.optimizer)
        self.skipped: str | None = None
        self.decision: ClipDecision | None = None
        # No cached_property: it takes a lock at every look, and these are looked at often.
        self._norms: GradientNorms | None = None
        self._shrunk: GradientNorms | None = None

    @property
    def progress(self) -> Progress:
        """What had been consumed when the update's first batch began."""
        return self.pipeline.progress

    @property
    def norms(self) -> GradientNorms:
        """The one look at the gradients; every process must ask for it, or none."""
        return self._norms or self.measure()

    def measure(self) -> GradientNorms:
        """Looks at the gradients."""
        clipping = self.pipeline.find(GradientClippingController)
        self._norms = measure(
            self.parameters,
            norm_type=2.0 if clipping is None else clipping.norm_type,
            process_group=self.pipeline.shard_group,
        )
        return self._norms

    @property
    def coming_norms(self) -> GradientNorms:
        """The norms after the guard, which may have shrunk the gradients."""
        return self._shrunk or self.norms

    def shrink_(self, factor: float) -> None:
        """Multiplies the gradients; :attr:`norms` stays what was found."""
        gradients = [parameter.grad for _, parameter in self.parameters]
        scale_(gradients, self.norms.total.new_full((), factor))
        self._shrunk = self.coming_norms.scaled(factor)
