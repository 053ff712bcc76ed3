"""Per-layer values: norms of gradient and weights, update-to-weight ratio, fraction of zeros."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_bigopt.checks import shown
from lightning_bigopt.gradients.gradient_norms import GradientNorms
from lightning_bigopt.gradients.measure import norms_of
from lightning_bigopt.gradients.norm_kernels import accumulation_dtype, all_on_cpu, stored_values
from lightning_bigopt.gradients.sharding import (
    ShardGroups,
    reduce_norms,
    shard_groups,
    to_local,
)
from lightning_bigopt.monitoring.metric_buffer import MetricBuffer
from lightning_bigopt.monitoring.tags import tag_name
from lightning_bigopt.parameters import block_of, check_all_match, first_match

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LayerMonitor", "LayerValue", "Layers", "check_layers", "layer_names", "layer_values"]

Layers: TypeAlias = Literal["blocks", "parameters"] | Mapping[str, str] | None
LayerValue: TypeAlias = Literal["grad_norm", "weight_norm", "update_ratio", "zeros"]


def layer_names(names: Sequence[str], layers: Layers) -> list[str | None]:
    """Returns the layer of each parameter; None for a parameter that is not shown.

    Args:
        names: Names of the parameters.
        layers: ``"blocks"`` groups them by :func:`block_of`; ``"parameters"`` makes each parameter
            a separate layer; a mapping has names of layers as keys and patterns as values, and
            the first pattern that matches a parameter decides.

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


def check_layers(
    names: Sequence[str], layers: Layers, tied: Sequence[tuple[str, str]] = ()
) -> None:
    """Raises if a pattern matches none of a module's parameters.

    Args:
        names: Names of all parameters, including frozen ones and those of other optimizers.
        layers: As for :func:`layer_names`.
        tied: Other names of some of these parameters, each with the name in ``names``.

    Raises:
        ValueError: If a pattern matches no parameter.
    """
    if isinstance(layers, Mapping):
        check_all_match(tuple(names), tuple(layers.values()), tuple(tied))


def _over_shards(counts: Tensor, shards: Sequence[ShardGroups]) -> Tensor:
    """Sums each count over the processes that hold a shard of its tensor."""
    if not any(shards):
        return counts
    return torch.cat(reduce_norms(torch.split(counts, 1), shards, 1.0))


@dataclass(frozen=True, eq=False)
class _Grouping:
    """The layer of each measured tensor, as indices on the device of the norms.

    Args:
        names: Names of all measured tensors.
        labels: Names of the layers.
        members: Indices of the tensors that belong to a layer, int64 of shape ``(m,)``.
        layers: Index of the layer of each member, int64 of shape ``(m,)``.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    members: Tensor
    layers: Tensor

    @classmethod
    def of(cls, norms: GradientNorms, layers: Layers) -> _Grouping:
        assigned = layer_names(norms.names, layers)
        labels = tuple(dict.fromkeys(label for label in assigned if label is not None))
        number = {label: index for index, label in enumerate(labels)}
        members = [index for index, label in enumerate(assigned) if label is not None]
        device = norms.per_tensor.device
        which = _indices([number[assigned[i] or ""] for i in members], device)
        return cls(norms.names, labels, _indices(members, device), which)

    def sum(self, values: Tensor) -> Tensor:
        """Sums the values of the tensors of each layer: ``(tensors,)`` to ``(layers,)``."""
        wide = values.to(accumulation_dtype(values.device))
        empty = torch.zeros(len(self.labels), dtype=wide.dtype, device=wide.device)
        return empty.index_add_(0, self.layers, wide.index_select(0, self.members))

    def norm(self, norms: Tensor, order: float) -> Tensor:
        """Computes the norm of each layer from the norms of its tensors."""
        if order == math.inf:
            chosen = norms.index_select(0, self.members)
            return chosen.new_zeros(len(self.labels)).scatter_reduce_(
                0, self.layers, chosen, "amax"
            )
        if len(self.labels) == len(self.names):  # one tensor per layer, in the same order
            return norms
        return self.sum(norms.to(accumulation_dtype(norms.device)).pow(order)).pow(1.0 / order)


def _indices(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=device)  # an empty list would be float


class LayerMonitor:
    """Measures the layers of one optimizer before and after a logged update. Does not synchronize.

    Measuring the norm of the update needs the weights before it. They are copied at logged updates
    only, and the copy is freed after the update.

    Args:
        layers: Grouping of parameters into layers, as for :func:`layer_names`; None measures
            nothing.
        values: The values to measure.
        label: Name of the optimizer in tags; empty if there is only one.

    Raises:
        ValueError: If ``layers`` or ``values`` has an unknown value.
    """

    def __init__(self, layers: Layers, values: Sequence[LayerValue], *, label: str = "") -> None:
        known = get_args(LayerValue)
        given: Any = values
        is_list = isinstance(given, (list, tuple, set, frozenset))
        wrong = [value for value in given if not _is_among(value, known)] if is_list else [given]
        if wrong:
            raise ValueError(
                f"per_layer must be a list of {', '.join(map(repr, known))}, got "
                f"{shown(wrong[0])}; try ['grad_norm', 'update_ratio'], or None for all"
            )
        is_map = isinstance(layers, Mapping) and all(
            isinstance(text, str) for pair in layers.items() for text in pair
        )
        if not is_map and not _is_among(layers, ("blocks", "parameters", None)):
            raise ValueError(
                f"layers must be 'blocks', 'parameters', patterns by layer or None, got "
                f"{shown(layers)}; write patterns as {{'attention': '*.attn.*', 'mlp': '*.mlp.*'}}"
            )
        self.layers, self.values, self.label = layers, frozenset(values), label
        self._grouping: _Grouping | None = None
        self._norms: GradientNorms | None = None
        self._before: list[Tensor] = []
        self._weights = torch.empty(0)
        self._sizes: Tensor | None = None
        self._shapes: list[torch.Size] = []
        self._tags: dict[LayerValue, list[str]] = {}

    @torch.no_grad()
    def before_step(
        self,
        norms: GradientNorms,
        *,
        group: ProcessGroup | None,
        into: MetricBuffer,
        is_rejected: bool = False,
    ) -> None:
        """Measures gradients and weights, and copies the weights if update ratios are measured.

        Args:
            norms: Norms of the gradients before clipping.
            group: Process group over which plain parameters are flat shards (FSDP1), or None.
            into: Buffer that receives the values.
            is_rejected: Whether the update is rejected, so that its gradients may be None.
        """
        if self.layers is None or not norms.names:
            return
        if self._grouping is None or self._grouping.names != norms.names:
            self._grouping, self._sizes = _Grouping.of(norms, self.layers), None
            self._tags = {}
        shapes = [parameter.shape for parameter in norms.parameters]
        if shapes != self._shapes:  # a parameter was replaced, such as a resized embedding
            self._shapes, self._sizes = shapes, None
        grouping, self._norms = self._grouping, norms
        shards = _shards(norms, group)
        if "grad_norm" in self.values:
            found = grouping.norm(norms.per_tensor, norms.norm_type)
            into.add_vector(self._names("grad_norm"), found)
        if "zeros" in self.values and not is_rejected:
            into.add_vector(self._names("zeros"), self._zeros(norms, grouping, shards))
        if not self.values & {"weight_norm", "update_ratio"}:
            return
        locals_ = _local_weights(norms)
        self._weights = grouping.norm(norms_of(locals_, groups=shards), 2.0)
        if "weight_norm" in self.values:
            into.add_vector(self._names("weight_norm"), self._weights)
        if "update_ratio" in self.values and not self._before:
            # LBFGS evaluates its closure, and with it this method, several times in one update:
            # only the first evaluation precedes all changes of the weights.
            self._before = [torch.empty_like(part) for part in locals_]
            torch._foreach_copy_(self._before, locals_)

    def _zeros(
        self, norms: GradientNorms, grouping: _Grouping, shards: Sequence[ShardGroups]
    ) -> Tensor:
        """Computes the fraction of zero entries in the gradient of each layer.

        The reductions are collectives: a process without a shard of a parameter contributes zeros.
        """
        device = norms.per_tensor.device
        wide = accumulation_dtype(device)
        if self._sizes is None:
            sizes = [to_local(p.detach()).numel() for p in norms.parameters]
            each = torch.tensor(sizes, dtype=wide, device=device)
            self._sizes = grouping.sum(_over_shards(each, shards))
        none = torch.zeros(0, device=device)
        gradients = [none if p.grad is None else p.grad for p in norms.parameters]
        if not _are_plain(gradients):
            gradients = [to_local(stored_values(gradient)) for gradient in gradients]
        counts = _counts_of_nonzero(gradients, device).to(wide)
        filled = grouping.sum(_over_shards(counts, shards))
        return 1.0 - filled / self._sizes

    @torch.no_grad()
    def after_step(self, *, group: ProcessGroup | None, into: MetricBuffer) -> None:
        """Measures the norm of the change in the weights, relative to their norm before."""
        before, self._before = self._before, []
        norms = self._norms
        if not before or norms is None or self._grouping is None:
            return
        shards = _shards(norms, group)
        torch._foreach_sub_(before, _local_weights(norms))
        changes = self._grouping.norm(norms_of(before, groups=shards), 2.0)
        tiny = torch.finfo(torch.float32).tiny
        into.add_vector(self._names("update_ratio"), changes / self._weights.clamp(min=tiny))

    def end_batch(self, *, into: MetricBuffer) -> None:
        """Adds a ratio of zero if the optimizer's step was skipped."""
        if self._before:
            into.add_vector(self._names("update_ratio"), torch.zeros_like(self._weights))
        self._before, self._norms = [], None

    def update_ratio_quantiles(self, values: Mapping[str, float]) -> dict[str, float]:
        """Returns minimum, median and maximum of the update-to-weight ratios over the layers.

        Args:
            values: The measured values by tag; ratios that are not finite are left out.
        """
        tags = self._tags.get("update_ratio", ())
        ratios = [values[tag] for tag in tags if math.isfinite(values.get(tag, math.nan))]
        if not ratios:
            return {}
        quantiles = {"min": min(ratios), "median": median(ratios), "max": max(ratios)}
        return {tag_name("update_ratio", name, self.label): x for name, x in quantiles.items()}

    def _names(self, value: LayerValue) -> list[str]:
        assert self._grouping is not None  # measured before
        if value not in self._tags:
            labels = self._grouping.labels
            self._tags[value] = [tag_name(f"layers/{value}", name, self.label) for name in labels]
        return self._tags[value]


def layer_values(layers: Layers, values: Sequence[LayerValue] | None) -> tuple[LayerValue, ...]:
    """Checks the arguments of :class:`LayerMonitor`, and returns its values; all for None."""
    chosen = get_args(LayerValue) if values is None else values
    LayerMonitor(layers, chosen)
    return tuple(chosen)


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Returns whether all tensors are dense, and no shards."""
    return set(map(type, tensors)) <= {Tensor, nn.Parameter} and not any(
        tensor.is_sparse for tensor in tensors
    )


def _local_weights(norms: GradientNorms) -> list[Tensor]:
    """Returns the local parts of the parameters; use it without gradients."""
    if _are_plain(norms.parameters):
        return list(norms.parameters)
    return [to_local(p.detach()) for p in norms.parameters]


def _shards(norms: GradientNorms, group: ProcessGroup | None) -> list[ShardGroups]:
    if group is None and _are_plain(norms.parameters):
        return [()] * len(norms.parameters)
    return [shard_groups(p) or ((group,) if group else ()) for p in norms.parameters]


def _counts_of_nonzero(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns the number of entries of each tensor that are not zero, of shape ``(n,)``."""
    if all_on_cpu(tensors):  # reading a number on a CPU is cheaper than stacking tensors
        return torch.tensor([int(torch.count_nonzero(tensor)) for tensor in tensors])
    return torch.stack([torch.count_nonzero(tensor).to(device) for tensor in tensors])


def _is_among(value: object, choices: tuple[object, ...]) -> bool:
    # Not ``value in choices``: an array compares element by element.
    return (value is None and None in choices) or (isinstance(value, str) and value in choices)
