"""Private names of torch: gradient scaler, optimizers, schedulers, layers and tensors."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, LambdaLR, SequentialLR

from tests.lightning_contract.private_names import asserts


def weight_with_gradient(value: float = 1.0) -> nn.Parameter:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), value)
    return weight


# ------------------------------------------------------------------------------------- scaler


@asserts("_per_optimizer_states")
@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
def test_a_scaler_keeps_whether_unscaling_found_an_overflow(value: float) -> None:
    """StepGuard leaves an overflow to the scaler, and reads its flag in its single transfer."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = weight_with_gradient(value)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    (flag,) = found.values()
    assert flag.numel() == 1
    assert bool(flag > 0) is (value != 1.0)


@asserts("_scale")
def test_a_scalers_scale_is_a_tensor_once_it_has_scaled() -> None:
    """A loss is unscaled on its device: ``get_scale`` would synchronize on every micro-batch."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    assert scaler._scale is None
    assert scaler.scale(torch.ones(())).item() == 4.0
    assert isinstance(scaler._scale, torch.Tensor)
    assert float(scaler._scale) == scaler.get_scale() == 4.0


# --------------------------------------------------------------------------------- optimizers


@asserts("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
def test_an_optimizer_keeps_the_hooks_of_load_state_dict_by_id() -> None:
    """A combined optimizer loads the states of its parts itself, and runs its own hooks."""
    optimizer = torch.optim.SGD([weight_with_gradient()], lr=0.1)
    before = optimizer.register_load_state_dict_pre_hook(lambda *_: None)
    after = optimizer.register_load_state_dict_post_hook(lambda *_: None)
    assert list(optimizer._optimizer_load_state_dict_pre_hooks) == [before.id]
    assert list(optimizer._optimizer_load_state_dict_post_hooks) == [after.id]


@asserts("_muon", "_zeropower_via_newtonschulz", "_adjust_lr")
def test_the_update_of_muon_is_made_of_two_functions() -> None:
    """Muon of this package gathers the shards of a matrix between the two."""
    from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Muon([weight], lr=0.1, momentum=0.0)
    optimizer.step()
    group = optimizer.param_groups[0]
    settings = (group["ns_coefficients"], group["ns_steps"], group["eps"])
    expected = torch.zeros(2, 3).add_(
        _zeropower_via_newtonschulz(weight.grad, *settings),
        alpha=-_adjust_lr(0.1, group["adjust_lr_fn"], weight.shape),
    )
    assert torch.equal(weight.detach(), expected)
    assert _adjust_lr(0.1, "match_rms_adamw", weight.shape) == pytest.approx(0.1 * 0.2 * 3**0.5)


@asserts("_hooks")
def test_the_names_of_all_hooks_of_an_optimizer_end_alike() -> None:
    """A snapshot of an optimizer neither saves nor removes hooks; their names have this end."""
    optimizer = torch.optim.SGD([weight_with_gradient()], lr=0.1)
    registers = [name for name in dir(optimizer) if re.fullmatch(r"register_.*_hook", name)]
    assert len(registers) >= 4
    for register in registers:
        before = {name: len(hooks) for name, hooks in vars(optimizer).items() if "hooks" in name}
        getattr(optimizer, register)(lambda *_: None)
        after = {name: len(hooks) for name, hooks in vars(optimizer).items() if "hooks" in name}
        (changed,) = (name for name in after if after[name] != before[name])
        assert changed.endswith("_hooks")


@asserts("_step_supports_amp_scaling")
def test_a_fused_optimizer_declares_that_it_scales_in_its_kernel() -> None:
    """Clipping in the kernel: such an optimizer reads ``grad_scale`` and ``found_inf``.

    torch's GradScaler and Lightning's MixedPrecision ask for the same name, and leave unscaling to
    the optimizer where it is set.
    """
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad):
        weight = weight_with_gradient()
        fused: Any = kind([weight], lr=0.5, fused=True)  # type: ignore[call-arg]
        assert fused._step_supports_amp_scaling is True, kind
        plain = kind([nn.Parameter(torch.ones(2))], lr=0.5)
        assert not getattr(plain, "_step_supports_amp_scaling", False)
    weight = weight_with_gradient(8.0)
    optimizer: Any = torch.optim.SGD([weight], lr=0.5, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.zeros(())
    optimizer.step()
    assert weight.tolist() == [0.5, 0.5]
    assert weight.grad is not None
    assert weight.grad.tolist() == [1.0, 1.0]  # the kernel writes what it has used
    weight.grad = torch.full((2,), float("inf"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert weight.tolist() == [0.5, 0.5]


@asserts("_wrapped_by_lr_sched", "_opt_called")
def test_a_scheduler_watches_the_steps_of_its_optimizer() -> None:
    """A skipped step must not cause a warning of the user's scheduler about the order of calls."""
    optimizer: Any = torch.optim.SGD([weight_with_gradient()], lr=0.1)
    assert not hasattr(optimizer.step, "_wrapped_by_lr_sched")
    scheduler = LambdaLR(optimizer, lambda _: 1.0)
    assert optimizer.step._wrapped_by_lr_sched
    assert not getattr(optimizer, "_opt_called", False)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    optimizer = torch.optim.SGD([weight_with_gradient()], lr=0.1)
    scheduler = LambdaLR(optimizer, lambda _: 1.0)
    optimizer._opt_called = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    optimizer.step()
    assert optimizer._opt_called is True


@asserts("_schedulers")
def test_a_composed_scheduler_lists_its_parts() -> None:
    """A range test sets the new base of the user's SequentialLR or ChainedScheduler."""
    optimizer = torch.optim.SGD([weight_with_gradient()], lr=0.1)
    parts = [ConstantLR(optimizer), LambdaLR(optimizer, lambda _: 1.0)]
    assert list(SequentialLR(optimizer, parts, milestones=[2])._schedulers) == parts
    assert list(ChainedScheduler(parts, optimizer)._schedulers) == parts
    assert not hasattr(parts[0], "_schedulers")


# -------------------------------------------------------------------------- layers and tensors


@asserts("_buffers")
def test_a_module_has_a_dictionary_of_its_buffers() -> None:
    """StepGuard restores a buffer that the forward pass has replaced by another tensor."""
    layer = nn.BatchNorm1d(2)
    mean = layer.running_mean
    assert list(layer._buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    layer.running_mean = torch.ones(2)
    layer._buffers["running_mean"] = mean
    assert layer.running_mean is mean
    assert nn.LazyBatchNorm1d()._buffers.keys() == layer._buffers.keys()


@asserts("_version")
def test_a_tensor_counts_its_changes_in_place() -> None:
    """Shows weights that move before an evaluation, and gradients that change after clipping."""
    weight = weight_with_gradient()
    before = weight._version
    weight.sum().backward()
    assert weight._version == before
    with torch.no_grad():
        weight.add_(1.0)
    assert weight._version > before
    gradient = weight.grad
    assert gradient is not None
    for change in (
        lambda: torch._foreach_mul_([gradient], 2.0),
        lambda: weight.sum().backward(),
        gradient.zero_,
    ):
        before = gradient._version
        change()
        assert gradient is weight.grad
        assert gradient._version > before
    before = gradient._version
    assert gradient.norm().isfinite()
    assert gradient._version == before


def tensors(*values: float) -> list[torch.Tensor]:
    return [torch.full((2, 2), value) for value in values]


@asserts(
    "_foreach_norm",
    "_foreach_div",
    "_foreach_sub",
    "_foreach_add_",
    "_foreach_sub_",
    "_foreach_mul_",
    "_foreach_copy_",
    "_foreach_lerp_",
    "_foreach_sqrt_",
    "_foreach_reciprocal_",
    "_foreach_clamp_min_",
    "_foreach_clamp_max_",
)
def test_one_call_for_many_tensors() -> None:
    """Norms, clipping and layer statistics use one multi-tensor kernel instead of a loop."""
    norms = torch._foreach_norm(tensors(1.0, 2.0), 2, dtype=torch.float64)
    assert [(n.dtype, n.item()) for n in norms] == [(torch.float64, 2.0), (torch.float64, 4.0)]
    assert [n.item() for n in torch._foreach_norm(tensors(1.0, -3.0), float("inf"))] == [1.0, 3.0]
    assert equal(torch._foreach_div(tensors(2.0, 9.0), [2.0, 3.0]), tensors(1.0, 3.0))
    on_device = [torch.tensor(2.0), torch.tensor(3.0)]
    assert equal(torch._foreach_div(tensors(2.0, 9.0), on_device), tensors(1.0, 3.0))
    assert equal(torch._foreach_sub(tensors(2.0, 9.0), tensors(1.0, 3.0)), tensors(1.0, 6.0))
    changed = tensors(2.0, 9.0)
    torch._foreach_add_(changed, tensors(1.0, 1.0))
    assert equal(changed, tensors(3.0, 10.0))
    torch._foreach_sub_(changed, tensors(1.0, 1.0))
    torch._foreach_mul_(changed, torch.tensor(2.0))  # one factor for all, on the device
    assert equal(changed, tensors(4.0, 18.0))
    torch._foreach_mul_(changed, [torch.tensor(0.25), torch.tensor(0.5)])  # or one for each
    assert equal(changed, tensors(1.0, 9.0))
    torch._foreach_lerp_(changed, tensors(3.0, 13.0), 0.5)
    assert equal(changed, tensors(2.0, 11.0))
    torch._foreach_lerp_(changed, tensors(1.0, 9.0), 1.0)  # exact at the end
    assert equal(changed, tensors(1.0, 9.0))
    torch._foreach_sqrt_(changed)
    torch._foreach_copy_(kept := tensors(0.0, 0.0), changed)
    torch._foreach_reciprocal_(changed)
    assert equal(kept, tensors(1.0, 3.0))
    torch._foreach_clamp_min_(kept, 2.0)
    assert equal(kept, tensors(2.0, 3.0))
    torch._foreach_clamp_min_(kept, [2.5, 1.0])
    torch._foreach_clamp_max_(kept, 2.75)
    assert equal(kept, tensors(2.5, 2.75))


@asserts("_BatchNorm")
@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)],
    ids=lambda layer: type(layer).__name__,
)
def test_every_batch_normalization_has_one_base_class(layer: nn.Module) -> None:
    """Micro-batches of one sample raise before the first update for all of these, lazy ones too."""
    from torch.nn.modules.batchnorm import _BatchNorm

    assert isinstance(layer, _BatchNorm)
    assert isinstance(nn.LazyBatchNorm1d(), _BatchNorm)
    assert not isinstance(nn.InstanceNorm1d(2), _BatchNorm)


def equal(found: Any, expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------- processes


@asserts("_get_default_store")
def test_a_process_group_has_a_store_that_can_be_read_without_waiting() -> None:
    """Processes compare their callbacks through it: a collective waits for one that has none."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        store = distributed.distributed_c10d._get_default_store()
        store.set("key", "text")
        assert (store.check(["key"]), store.check(["key", "other"])) == (True, False)
        assert store.get("key") == b"text"
        store.delete_key("key")
        assert not store.check(["key"])
    finally:
        distributed.destroy_process_group()


@asserts("_C", "_current_graph_task_id")
def test_a_backward_pass_has_a_number() -> None:
    """A forward pass within a backward pass is one that activation checkpointing repeats."""
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(torch._C._current_graph_task_id()))
    assert torch._C._current_graph_task_id() == -1
    y.sum().backward()
    assert seen[0] >= 0
    assert torch._C._current_graph_task_id() == -1


@asserts("_functorch")
def test_tensors_within_torch_func_are_recognized() -> None:
    """They stand for several tensors, or for one with a derivative, and many kernels fail."""
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch._C._functorch.is_functorch_wrapped_tensor(x))
        return x.sum()

    function(torch.ones(2))
    torch.func.vmap(function)(torch.ones(3, 2))
    torch.func.grad(function)(torch.ones(2))
    assert seen == [False, True, True]
