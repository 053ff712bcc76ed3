"""CombinedOptimizer: several optimizers, each for a part of the parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import shown
from lightning_bigopt.optimizers.combined_state import PartStates, states_of_groups
from lightning_bigopt.optimizers.make_part import OptimizerFactory, checked_factories, make_part
from lightning_bigopt.optimizers.modes import has_modes
from lightning_bigopt.optimizers.parameter_group import (
    ParameterGroup,
    checked_groups,
    match,
    match_groups,
    trainable_parameters,
)
from lightning_bigopt.parameters import as_patterns
from lightning_bigopt.type_checks import check_instance

__all__ = ["CombinedOptimizer", "combine_optimizers"]

_Group: TypeAlias = dict[str, Any]
_OF_ONE_STEP = ("grad_scale", "found_inf")


@explain_arguments
class CombinedOptimizer(Optimizer):
    """Several optimizers, each for a part of the parameters, as one optimizer.

    One ``step`` steps all parts, so that automatic optimization, gradient scalers, schedulers,
    checkpoints and the callbacks of this package see a single optimizer. Its parameter groups are
    those of the parts.

    A parameter belongs to the part of the first key that it matches. A part is named by the class
    of its optimizer, with a number if several have the same class. Groups are named ``part``,
    ``part.group`` for a group of ``groups``, and end in ``.no_decay`` for parameters that match
    ``no_decay``. A parameter that several modules share is listed once, under its first name.
    Frozen parameters are not listed.

    ``state_dict`` has torch's format, with the names of parameters as ``param_names``.
    ``load_state_dict`` matches groups and parameters by name, in any order, and calls that of each
    part. A ``GradScaler`` scales within the kernels if all parts are fused, else it unscales the
    gradients first.

    Args:
        module: The module.
        optimizers: Patterns of names (as in :mod:`fnmatch`), each with an optimizer class or a
            ``functools.partial`` of one. A pattern may have a rule about the number of dimensions:
            ``"blocks.* if ndim == 2"``, also with ``>=`` and ``<=``.
        groups: Groups with a learning-rate factor or a weight decay of their own.
        no_decay: Patterns of parameters without weight decay, such as ``"* if ndim <= 1"``. A
            weight decay of ``groups`` takes precedence.

    Attributes:
        parts: The optimizers, by name.

    Raises:
        ValueError: If a parameter has no optimizer, a pattern matches nothing, an optimizer needs a
            closure, or a value is out of range.

    Example:
        >>> from functools import partial
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
        >>> optimizer = CombinedOptimizer(
        ...     model,
        ...     {
        ...         "1.* if ndim == 2": partial(torch.optim.Muon, lr=0.02),
        ...         "*": partial(torch.optim.AdamW, lr=1e-3),
        ...     },
        ...     no_decay="* if ndim <= 1",
        ... )
        >>> for group in optimizer.param_groups:
        ...     print(group["name"], group["lr"], group["param_names"])
        Muon 0.02 ['1.weight']
        AdamW 0.001 ['0.weight', '2.weight']
        AdamW.no_decay 0.001 ['1.bias', '2.bias']
    """

    parts: dict[str, Optimizer]

    def __init__(
        self,
        module: nn.Module,
        optimizers: Mapping[str, Callable[[Iterable[Any]], Optimizer]],
        *,
        groups: Sequence[ParameterGroup] | None = None,
        no_decay: str | Iterable[str] = (),
    ) -> None:
        check_instance("module", module, nn.Module, hint="pass the module itself")
        parameters = trainable_parameters(module)
        factories = checked_factories(optimizers)
        keys = tuple(factories)
        owners = match(module, parameters, keys, name="every key of optimizers")
        for name, owner in zip(parameters, owners, strict=True):
            if owner is None:
                raise ValueError(
                    f"optimizers must have a pattern for every parameter, got none for {name!r}; "
                    "add '*' for the others"
                )
        patterns = as_patterns(no_decay, name="no_decay")
        excluded = match(module, parameters, patterns, name="every pattern of no_decay")
        self._combine(
            factories,
            parameters,
            owners=[keys[owner] for owner in owners if owner is not None],
            specifications=match_groups(module, parameters, checked_groups(groups)),
            decays=[index is None for index in excluded],
        )

    def _combine(
        self,
        factories: Mapping[str, OptimizerFactory],
        parameters: Mapping[str, nn.Parameter],
        *,
        owners: Sequence[str],
        specifications: Sequence[ParameterGroup | None],
        decays: Sequence[bool],
    ) -> None:
        """Makes the parts.

        Args:
            factories: What makes each part, by key; one without parameters is not made.
            parameters: The parameters by name.
            owners: The key of each parameter.
            specifications: The group of each parameter; None for the rest of its part.
            decays: Whether a parameter has weight decay, if its group has none of its own.
        """
        made = []
        for key, factory in factories.items():
            members: dict[tuple[ParameterGroup | None, bool], list[str]] = {}
            for name, owner, group, decay in zip(
                parameters, owners, specifications, decays, strict=True
            ):
                if owner == key:
                    keeps = decay or (group is not None and group.weight_decay is not None)
                    members.setdefault((group, keeps), []).append(name)
            if members:
                # First those of no group, then each group; in both, with weight decay first.
                order = list(dict.fromkeys([None, *(group for group, _ in members)]))
                chosen = sorted(members, key=lambda pair: (order.index(pair[0]), not pair[1]))
                ordered = {pair: members[pair] for pair in chosen}
                made.append((make_part(key, factory, ordered, parameters), chosen))
        self.parts = {}
        super().__init__([{}], {})
        kinds = [type(part).__name__ for part, _ in made]
        for index, (part, chosen) in enumerate(made):
            kind = kinds[index]
            label = f"{kind}-{kinds[:index].count(kind)}" if kinds.count(kind) > 1 else kind
            for made_group, (group, keeps) in zip(part.param_groups, chosen, strict=True):
                own = "" if group is None else f".{group.name}"
                made_group["name"] = label + own + ("" if keeps else ".no_decay")
                if group is not None and group.lr_factor != 1.0:
                    made_group["lr"] = made_group["lr"] * group.lr_factor
            self.parts[label] = part

    @property
    def param_groups(self) -> list[_Group]:
        """The parameter groups of all parts: a new list of the same dictionaries."""
        return list(chain.from_iterable(part.param_groups for part in self.parts.values()))

    @param_groups.setter
    def param_groups(self, groups: Iterable[_Group]) -> None:
        chosen: dict[str, list[_Group]] = {label: [] for label in self.parts}
        for group in groups:
            chosen[self._label_of(group)].append(group)
        for label, part in self.parts.items():
            part.param_groups = chosen[label]

    @property  # type: ignore[override]
    def state(self) -> PartStates:
        """The states of all parameters; they are stored in the parts."""
        return PartStates(self.parts.values())

    @state.setter
    def state(self, states: Mapping[Any, Any]) -> None:
        states = dict(states)  # it may be the view that is cleared
        self.state.clear()
        self.state.update(states)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return all(getattr(p, "_step_supports_amp_scaling", False) for p in self.parts.values())

    @property
    def scheduled_fields(self) -> frozenset[str]:
        """The fields of parameter groups that a part schedules itself."""
        fields = (getattr(part, "scheduled_fields", ()) for part in self.parts.values())
        return frozenset(chain.from_iterable(fields))

    def train(self) -> None:
        """Switches the parts that have modes, such as those of schedulefree, to training mode."""
        for part in filter(has_modes, self.parts.values()):
            part.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Switches the parts that have modes to evaluation mode."""
        for part in filter(has_modes, self.parts.values()):
            part.eval()  # type: ignore[attr-defined]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps all parts.

        Args:
            closure: Evaluated once, before the first part steps.

        Returns:
            The result of the closure; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scales = {name: vars(self)[name] for name in _OF_ONE_STEP if name in vars(self)}
        for part in self.parts.values():
            vars(part).update(scales)
            try:
                part.step()
            finally:
                for name in scales:
                    vars(part).pop(name, None)
        return loss

    def add_param_group(self, param_group: _Group) -> None:
        """Adds a group to the part that its name begins with, such as ``"AdamW.new"``.

        Raises:
            ValueError: If the name begins with none or is that of another group, or a group has one
                of the parameters.
        """
        if not self.parts:  # called by Optimizer.__init__
            return
        label = self._label_of(param_group)
        if any(param_group["name"] == group["name"] for group in self.param_groups):
            raise ValueError(
                f"the name of a new group must be new, got {param_group['name']!r}; write "
                f"name='{label}.new2'"
            )
        tensors = param_group["params"]
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if tensors and isinstance(tensors[0], tuple):
            param_group["param_names"] = [name for name, _ in tensors]
            tensors = [tensor for _, tensor in tensors]
        known = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        if any(id(tensor) in known for tensor in tensors):
            raise ValueError(
                "a parameter must be in one group, got one that the optimizer already has; remove "
                f"it from the new group {param_group['name']!r}"
            )
        param_group["params"] = tensors
        numbered = [f"{param_group['name']}.{index}" for index in range(len(tensors))]
        param_group.setdefault("param_names", numbered)
        self.parts[label].add_param_group(param_group)

    def _label_of(self, group: Mapping[str, Any]) -> str:
        label = str(group.get("name", "")).partition(".")[0]
        if label not in self.parts:
            raise ValueError(
                f"the name of a group must begin with one of {', '.join(self.parts)}, got "
                f"{shown(group.get('name'))}; write name='{next(iter(self.parts))}.new' for a "
                "group of this part"
            )
        return label

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state; groups and parameters are matched by name.

        Raises:
            ValueError: If a group, or a parameter of a group, is missing or unexpected. Nothing is
                changed then.
        """
        state = dict(state_dict)
        for prepare in self._optimizer_load_state_dict_pre_hooks.values():
            state = prepare(self, state) or state
        groups = states_of_groups(self.param_groups, state)
        labels = [self._label_of(group) for group, _ in groups]
        for label, part in self.parts.items():
            own = [pair for pair, of in zip(groups, labels, strict=True) if of == label]
            states = {key: value for _, of_group in own for key, value in of_group.items()}
            part.load_state_dict({"state": states, "param_groups": [group for group, _ in own]})
        for finish in self._optimizer_load_state_dict_post_hooks.values():
            finish(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "parts": self.parts}


def combine_optimizers(
    module: nn.Module,
    optimizers: Mapping[str, OptimizerFactory],
    *,
    groups: Sequence[ParameterGroup] | None = None,
    no_decay: str | Iterable[str] = (),
) -> CombinedOptimizer:
    """Returns a :class:`CombinedOptimizer`, with the same arguments.

    Example:
        >>> from functools import partial
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        >>> optimizer = combine_optimizers(
        ...     model,
        ...     {"0.weight": partial(torch.optim.Muon, lr=0.02), "*": torch.optim.AdamW},
        ... )
        >>> list(optimizer.parts)
        ['Muon', 'AdamW']
    """
    return CombinedOptimizer(module, optimizers, groups=groups, no_decay=no_decay)
