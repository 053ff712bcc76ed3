"""Shares DDP's only communication hook between this package and the user."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

from lightning_bigopt.gradients.communication_hook import CommunicationHook
from lightning_bigopt.trainer_access.packages import classes

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["communication_hook", "restore_user_hook", "share_user_hook"]

_HOOK = "bigopt_communication_hook"
_WRAPPED = "bigopt_wrapped"


def share_user_hook(trainer: Trainer, stage: str) -> None:
    """Puts ``DDPStrategy(ddp_comm_hook=)`` into the shared hook, when Lightning registers it.

    For use in ``setup``: Lightning registers the hook before ``on_fit_start``. On a CPU it ignores
    the hook.
    """
    strategy: Any = trainer.strategy
    if stage != "fit" or not isinstance(strategy, classes("strategies.DDPStrategy")):
        return
    users = strategy._ddp_comm_wrapper
    if strategy._ddp_comm_hook is None or hasattr(users, _WRAPPED):
        return

    def share_with_callbacks(hook: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Returns the hook for DDP; Lightning calls it in place of the user's wrapper."""
        shared, reduce = CommunicationHook(), hook if users is None else users(hook)

        def run(state: Any, bucket: Any) -> Any:
            if not shared.owner:  # the state is known from the first bucket on
                shared.reduce_by(partial(reduce, state), owner="ddp_comm_hook=")
            return shared.run(bucket)

        # DDP checks annotations, and does not resolve those that are strings.
        run.__annotations__.clear()
        setattr(share_with_callbacks, _HOOK, shared)
        return run

    setattr(share_with_callbacks, _WRAPPED, users)
    strategy._ddp_comm_wrapper = share_with_callbacks


def restore_user_hook(trainer: Trainer) -> None:
    """Undoes :func:`share_user_hook`; a hook that is registered stays."""
    strategy: Any = trainer.strategy
    wrapper = getattr(strategy, "_ddp_comm_wrapper", None)
    if hasattr(wrapper, _WRAPPED):
        strategy._ddp_comm_wrapper = getattr(wrapper, _WRAPPED)


def communication_hook(trainer: Trainer, user: str) -> CommunicationHook | None:
    """Returns the communication hook of DDP that all callbacks share; registers it if necessary.

    A hook that the module or a callback registers later runs inside it.

    Args:
        trainer: The Trainer, after ``strategy.setup``.
        user: Name of the callback that needs the hook.

    Returns:
        The hook; None for other strategies and for one process.

    Raises:
        ValueError: If DDP already has another hook.
    """
    model = trainer.strategy.model
    # plan() does not wrap the module.
    if trainer.world_size == 1 or not isinstance(model, DistributedDataParallel):
        return None
    found: CommunicationHook | None = vars(model).get(_HOOK)
    if found is not None:
        return found
    # Lightning has registered it, with a hook of the user inside.
    found = getattr(getattr(trainer.strategy, "_ddp_comm_wrapper", None), _HOOK, None)
    if found is None:
        found = CommunicationHook()
        try:
            # A lambda, because DDP checks the annotations of the hook, and does not resolve those
            # that are strings under ``from __future__ import annotations``.
            model.register_comm_hook(found, lambda state, bucket: state.run(bucket))
        except RuntimeError as error:
            raise ValueError(
                f"DDP must have no communication hook before {user}, which shares its own, got one "
                f"({error}); register yours in on_fit_start of the module, which runs later"
            ) from error

    def register_comm_hook(state: Any, hook: Callable[[Any, Any], Any]) -> None:
        found.reduce_by(partial(hook, state), owner="the hook of register_comm_hook")

    vars(model).update({_HOOK: found, "register_comm_hook": register_comm_hook})
    return found
