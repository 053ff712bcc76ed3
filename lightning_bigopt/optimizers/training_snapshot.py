"""A snapshot of the weights and buffers of a module, and of its optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bigopt.optimizers.object_snapshot import ObjectSnapshot
from lightning_bigopt.optimizers.stored_training import (
    derived_buffers,
    is_of_one_step,
    training_state,
)

__all__ = ["TrainingSnapshot"]

_Group: TypeAlias = dict[str, Any]


class TrainingSnapshot:
    """Weights, buffers, and everything that the optimizers hold; restored exactly.

    Parameters, buffers and submodules that were replaced are put back, except for non-persistent
    buffers of another shape, such as caches. So are parameters in the groups of an optimizer, also
    those that were moved to another group. What was added stays:
    parameters and modules, and parameter groups, with empty optimizer states. Optimizer states
    outside ``state`` are included: attributes, wrapped optimizers, and objects with tensors.
    Gradients and hooks are not.

    Args:
        module: The module.
        optimizers: Its optimizers.
        portable: Whether the copies are on the CPU, and :meth:`state_dict` returns them.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> weight, before = layer.weight, layer.weight.tolist()
        >>> snapshot = TrainingSnapshot(layer, [optimizer])
        >>> layer.weight = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(weight + 1)
        >>> snapshot.restore()
        >>> layer.weight is weight is optimizer.param_groups[0]["params"][0]
        True
        >>> layer.weight.tolist() == before
        True
    """

    def __init__(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, portable: bool = False
    ) -> None:
        self._registered = [
            (path, part, _registered(part)) for path, part in module.named_modules()
        ]
        self._derived = derived_buffers(module)
        tensors = [*module.parameters(), *module.buffers()]
        self._objects = ObjectSnapshot(
            tensors,
            *optimizers,
            device="cpu" if portable else None,
            asynchronous=portable,
            gradients=False,
            nested=True,
            ignore=is_of_one_step,
        )
        self._state = training_state(module, optimizers, self._objects) if portable else {}
        # With the parameters of each group at this time: code that moves a parameter to another
        # group changes the list in the group itself.
        self._groups: list[tuple[dict[str, Any], list[_Group], set[int]]] = [
            (attributes, list(attributes["param_groups"]), _ids(attributes["param_groups"]))
            for attributes in self._objects.attributes
            if isinstance(attributes.get("param_groups"), list)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a :class:`StoredTraining`; it shares the tensors."""
        return self._state

    def check(self) -> None:
        """Checks that everything can be restored.

        Raises:
            ValueError: If a tensor has another shape or dtype, or a parameter, buffer or submodule
                was removed from its module.
        """
        self._objects.check()
        for path, part, saved in self._registered:
            missing = sorted(saved.keys() - _registered(part).keys())
            if missing:
                name = f"{path}.{missing[0]}" if path else missing[0]
                raise ValueError(
                    f"a snapshot must be restored into the modules it was taken of, got none named "
                    f"{name!r}; remove it, or prune, before the snapshot"
                )

    def restore(self) -> None:
        """Restores the state at the time of the snapshot; may be called several times.

        Raises:
            ValueError: If :meth:`check` does. Nothing is changed then.
        """
        self.check()
        added = [
            (attributes, _added(attributes["param_groups"], saved, known))
            for attributes, saved, known in self._groups
        ]
        self._objects.restore()
        for attributes, groups in added:
            listed = attributes["param_groups"]  # wrapped optimizers may share the list
            listed.extend(g for g in groups if not any(g is other for other in listed))
        for path, part, saved in self._registered:
            current = _registered(part)
            for name, item in saved.items():
                if current[name] is item:
                    continue
                # A buffer that is computed, such as a cache of another size, fits the module's
                # attributes, which do not go back.
                full = f"{path}.{name}" if path else name
                if full in self._derived and _differ(current[name], item):
                    continue
                setattr(part, name, item)


def _registered(part: nn.Module) -> dict[str, Tensor | nn.Module]:
    """Returns the parameters, buffers and submodules of a module itself, by name."""
    return {
        **dict(part.named_parameters(recurse=False, remove_duplicate=False)),
        **dict(part.named_buffers(recurse=False, remove_duplicate=False)),
        **dict(part.named_children()),
    }


def _differ(one: Any, other: Any) -> bool:
    return not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape)


def _ids(groups: Sequence[_Group]) -> set[int]:
    """Returns the ids of the parameters of groups."""
    return {id(parameter) for group in groups for parameter in group["params"]}


def _added(groups: Sequence[_Group], saved: Sequence[_Group], known: set[int]) -> list[_Group]:
    """Returns the groups that were added; removes the parameters that go back to their groups.

    A group that has such parameters only is left out: parameters were moved to it, or
    ``load_state_dict`` has made it.
    """
    added = []
    for group in groups:
        if any(group is other for other in saved):
            continue
        kept = [parameter for parameter in group["params"] if id(parameter) not in known]
        if kept or not group["params"]:
            group["params"] = kept
            added.append(group)
    return added
