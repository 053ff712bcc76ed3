"""The engine's work once per fit: checks, restoring state, installing and removing hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_bigopt.engine.batch_source import simulate_constant
from lightning_bigopt.engine.lr_scheduler import LightningLRScheduler
from lightning_bigopt.engine.stage import Fit, Stages
from lightning_bigopt.gradients.optimizer_step import step_control
from lightning_bigopt.optimizers.base_values import remember_bases
from lightning_bigopt.optimizers.group_schedule import GroupField, GroupSchedule
from lightning_bigopt.optimizers.names import optimizer_label, unwrapped
from lightning_bigopt.trainer_access import (
    loaders,
    saved_weights,
    schedulers,
)

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "check",
    "check_version",
    "group_schedule",
    "install",
    "restore",
    "saved_bases",
    "start_clock",
    "uninstall",
]


def group_schedule(trainer: Trainer) -> GroupSchedule:
    """Creates the GroupSchedule of all parameter groups of the Trainer's optimizers."""
    optimizers = [unwrapped(optimizer) for optimizer in trainer.optimizers]
    _separate_tensors(optimizers)
    return GroupSchedule([(optimizer_label(optimizers, one), one) for one in optimizers])


def _separate_tensors(optimizers: Sequence[Optimizer]) -> None:
    """Gives each group its own tensors: a value is written in place, and would reach all groups."""
    seen: set[int] = set()
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        for name, value in group.items():
            if isinstance(value, Tensor):
                if id(value) in seen:
                    group[name] = value.clone()
                seen.add(id(value))


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


def install(
    fit: Fit,
    *,
    receive_loader: Callable[[Any], None] | None,
    collect_weights: Callable[[Callable[[], dict[str, Any]]], dict[str, Any]],
    controls_steps: bool,
) -> None:
    """Installs hooks on strategy and optimizers for the length of the fit.

    Args:
        fit: The fit.
        receive_loader: Receives each training loader before its first iteration; None for no hook.
        collect_weights: Collects the weights of a checkpoint.
        controls_steps: Whether a capability may skip an optimizer's step, or act after it.
    """
    trainer = fit.trainer
    if receive_loader is not None:
        loaders.watch_loaders(trainer, receive_loader)
    saved_weights.replace_saved_weights(trainer, collect_weights)
    for index, (label, optimizer) in enumerate(fit.groups):
        if controls_steps:
            # Before the first step, because a step that is already running cannot be controlled.
            step_control(optimizer)
        if "lr" in fit.groups:
            # Registered in on_fit_start, because Lightning restores the states of schedulers after
            # it, and before on_train_start.
            scheduler = LightningLRScheduler(optimizer, fit.groups, index=index)
            schedulers.add_scheduler(trainer, scheduler, name=label or None)


def uninstall(fit: Fit) -> None:
    """Undoes :func:`install`."""
    loaders.stop_watching_loaders(fit.trainer)
    saved_weights.restore_saved_weights(fit.trainer)
    for index, (_, optimizer) in enumerate(fit.groups):
        step_control(optimizer).remove()
        for name, bases in fit.groups.state_dict().items():
            values = [GroupField(name).read(group) for group in optimizer.param_groups]
            remember_bases(optimizer, name, values=values, bases=bases[index])


def restore(fit: Fit, loaded: dict[str, Any] | None) -> None:
    """Applies loaded state to the clock, the parameter groups and the capabilities.

    Args:
        fit: The fit.
        loaded: The state of the engine; None for a checkpoint without an engine.
    """
    clock = None if loaded is None else loaded["clock"]
    for capability in fit.capabilities:
        state = capability.take_loaded_state()
        if state is not None:
            clock = clock or state.pop("clock", None)  # version 0.1 saved it in every callback
            capability.load_saved_state(state)
    if clock is not None:
        fit.clock.load_state_dict(clock)
    if loaded is not None:
        fit.groups.load_state_dict(loaded["groups"])


def start_clock(fit: Fit, simulators: Sequence[Stages], *, needs_horizon: bool) -> None:
    """Starts the clock, which determines the horizon.

    Args:
        fit: The fit.
        simulators: The capabilities that simulate the run; at most one.
        needs_horizon: Whether the engine needs the horizon, in addition to the capabilities.

    Raises:
        ValueError: If the horizon is needed and unknown.
    """
    simulate = simulators[0].simulator(fit) if simulators else simulate_constant(fit.trainer)
    needed = needs_horizon or any(capability.needs_horizon for capability in fit.capabilities)
    fit.clock.start(fit.trainer, simulate, horizon="required" if needed else "optional")


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
            f"{' or '.join(map(str, sorted(known)))}, got {version!r}; resume with the release "
            "that wrote it"
        )
