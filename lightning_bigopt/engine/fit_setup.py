"""The engine's work once per fit: checks, restoring state, installing and removing hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch.optim import Optimizer

from lightning_bigopt.checks import shown
from lightning_bigopt.engine import optimizer_setup
from lightning_bigopt.engine.amounts import NeedsSamples
from lightning_bigopt.engine.batch_source import simulate_constant
from lightning_bigopt.engine.overridden_stages import overriding
from lightning_bigopt.engine.stage import Fit, Stages
from lightning_bigopt.engine.update_check import UpdateCheck
from lightning_bigopt.optimizers.private import check_not_private
from lightning_bigopt.trainer_access import loaders, saved_weights
from lightning_bigopt.trainer_access.requeue_signal import defer_requeue

__all__ = [
    "check",
    "check_version",
    "end",
    "install",
    "needs_samples",
    "restore",
    "saved_bases",
    "start_clock",
]

_ON_GRADIENTS = ("weigh_loss", "rescale", "needs_norms", "decide", "clip", "observe")


def check(fit: Fit, run: object) -> None:
    """Resets capabilities of another run, merges the settings of the clock, and checks conflicts.

    Args:
        fit: The fit with its capabilities.
        run: Identifies the run.

    Raises:
        ValueError: If two capabilities own the same thing, a required capability is missing, or a
            capability finds a conflict.
    """
    seen: set[str] = set()
    for capability in fit.capabilities:
        if capability.run not in (None, run):
            capability.reset()
        capability.run, capability.fit = run, fit
        if capability.owns in seen:
            raise ValueError(
                f"callbacks must contain at most one owner of the {capability.owns}, got two; "
                "remove one of them (a mixin of the module may have added one)"
            )
        seen.add(capability.owns)
        fit.clock.settings = fit.clock.settings.merge(capability.settings)
    for capability in fit.capabilities:
        for kind in capability.requires:
            if not any(isinstance(other, kind) for other in fit.capabilities):
                raise ValueError(
                    f"callbacks must contain {kind.__name__} with {capability!r}, got none; add "
                    f"{kind.__name__}()"
                )
    # In a second pass, because a check may read the settings and owners of all capabilities.
    for capability in fit.capabilities:
        capability.check_fit(fit)
        capability.check_optimizers(fit)
        if any(overriding([capability], Stages)[stage] for stage in _ON_GRADIENTS):
            check_not_private(
                fit.trainer.optimizers,
                type(capability).__name__,
                "which clips and adds noise inside its step: the gradients before it are not "
                "private, and not those of the update; remove the callback",
            )


def install(
    fit: Fit,
    *,
    receive_loader: Callable[[Any], None] | None,
    collect_weights: Callable[[saved_weights.Collect], dict[str, Any]],
    collect_optimizer: Callable[[Optimizer, saved_weights.Collect], dict[str, Any]],
) -> None:
    """Installs hooks on the strategy, and on SLURM's signal, for the length of the fit.

    Args:
        fit: The fit.
        receive_loader: Receives each training loader before its first iteration; None for no hook.
        collect_weights: Collects the weights of a checkpoint.
        collect_optimizer: Collects the state of an optimizer for a checkpoint.
    """
    trainer = fit.trainer
    if receive_loader is not None:
        loaders.watch_loaders(trainer, receive_loader)
    saved_weights.replace_saved_weights(trainer, collect_weights, collect_optimizer)
    fit.requeue = defer_requeue(trainer)


def end(fit: Fit, update_check: UpdateCheck | None) -> None:
    """Ends all capabilities, stops the clock, and undoes all changes to Trainer and optimizers.

    After an error in one of them the others still run, such as one of a logger whose disk is full.

    Args:
        fit: The fit.
        update_check: The check of the updates, whose hooks are removed.
    """
    with ExitStack() as stack:  # calls the last one first
        stack.callback(fit.clock.stop)
        if fit.requeue is not None:
            stack.callback(fit.requeue.stop)
        if update_check is not None:
            stack.callback(update_check.remove)
        stack.callback(optimizer_setup.uninstall, fit.groups)
        stack.callback(optimizer_setup.report_changes, fit.groups)
        stack.callback(saved_weights.restore_saved_weights, fit.trainer)
        stack.callback(loaders.stop_watching_loaders, fit.trainer)
        for capability in reversed(fit.capabilities):
            stack.callback(setattr, capability, "fit", None)
            stack.callback(capability.end, fit)


def restore(fit: Fit, loaded: dict[str, Any] | None) -> bool:
    """Applies loaded state to the clock, the parameter groups and the capabilities.

    Args:
        fit: The fit.
        loaded: The state of the engine; None without a checkpoint, or for one without an engine.

    Returns:
        Whether the learning rates continue a cooldown, which needs the horizon.
    """
    clock = None if loaded is None else loaded["clock"]
    for capability in fit.capabilities:
        state = capability.take_loaded_state()
        if state is not None:
            of_callback = state.pop("clock", None)  # version 0.1 saved it in every callback
            clock = clock or of_callback
            capability.load_saved_state(state)
    if clock is not None:
        fit.clock.load_state_dict(clock)
    fit.modes.restore(None if loaded is None else loaded.get("training_weights"))
    if loaded is not None:
        fit.restored_bases.update(loaded["groups"])
        fit.groups.load_state_dict(loaded["groups"])
        fit.clock.samples_are_known = loaded.get("samples_are_known", True)
        optimizer_setup.restore_repeated_evaluations(fit.groups, loaded.get("repeat", ()))
    if loaded is not None or fit.trainer.ckpt_path is not None:
        # The optimizers hold the values of the checkpoint, not those that were configured.
        fit.groups.restore_written({} if loaded is None else loaded.get("written", {}))
    cooldown = fit.clock.cooldown if clock is None else clock.get("cooldown")
    return cooldown is not None and "lr" in fit.groups


def start_clock(fit: Fit, simulators: Sequence[Stages], *, needs_horizon: bool) -> None:
    """Starts the clock, which determines the horizon.

    Args:
        fit: The fit.
        simulators: The capabilities that simulate the run; at most one.
        needs_horizon: Whether the horizon must be known.

    Raises:
        ValueError: If the horizon is needed and unknown.
    """
    simulate = simulators[0].simulator(fit) if simulators else simulate_constant(fit.trainer)
    fit.clock.start(fit.trainer, simulate, horizon="required" if needs_horizon else "optional")


def needs_samples(fit: Fit) -> NeedsSamples:
    """Returns whether the samples of every batch must be counted, or are counted if possible.

    Args:
        fit: The fit, after :func:`start_clock`.

    Raises:
        ValueError: If the budget is in samples, and the run has consumed batches without counting.
    """
    clock = fit.clock
    in_samples = clock.horizon is not None and clock.horizon.clock == "samples"
    if in_samples and not clock.samples_are_known:
        raise ValueError(
            "samples must be counted from the beginning of a run with a budget in samples, got a "
            "checkpoint of a run that did not count them; give the budget in steps or epochs"
        )
    needs = {capability.needs_samples for capability in fit.capabilities}
    # A function or field that the user gives is always called, and its errors are not hidden.
    if in_samples or clock.settings.samples is not None or "required" in needs:
        return "required"
    return "optional" if "optional" in needs else None


def saved_bases(fit: Fit) -> dict[str, list[list[float]]]:
    """Returns the base values that the engine saves; Lightning saves those of the learning rate."""
    return {name: bases for name, bases in fit.groups.state_dict().items() if name != "lr"}


def check_version(name: str, state: Mapping[str, Any], known: Collection[int]) -> None:
    """Raises unless a loaded state has a known version.

    Args:
        name: Name of the object, for the error message.
        state: The loaded state.
        known: Versions that can be loaded.

    Raises:
        ValueError: If the version is missing or not among ``known``.
    """
    version = state.get("version")
    if version not in known:
        raise ValueError(
            f"the checkpoint's {name} state must have version "
            f"{' or '.join(map(str, sorted(known)))}, got {shown(version)}; resume with the "
            "release that wrote it"
        )
