"""What is seen of each layer: norms of gradient, weights and update, and the share of zeros."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_bigopt.controllers.collected import Collected
from lightning_bigopt.gradients import GradientNorms, norms_of
from lightning_bigopt.gradients.kernels import wide_dtype
from lightning_bigopt.gradients.sharding import (
    ShardGroups,
    local_part,
    reduce_norms,
    shard_groups,
)
from lightning_bigopt.parameters import block_of, check_all_match, first_match
from lightning_bigopt.reporting.tags import tag_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LayerMonitor", "LayerValue", "Layers", "check_layers", "layer_names"]

Layers: TypeAlias = Literal["blocks", "parameters"] | Mapping[str, str] | None
LayerValue: TypeAlias = Literal["grad_norm", "weight_norm", "update_ratio", "zeros"]


def layer_names(names: Sequence[str], layers: Layers) -> list[str | None]:
    """The layer of each parameter; None for one that is not shown.

    Args:
        names: The parameters' names.
        layers: ``"blocks"`` by :func:`block_of`, ``"parameters"`` each alone, or a mapping from
            names of layers to patterns, of which the first that matches counts.

    Example:
        >>> layer_names(["a.0.w", "a.0.b", "head.w"], {"head": "head.*"})
        [None, None, 'head']
    """
    if layers is None:
        return [None] * len(names)
    if layers == "parameters":
        return list(names)
    if isinstance(layers, str):
        return [block_of(name) for name in names]
    labels = list(layers)
    matches = first_match(tuple(names), tuple(layers.values()))
    return [None if match is None else labels[match] for match in matches]


def check_layers(names: Sequence[str], layers: Layers) -> None:
    """Refuses patterns that match none of a module's parameters.

    One optimizer of several, and a module that is partly frozen, have fewer of them.

    Raises:
        ValueError: If a pattern matches no parameter.
    """
    if isinstance(layers, Mapping):
        check_all_match(tuple(names), tuple(layers.values()))


@dataclass(frozen=True, eq=False)
class _Grouping:
    """Which tensors make up which layer; the indices lie on the device of the norms."""

    names: tuple[str, ...]
    labels: tuple[str, ...]
    members: Tensor
    layers: Tensor

    @classmethod
    def of(cls, norms: GradientNorms, layers: Layers) -> _Grouping:
        found = layer_names(norms.names, layers)
        labels = tuple(dict.fromkeys(label for label in found if label is not None))
        number = {label: index for index, label in enumerate(labels)}
        members = [index for index, label in enumerate(found) if label is not None]
        device = norms.per_tensor.device
        which = _indices([number[found[i] or ""] for i in members], device)
        return cls(norms.names, labels, _indices(members, device), which)

    def sum(self, values: Tensor) -> Tensor:
        wide = values.to(wide_dtype(values.device))
        empty = torch.zeros(len(self.labels), dtype=wide.dtype, device=wide.device)
        return empty.index_add_(0, self.layers, wide.index_select(0, self.members))

    def norm(self, norms: Tensor, order: float) -> Tensor:
        """The norm of each layer from those of its tensors."""
        if order == math.inf:
            chosen = norms.index_select(0, self.members)
            return chosen.new_zeros(len(self.labels)).scatter_reduce_(
                0, self.layers, chosen, "amax"
            )
        if len(self.labels) == len(self.names):
            return norms
        return self.sum(norms.to(wide_dtype(norms.device)).pow(order)).pow(1.0 / order)


def _indices(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=device)  # of none too


class LayerMonitor:
    """Measures the layers of one optimizer around a logged update. Does not synchronize.

    The update's own size needs the weights before it: they are copied on logged updates only, and
    the copy is gone when the update has been measured.

    Args:
        layers: How parameters are put together.
        values: What is measured.
        label: The optimizer's name in tags, where there are several.
    """

    def __init__(self, layers: Layers, values: Sequence[LayerValue], *, label: str = "") -> None:
        known = get_args(LayerValue)
        wrong = [values] if isinstance(values, str) else [v for v in values if v not in known]
        if wrong:
            raise ValueError(
                f"per_layer must be a list of {', '.join(map(repr, known))}, got {wrong[0]!r}; try "
                "['grad_norm', 'update_ratio'], or None for all"
            )
        is_map = isinstance(layers, Mapping) and all(
            isinstance(text, str) for pair in layers.items() for text in pair
        )
        if layers not in ("blocks", "parameters", None) and not is_map:
            raise ValueError(
                f"layers must be 'blocks', 'parameters', patterns by layer or None, got {layers!r}"
                "; write patterns as {'attention': '*.attn.*', 'mlp': '*.mlp.*'}"
            )
        self.layers, self.values, self.label = layers, frozenset(values), label
        self._grouping: _Grouping | None = None
        self._norms: GradientNorms | None = None
        self._before: list[Tensor] = []
        self._weights = torch.empty(0)
        self._sizes: Tensor | None = None
        self._tags: dict[LayerValue, list[str]] = {}

    @torch.no_grad()
    def before_step(
        self,
        norms: GradientNorms,
        *,
        group: ProcessGroup | None,
        into: Collected,
        is_refused: bool = False,
    ) -> None:
        """Measures gradients and weights, and copies the weights where updates are wanted.

        Args:
            norms: Of the gradients before clipping.
            group: Over which plain parameters are flat shards (FSDP1).
            into: Takes the values.
            is_refused: Whether the update is refused, and its gradients may be gone.
        """
        if self.layers is None or not norms.names:
            return
        if self._grouping is None or self._grouping.names != norms.names:
            self._grouping, self._sizes = _Grouping.of(norms, self.layers), None
            self._tags = {}
        grouping, self._norms = self._grouping, norms
        shards = [shard_groups(p) or ((group,) if group else ()) for p in norms.parameters]
        if "grad_norm" in self.values:
            found = grouping.norm(norms.per_tensor, norms.norm_type)
            into.add_vector(self._names("grad_norm"), found)
        if "zeros" in self.values and not is_refused:
            into.add_vector(self._names("zeros"), self._zeros(norms, grouping, shards))
        if not self.values & {"weight_norm", "update_ratio"}:
            return
        locals_ = [local_part(p.detach()) for p in norms.parameters]
        self._weights = grouping.norm(norms_of(locals_, groups=shards), 2.0)
        if "weight_norm" in self.values:
            into.add_vector(self._names("weight_norm"), self._weights)
        if "update_ratio" in self.values:
            self._before = [torch.empty_like(part) for part in locals_]
            torch._foreach_copy_(self._before, locals_)

    def _zeros(
        self, norms: GradientNorms, grouping: _Grouping, shards: Sequence[ShardGroups]
    ) -> Tensor:
        """The share of zeros in each layer's gradient.

        A process that holds no part of a parameter has no gradient of it, and joins all the same.
        """
        device = norms.per_tensor.device
        wide = wide_dtype(device)
        if self._sizes is None:
            sizes = [local_part(p.detach()).numel() for p in norms.parameters]
            each = torch.split(torch.tensor(sizes, dtype=wide, device=device), 1)
            self._sizes = grouping.sum(torch.cat(reduce_norms(each, shards, 1.0)))
        counts = [
            torch.zeros(1, dtype=wide, device=device)
            if p.grad is None
            else torch.count_nonzero(local_part(p.grad)).reshape(1).to(device, wide)
            for p in norms.parameters
        ]
        filled = grouping.sum(torch.cat(reduce_norms(counts, shards, 1.0)))
        return 1.0 - filled / self._sizes

    @torch.no_grad()
    def after_step(self, *, group: ProcessGroup | None, into: Collected) -> None:
        """Measures what the update made of the weights."""
        before, self._before = self._before, []
        norms, self._norms = self._norms, None
        if not before or norms is None or self._grouping is None:
            return
        shards = [shard_groups(p) or ((group,) if group else ()) for p in norms.parameters]
        torch._foreach_sub_(before, [local_part(p.detach()) for p in norms.parameters])
        changes = self._grouping.norm(norms_of(before, groups=shards), 2.0)
        tiny = torch.finfo(torch.float32).tiny
        into.add_vector(self._names("update_ratio"), changes / self._weights.clamp(min=tiny))

    def _names(self, value: LayerValue) -> list[str]:
        assert self._grouping is not None  # measured before
        if value not in self._tags:
            labels = self._grouping.labels
            self._tags[value] = [tag_name(f"layers/{value}", name, self.label) for name in labels]
        return self._tags[value]
