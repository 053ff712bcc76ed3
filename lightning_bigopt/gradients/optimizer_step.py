"""Controls the next step of an optimizer: skips it, scales in its kernel, runs functions after."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_bigopt.gradients.evaluations import Evaluations, StepStopped, has_gradients
from lightning_bigopt.optimizers.names import check_optimizer, unwrapped
from lightning_bigopt.optimizers.object_snapshot import ObjectSnapshot

__all__ = ["StepControl", "installed_step_control", "is_step_replaced", "step_control"]

_ATTRIBUTE = "_bigopt_step_control"


@dataclass
class _Skip:
    """A pending skip.

    Args:
        unless_gradients: Whether a step with gradients is made anyway.
        snapshot: Restores the optimizer after a step that was running when the control was
            installed; None if no such step is possible.
        is_over: Whether the step has ended, perhaps only the step of a parent class.
    """

    unless_gradients: bool
    snapshot: ObjectSnapshot | None
    is_over: bool = False


class StepControl:
    """Replaces ``step`` of one optimizer until :meth:`remove`; created by :func:`step_control`.

    The replacement evaluates a closure before it calls the original step, so that a skip decided in
    the closure takes effect before the optimizer changes anything. If an optimizer such as SAM or
    LBFGS evaluates the closure again, and the step is skipped in that evaluation, everything that
    the optimizer has changed is restored. This needs a copy of weights and optimizer state, made in
    the first step, and from the first repeated evaluation on in every step.

    Everything that is pending for a step is cleared after it, even if the step raises.

    Attributes:
        optimizer: The optimizer.
        evaluations: The evaluations of the closure in the current step.
        previous: The function that had replaced the step of the class before; None if none had.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> weight.grad = torch.ones(1)
        >>> control = step_control(optimizer)
        >>> control.skip_next()
        >>> optimizer.step()
        >>> control.after_step(lambda: print(weight.data))
        >>> optimizer.step()
        tensor([0.9000])
        >>> control.remove()
    """

    def __init__(self, optimizer: Optimizer) -> None:
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self.evaluations = Evaluations(optimizer, self._is_skipped)
        self._is_running = self._has_run = False
        self._skip: _Skip | None = None
        self._after: list[Callable[[], None]] = []
        self._scale: dict[str, Tensor] = {}
        attributes = vars(optimizer)
        self.previous: Callable[..., Any] | None = attributes.get("step")
        self._replacement = self._replace(self.previous or type(optimizer).step)
        self._hook: RemovableHandle | None = None
        # The optimizer of Opacus and some that contain another one do not call Optimizer.__init__.
        with suppress(AttributeError, TypeError):
            self._hook = optimizer.register_step_post_hook(_after_any_step)
        attributes[_ATTRIBUTE] = self
        # A bound method, because torch's LRScheduler reads ``step.__func__``.
        attributes["step"] = MethodType(self._replacement, optimizer)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # Copies of an optimizer have no control: it is copied as None.
        return type(None), ()

    def skip_next(self, *, unless_gradients: bool = False) -> None:
        """Skips the current or next step. Does not synchronize.

        Parameters, state, groups and attributes of any optimizer do not change: the original step
        is not called, or undone if it is already running. A closure is evaluated and its result
        returned. The optimizer's step hooks do not run.

        If the control is installed in the closure of a running step, that step ends, with the
        gradients that the parameters have then, and everything is restored afterwards.

        Args:
            unless_gradients: Whether to make the step if a parameter has a gradient by then.

        Example:
            >>> import torch
            >>> weight = torch.nn.Parameter(torch.ones(1))
            >>> optimizer = torch.optim.AdamW([weight], weight_decay=0.1)
            >>> weight.grad = torch.ones(1)
            >>> step_control(optimizer).skip_next()
            >>> optimizer.step()
            >>> weight.data, len(optimizer.state)
            (tensor([1.]), 0)
        """
        # Only the step in whose closure the control was installed is not controlled.
        may_be_late = not self._has_run
        snapshot = ObjectSnapshot(self.optimizer, gradients=False) if may_be_late else None
        self._skip = _Skip(unless_gradients, snapshot)

    def after_step(self, run: Callable[[], None]) -> None:
        """Runs a function once, after the next step; never if that step is skipped.

        Example:
            >>> import torch
            >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
            >>> step_control(optimizer).after_step(lambda: print("stepped"))
            >>> for _ in range(2):
            ...     optimizer.step()
            stepped
        """
        self._after.append(run)

    def scale_gradients(self, coefficient: Tensor, finite: Tensor) -> None:
        """Makes the kernel of a fused optimizer multiply the gradients in the next step.

        The kernel skips an update with non-finite gradients. Does not synchronize.

        Args:
            coefficient: The factor, of shape ``()``.
            finite: Whether all gradients are finite, bool of shape ``()``.
        """
        self._remove_scale()
        self._scale = {"grad_scale": coefficient.reciprocal()}
        # Without found_inf, grad_scale turns an infinite gradient into NaN parameters.
        if not (finite.is_cpu and finite.item()):
            self._scale["found_inf"] = finite.logical_not().float()
        vars(self.optimizer).update(self._scale)

    def clear(self) -> None:
        """Clears everything that is pending for the next step."""
        self._skip = None
        self._after = []
        self._remove_scale()

    def remove(self) -> None:
        """Removes the control and restores the optimizer's ``__dict__``.

        If ``step`` has been replaced again by other code, that function stays, and the replacement
        of this control, which it may call, only calls the original.

        Example:
            >>> import torch
            >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
            >>> step_control(optimizer).remove()
            >>> "step" in vars(optimizer)
            False
        """
        self.clear()
        attributes = vars(self.optimizer)
        if attributes.get(_ATTRIBUTE) is not self:
            return
        del attributes[_ATTRIBUTE]
        if self._hook is not None:
            self._hook.remove()
        if getattr(attributes.get("step"), "__func__", None) is self._replacement:
            del attributes["step"]
            if self.previous is not None:
                attributes["step"] = self.previous

    def _replace(self, original: Callable[..., Any]) -> Callable[..., Any]:
        # wraps() keeps the signature, which a GradScaler inspects, and the mark of an LRScheduler.
        # Pickle saves the bound method by its name, "step", as that of the class.
        @functools.wraps(getattr(original, "__func__", original))
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if optimizer is not self.optimizer:  # a copy
                return type(optimizer).step(optimizer, *args, **kwargs)
            if self._is_running or vars(optimizer).get(_ATTRIBUTE) is not self:
                return self._call_original(args, kwargs)
            self._is_running = self._has_run = True
            try:
                result = self._step(args, kwargs)
                self._leave_scale_to_grad_scaler()
                return result
            finally:
                self._is_running = False
                self.evaluations.end()
                self.clear()

        return step

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._skip is not None and self._skip.is_over:
            self._skip = None
        result, evaluations = None, self.evaluations
        closure = args[0] if args else kwargs.get("closure")
        if callable(closure):
            result = evaluations.begin(closure, before_step=self._skip is not None)
            if args:
                args = (evaluations.replay, *args[1:])
            else:
                kwargs = {**kwargs, "closure": evaluations.replay}
        if self._is_skipped():
            return self._skipped(result)
        self._skip = None
        if not callable(closure):
            result = self._call_original(args, kwargs)
        else:
            try:
                result = evaluations.run(lambda: self._call_original(args, kwargs), result)
            except BaseException as error:
                # The restored attributes may contain the scale of the first evaluation.
                for name in ("grad_scale", "found_inf"):
                    vars(self.optimizer).pop(name, None)
                if not isinstance(error, StepStopped):
                    raise
                return self._skipped(result)
        self._run_after()
        return result

    def _is_skipped(self) -> bool:
        skip = self._skip
        return skip is not None and not (skip.unless_gradients and has_gradients(self.optimizer))

    def _skipped(self, result: Any) -> Any:
        if hasattr(self._replacement, "_wrapped_by_lr_sched"):
            # LRScheduler warns if it is stepped before the first step of the optimizer.
            vars(self.optimizer)["_opt_called"] = True
        return result

    def _call_original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.optimizer).step(self.optimizer, *args, **kwargs)

    def _run_after(self) -> None:
        for run in self._after:
            run()

    def finish_unwrapped_step(self) -> None:
        """Ends a step that started before the replacement; called by the optimizer's hook."""
        if self._is_running:
            return
        skip = self._skip
        try:
            if skip is not None and skip.snapshot is not None:
                skip.snapshot.restore()
            else:
                self._run_after()
            self._leave_scale_to_grad_scaler()
        finally:
            self.clear()
        if skip is not None and skip.snapshot is not None:
            # The hook runs twice for a subclass whose step calls the step of its parent.
            skip.is_over = True
            self._skip = skip

    def _leave_scale_to_grad_scaler(self) -> None:
        # A GradScaler replaces this found_inf by its own, and deletes both attributes itself.
        if vars(self.optimizer).get("found_inf") is not self._scale.get("found_inf"):
            self._scale = {}

    def _remove_scale(self) -> None:
        attributes = vars(self.optimizer)
        for name, tensor in self._scale.items():
            if attributes.get(name) is tensor:
                del attributes[name]
        self._scale = {}


def step_control(optimizer: Optimizer) -> StepControl:
    """Returns the step control of an optimizer; the first call installs it.

    Args:
        optimizer: The optimizer, or Lightning's wrapper of it.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> step_control(optimizer) is step_control(optimizer)
        True
    """
    return installed_step_control(optimizer) or StepControl(unwrapped(optimizer))


def installed_step_control(optimizer: Optimizer) -> StepControl | None:
    """Returns the step control of an optimizer; None if none is installed."""
    control: StepControl | None = vars(unwrapped(optimizer)).get(_ATTRIBUTE)
    return control


def is_step_replaced(optimizer: Optimizer) -> bool:
    """Returns whether other code has replaced the step, for example by a compiled function.

    The wrapper of torch's LRScheduler, which calls the step of the class, does not count.
    """
    control = installed_step_control(optimizer)
    step = vars(optimizer).get("step") if control is None else control.previous
    return step is not None and not hasattr(step, "_wrapped_by_lr_sched")


def _after_any_step(optimizer: Optimizer, *_: Any) -> None:
    control = installed_step_control(optimizer)
    if control is not None:
        control.finish_unwrapped_step()
