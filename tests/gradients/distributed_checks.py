"""Checks that run on every process of a group and compare distributed with plain tensors."""

from __future__ import annotations

import logging
import math
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_bigopt.gradients import (
    AGC,
    AdaGC,
    Groups,
    MaxUpdateRatio,
    NormClip,
    PerParameterNormClip,
    UpdateClip,
    ValueClip,
    ZClip,
    clip_gradients_,
    measure,
    norms_of,
    skip_update_,
)
from lightning_bigopt.gradients.measure import check_norm_type

ORDERS = (1.0, 2.0, math.inf)
RULES = {
    "norm": NormClip(0.1),
    "norm, maximum": NormClip(0.01, norm_type=math.inf),
    "norm, sum": NormClip(0.1, norm_type=1.0),
    "per parameter": PerParameterNormClip(0.05),
    "value": ValueClip(0.003),
    "units": AGC(0.01),
    "z": ZClip(max_norm=0.1),
    "per parameter, adaptive": AdaGC(warmup=1, max_norm=0.1),
    "groups": Groups({"*.weight": NormClip(0.1), "*.bias": AGC(0.001)}),
}


def mlp():
    """Returns an MLP whose widths no process count divides: shards are uneven or empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def even_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def backward(model):
    model.zero_grad()
    torch.manual_seed(1)
    model(torch.randn(6, model[0].in_features)).pow(2).sum().backward()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(found, expected, *, rtol=1e-6, atol=1e-9, name=""):
    torch.testing.assert_close(
        full(found.detach()),
        expected.detach(),
        rtol=rtol,
        atol=atol,
        msg=lambda message: f"{name}: {message}",
    )


def compare(model, plain, fill=backward):
    """Compares norms and every rule on the distributed and the plain model."""
    for order in ORDERS:
        fill(model), fill(plain)
        found = measure(list(model.named_parameters()), norm_type=order)
        expected = measure(list(plain.named_parameters()), norm_type=order)
        assert_same(found.per_tensor, expected.per_tensor)
        assert_same(found.total, expected.total)
        assert found.finite
        assert found.names == expected.names
    for name, rule in RULES.items():
        states = rule.initial_state(), rule.initial_state()
        for _ in range(2):
            fill(model), fill(plain)
            # Tensor parallelism sums in another order: the difference is one rounding error.
            ulp = [1e-7 * norms_of([p.grad], math.inf).item() + 1e-9 for p in plain.parameters()]
            clip_gradients_(model, rule, state=states[0])
            clip_gradients_(plain, rule, state=states[1])
            for p, q, atol in zip(model.parameters(), plain.parameters(), ulp, strict=True):
                assert_same(p.grad, q.grad, rtol=1e-5, atol=atol, name=name)


def kinds(model):
    """Returns one parameter group for each kind of tensor: torch's kernels take one kind only."""
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    rest = [p for p in model.parameters() if not isinstance(p, DTensor)]
    return [{"params": params} for params in (sharded, rest) if params]


def compare_steps(model, plain, fill=backward):
    """Compares steps with fused clipping and with limits on updates, and checks skips."""
    for rule, options in (
        (NormClip(0.1), {"fused": True}),
        (UpdateClip(0.5), {"foreach": True}),
        (UpdateClip(0.5), {"fused": True}),
        (MaxUpdateRatio(0.001), {"foreach": True}),
    ):
        optimizers = [torch.optim.AdamW(kinds(m), lr=0.01, **options) for m in (model, plain)]
        for _ in range(3):
            for some, optimizer in zip((model, plain), optimizers, strict=True):
                fill(some)
                clip_gradients_(some, rule, optimizer=optimizer)
                optimizer.step()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert_same(p, q, rtol=1e-4)
        before = [full(p.detach()).clone() for p in model.parameters()]
        fill(model)
        skip_update_(optimizers[0])
        optimizers[0].step()
        optimizers[0].step(lambda o=optimizers[0]: (fill(model), skip_update_(o)))
        for p, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(full(p.detach()), old)
        for some, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.step(lambda some=some: fill(some))
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert_same(p, q, rtol=1e-4)


def sharded():
    model, plain = mlp(), mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    compare(model, plain)
    compare_steps(model, plain)


def plain_and_sharded():
    model, plain = mlp(), mlp()
    fully_shard(model[2], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    assert {isinstance(p, DTensor) for p in model.parameters()} == {True, False}
    compare(model, plain)
    compare_steps(model, plain)


def every_placement():
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(2)
    shapes = [(5, 6), (6, 5), (4, 4), (3,), (1, 7), (2, 3, 4), (), (0, 3), (8, 1)]
    placements = [
        Shard(0),
        Shard(1),
        Replicate(),
        Shard(0),
        Shard(0),
        Shard(2),
        Replicate(),
        Shard(0),
        Shard(1),
    ]
    weights, values = [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes]
    model, plain = nn.ParameterList(), nn.ParameterList()
    for weight, placement in zip(weights, placements, strict=True):
        model.append(nn.Parameter(distribute_tensor(weight, mesh, [placement])))
        plain.append(nn.Parameter(weight.clone()))

    def fill(module):
        for index, (p, g) in enumerate(zip(module, values, strict=True)):
            if not isinstance(p, DTensor):
                p.grad = g.clone()
            elif index == 2:  # a pending sum over processes
                p.grad = DTensor.from_local(g.clone() / world, mesh, [Partial()])
            else:
                p.grad = distribute_tensor(g, mesh, p.placements)

    rules = dict(RULES)
    RULES.pop("groups")  # their patterns name layers
    try:
        compare(model, plain, fill)
    finally:
        RULES.update(rules)


def flat_shards():
    """Checks the flat shards of FSDP1, some of them empty on a process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    values = [torch.randn(10), torch.randn(3), torch.randn(4)]
    replicated = torch.randn(5)
    named = []
    for index, value in enumerate(values):
        pieces = value.tensor_split(world) if index else [*[value[:0]] * (world - 1), value]
        parameter = nn.Parameter(torch.zeros_like(pieces[rank]))
        if pieces[rank].numel():
            parameter.grad = pieces[rank].clone()
        named.append((f"p{index}", parameter))
    own = nn.Parameter(torch.zeros(5))
    own.grad = replicated.clone()
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    for order in ORDERS:
        whole = norms_of([*values, replicated], check_norm_type(order))
        found = measure(
            [*named, ("own", own), ("frozen", frozen)],
            norm_type=order,
            process_group=dist.group.WORLD,
            is_sharded=lambda p: p is not own,
        )
        assert found.names == ("p0", "p1", "p2", "own")
        assert_same(found.per_tensor, whole.float())
        assert_same(found.total, torch.linalg.vector_norm(whole, order).float())
        all_sharded = measure(named, norm_type=order, process_group=dist.group.WORLD)
        assert_same(all_sharded.per_tensor, whole[:3].float())


def bad_numbers_on_one_process():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for order in ORDERS:
        for bad in (math.nan, math.inf, -math.inf):
            value = torch.ones(8)
            value[-1] = bad  # in the last shard only
            parameter = nn.Parameter(distribute_tensor(torch.zeros(8), mesh, [Shard(0)]))
            parameter.grad = distribute_tensor(value, mesh, [Shard(0)], src_data_rank=0)
            good = nn.Parameter(torch.zeros(2))
            good.grad = torch.ones(2)
            norms = measure([("bad", parameter), ("good", good)], norm_type=order)
            assert not norms.finite
            assert not norms.per_tensor[0].isfinite()
            assert norms.per_tensor[1].isfinite()


def large_numbers():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameter = nn.Parameter(distribute_tensor(torch.zeros(8), mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(torch.full((8,), 1e30), mesh, [Shard(0)])
    for order in ORDERS:
        norms = measure([("p", parameter)], norm_type=order)
        assert norms.finite
        assert_same(
            norms.total, torch.linalg.vector_norm(torch.full((8,), 1e30).double(), order).float()
        )


def one_collective_a_mesh():
    """Checks that there is one collective for any number of tensors."""
    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    backward(model)
    calls, original = [], dist.all_reduce
    dist.all_reduce = lambda *args, **options: (calls.append(1), original(*args, **options))[1]
    try:
        measure(list(model.named_parameters()))
    finally:
        dist.all_reduce = original
    assert len(calls) == 1, calls


def hybrid():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, plain = mlp(), mlp()
    fully_shard(model, mesh=mesh)
    compare(model, plain)
    compare_steps(model, plain)


def sharded_and_tensor_parallel():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model, plain = even_mlp(), even_mlp()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    assert len({p.placements for p in model.parameters()}) > 2
    compare(model, plain)
    compare_steps(model, plain)


CHECKS = {
    2: (
        sharded,
        plain_and_sharded,
        every_placement,
        flat_shards,
        bad_numbers_on_one_process,
        large_numbers,
        one_collective_a_mesh,
    ),
    4: (hybrid, sharded_and_tensor_parallel, flat_shards),
}


def run_all(rank, world, port):
    """Runs every check of a group's size on this process."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for check in CHECKS[world]:
        check()
    dist.destroy_process_group()
