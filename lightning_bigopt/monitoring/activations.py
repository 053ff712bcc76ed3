"""Sizes of the outputs of modules and of their gradients, measured by hooks in logged updates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_bigopt.checks import shown
from lightning_bigopt.gradients.norm_kernels import local_norms
from lightning_bigopt.gradients.sharding import to_local
from lightning_bigopt.monitoring.metric_buffer import MetricBuffer
from lightning_bigopt.monitoring.tags import tag_name
from lightning_bigopt.parameters import block_of, first_match, parameter_names, plain_name

__all__ = ["ActivationMonitor", "Activations", "check_activations", "chosen_modules"]

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

Activations: TypeAlias = Literal["blocks"] | Mapping[str, str] | None


def check_activations(activations: Activations) -> None:
    """Raises if the argument has an unknown value.

    Raises:
        ValueError: If it is neither ``"blocks"``, patterns by name nor None, or two labels have the
            same tag.
    """
    given: Any = activations
    is_map = isinstance(given, Mapping) and all(
        isinstance(text, str) for pair in given.items() for text in pair
    )
    if not is_map and given is not None and not (isinstance(given, str) and given == "blocks"):
        raise ValueError(
            f"activations must be 'blocks', patterns by name or None, got {shown(given)}; write "
            "patterns of modules as {'attention': '*.attn', 'mlp': '*.mlp'}"
        )
    tags: dict[str, str] = {}
    for label in activations if isinstance(activations, Mapping) else ():
        if not label.strip():
            raise ValueError(
                f"activations must have labels that are not empty, got {shown(label)}; write "
                "{'attention': '*.attn'}"
            )
        other = tags.setdefault(tag_name("", label), label)
        if other != label:
            raise ValueError(
                f"activations must have labels that give different tags, got {shown(other)} and "
                f"{shown(label)}; rename one of them"
            )


def chosen_modules(module: nn.Module, activations: Activations) -> list[tuple[str, nn.Module]]:
    """Returns pairs of label and module for the modules whose outputs are measured.

    Args:
        module: The module that contains them.
        activations: ``"blocks"`` chooses the modules whose names are blocks of parameters
            (:func:`~lightning_bigopt.parameters.block_of`); a mapping has labels as keys and
            patterns of names as values, and the first pattern that matches a module decides.

    Raises:
        ValueError: If a pattern matches no module.

    Example:
        >>> model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)]), "head": nn.ReLU()})
        >>> [label for label, _ in chosen_modules(model, "blocks")]
        ['blocks.0']
        >>> [label for label, _ in chosen_modules(model, {"last": "head"})]
        ['last']
    """
    if activations is None:
        return []
    # With all names of shared modules: a pattern may match any of them. Scripted modules accept no
    # hooks.
    named = [
        (plain_name(name), part)
        for name, part in module.named_modules(remove_duplicate=False)
        if name and not isinstance(part, torch.jit.ScriptModule)
    ]
    if isinstance(activations, str):
        blocks = set(map(block_of, parameter_names(module)))
        return _once([(name, part) for name, part in named if name in blocks])
    labels, patterns = list(activations), tuple(activations.values())
    matches = first_match(tuple(name for name, _ in named), patterns)
    for index, pattern in enumerate(patterns):
        if index not in matches:
            raise ValueError(
                "each pattern of activations must match a module that no earlier pattern matches, "
                f"got {pattern!r}; list it first, or use a name in named_modules(), such as "
                f"{named[-1][0] if named else 'head'!r}"
            )
    return _once(
        [
            (labels[match], part)
            for (_, part), match in zip(named, matches, strict=True)
            if match is not None
        ]
    )


def _once(pairs: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Returns the first pair of each module."""
    first = {id(part): (label, part) for label, part in reversed(pairs)}
    return list(first.values())[::-1]


class _Sizes:
    """Sums over the tensors of one label: squares, largest value, zeros. Keeps no tensor alive."""

    def __init__(self) -> None:
        self._norms: list[Tensor] = []
        self._largest: list[Tensor] = []
        self._filled: list[Tensor] = []
        self._elements = 0

    @torch.no_grad()
    def add(self, tensor: Tensor, scale: Tensor | float = 1.0) -> None:
        """Adds a tensor, divided by a scale. Does not synchronize with a GPU."""
        values = to_local(tensor.detach())
        if not values.numel():
            return
        self._norms.append(local_norms([values], 2.0) / scale)
        self._largest.append(local_norms([values], math.inf) / scale)
        self._filled.append(torch.count_nonzero(values).reshape(1))
        self._elements += values.numel()

    def values(self) -> dict[str, Tensor]:
        """Returns root mean square, maximum and fraction of zeros, each of shape ``(1,)``."""
        if not self._elements:
            return {}
        norm = torch.linalg.vector_norm(torch.cat(self._norms), keepdim=True)
        return {
            "rms": norm / math.sqrt(self._elements),
            "max": torch.cat(self._largest).max().reshape(1),
            "zeros": 1.0 - torch.cat(self._filled).sum().reshape(1) / self._elements,
        }


class _OutputHook:
    """The forward hook of a module. A copy, as in a copy of the module, does nothing."""

    def __init__(self, monitor: ActivationMonitor, label: str) -> None:
        self._monitor: ActivationMonitor | None = monitor
        self._label = label

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._monitor is not None:
            self._monitor.measure(self._label, output)

    def __getstate__(self) -> dict[str, Any]:
        return {"_monitor": None, "_label": self._label}


def _no_scale() -> float:
    return 1.0


class ActivationMonitor:
    """Measures outputs and their gradients between :meth:`attach` and :meth:`detach`.

    Outside of this time the modules have no hooks. The first floating-point tensor in the output of
    a module is measured; outputs may be nested tuples, lists, mappings and dataclasses. All calls
    are combined, except those in a backward pass, in which activation checkpointing repeats them.
    Modules inside a compiled function are not measured.

    Args:
        activations: The modules, as for :func:`chosen_modules`.
        loss_scale: Returns the factor by which a GradScaler multiplies the loss, during backward.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> nn.init.eye_(model[0].weight).shape
        torch.Size([2, 2])
        >>> monitor = ActivationMonitor({"linear": "0"})
        >>> monitor.start(model)
        >>> monitor.attach()
        >>> model(torch.tensor([[3.0, -4.0]])).sum().backward()
        >>> monitor.detach()
        >>> values = MetricBuffer()
        >>> monitor.add_values(into=values)
        True
        >>> found = values.fetch()
        >>> found["activations/max/linear"], found["activations/grad_zeros/linear"]
        (4.0, 0.5)
    """

    def __init__(
        self, activations: Activations, loss_scale: Callable[[], Tensor | float] = _no_scale
    ) -> None:
        self._activations, self._loss_scale = activations, loss_scale
        self._modules: list[tuple[str, nn.Module]] = []
        self._handles: list[RemovableHandle] = []
        self._measures = self._was_attached = self._has_reported = False
        self._outputs: dict[str, _Sizes] = {}
        self._gradients: dict[str, _Sizes] = {}

    def start(self, module: nn.Module) -> None:
        """Chooses the modules.

        Raises:
            ValueError: If a pattern matches no module.
        """
        self._modules = chosen_modules(module, self._activations)

    def attach(self) -> None:
        """Adds the hooks, and clears what was measured before."""
        self.detach()
        self._outputs, self._gradients = {}, {}
        self._measures = self._was_attached = True
        for label, module in self._modules:
            self._handles.append(module.register_forward_hook(_OutputHook(self, label)))

    def detach(self) -> None:
        """Removes the hooks, also those of tensors: a parameter may be an output, and stays."""
        self._measures = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def pause(self) -> None:
        """Ignores calls, as during a validation, until :meth:`resume` or :meth:`attach`."""
        self._measures = False

    def resume(self) -> None:
        """Continues after :meth:`pause`, if the hooks are still there."""
        self._measures = bool(self._handles)

    def measure(self, label: str, output: Any) -> None:
        """Measures an output of a module, and its gradient later; called by the hooks."""
        if torch.compiler.is_compiling() or not self._measures:
            return
        tensor = _first_floating(output)
        if tensor is None:
            return
        # Checkpointing repeats the forward pass within the backward pass, and with
        # use_reentrant=True only the repeated output has a gradient.
        if torch._C._current_graph_task_id() == -1:  # noqa: SLF001
            self._outputs.setdefault(label, _Sizes()).add(tensor)
        if tensor.requires_grad:
            handle = tensor.register_hook(partial(self._measure_gradient, label))  # type: ignore[no-untyped-call]
            self._handles.append(handle)

    def _measure_gradient(self, label: str, gradient: Tensor) -> None:
        if _is_measurable(gradient):
            self._gradients.setdefault(label, _Sizes()).add(gradient, self._loss_scale())

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles must not contain the Trainer and the module.
        return vars(ActivationMonitor(self._activations))

    def add_values(self, *, into: MetricBuffer) -> bool:
        """Adds what was measured to a buffer, and clears it. Does not synchronize.

        Returns:
            Whether an output was measured.
        """
        self._report_missing()
        for prefix, sizes in (("", self._outputs), ("grad_", self._gradients)):
            for label, size in sizes.items():
                for name, value in size.values().items():
                    into.add(tag_name(f"activations/{prefix}{name}", label), value)
        found = bool(self._outputs)
        self._outputs, self._gradients, self._was_attached = {}, {}, False
        return found

    def _report_missing(self) -> None:
        """Logs once which modules have no values in a window with hooks."""
        if self._has_reported or not self._was_attached:
            return
        labels = dict.fromkeys(label for label, _ in self._modules)
        missing = [label for label in labels if label not in self._outputs]
        if missing:
            self._has_reported = True
            rank_zero_info(
                f"OptimizationMonitor(activations=) has no values of {', '.join(missing)}: these "
                "modules are compiled, never called (such as a ModuleList), or have no dense "
                "floating-point output. Write torch.compile(block) instead of block.compile(), or "
                "name other modules."
            )


def _is_measurable(tensor: Tensor) -> bool:
    """Returns whether a tensor has floating-point numbers that can be read now."""
    is_dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
    # A tensor of torch.func stands for several ones, or for one with a derivative.
    is_plain = not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # noqa: SLF001
    return is_dense and is_plain and tensor.dtype in _DTYPES


def _first_floating(output: Any) -> Tensor | None:
    """Returns the first floating-point tensor in an output; None without one."""
    if isinstance(output, Tensor):
        return output if _is_measurable(output) else None
    if isinstance(output, Mapping):
        parts: Any = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = (getattr(output, field.name) for field in dataclasses.fields(output))
    else:
        return None
    return next((found for part in parts if (found := _first_floating(part)) is not None), None)
