"""Gradient norms, compared with float64 and with torch."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_bigopt.gradients import measure, norms_of
from tests.gradients.helpers import as_device_norms
from tests.oracles import gradients as oracle

ORDERS = (1.0, 2.0, math.inf)
SHAPES = (
    (),
    (5,),
    (0,),
    (3, 4, 2, 2),
    (2, 0, 3),
    (300, 300),
    (70_001,),
    (8, 8),
    (8, 8),
    (8, 8),
    (8, 8),
)


def named(*gradients, dtype=torch.float32):
    parameters = []
    for index, gradient in enumerate(gradients):
        parameter = nn.Parameter(
            torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)
        )
        parameter.grad = gradient
        parameters.append((f"p{index}", parameter))
    return parameters


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_norm_equals_float64_for_every_shape(order, dtype):
    gradients = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    norms = measure(named(*gradients), norm_type=order)
    truth = torch.tensor([oracle.norm([g], order) for g in gradients])
    torch.testing.assert_close(norms.per_tensor, truth, rtol=1e-6, atol=0)
    assert norms.value == pytest.approx(oracle.norm(gradients, order), rel=1e-6)
    assert norms.per_tensor.dtype == norms.total.dtype == torch.float32
    assert norms.finite.dtype == torch.bool
    assert norms.finite
    assert norms.names == tuple(f"p{i}" for i in range(len(SHAPES)))


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=8),
    st.sampled_from(ORDERS),
    st.randoms(use_true_random=False),
)
def test_norm_equals_torch_for_random_shapes(shapes, order, random):
    generator = torch.Generator().manual_seed(random.getrandbits(30))
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    total = measure(named(*gradients), norm_type=order).total
    filled = [g for g in gradients if g.numel()]
    expected = torch.nn.utils.get_total_norm(filled, order) if filled else torch.tensor(0.0)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [4, 5000, 40_000, 40_001])
@pytest.mark.parametrize("scale", [1e25, 1e30, 3e38])
def test_norm_of_large_numbers_is_finite(order, size, scale):
    gradient = torch.full((size,), scale)
    norms = measure(named(gradient, *[gradient[:4]] * 5), norm_type=order)
    truth = oracle.norm([gradient, *[gradient[:4]] * 5], order)
    assert norms.finite
    if truth < torch.finfo(torch.float32).max:
        assert norms.value == pytest.approx(truth, rel=1e-6)
    else:
        assert norms.value == math.inf


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_total_that_overflows_float32_is_infinite(order):
    parameters = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.full((1,), 1.5e308, dtype=torch.float64)
    norms = measure([(str(i), p) for i, p in enumerate(parameters)], norm_type=order)
    assert norms.value == math.inf  # in float32


def test_float64_gradients_beyond_float32_are_finite():
    norms = measure(named(torch.full((3,), 1e200, dtype=torch.float64)))
    assert norms.finite
    assert norms.value == math.inf


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [3, 5000, 40_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_non_finite_entry_is_found(order, bad, size, dtype):
    gradient = torch.ones(size, dtype=dtype)
    gradient[size // 2] = bad
    norms = measure(named(torch.ones(2), gradient), norm_type=order)
    assert not norms.finite
    assert not math.isfinite(norms.value)
    assert norms.per_tensor[0].isfinite()
    assert not norms.per_tensor[1].isfinite()


@pytest.mark.slow
def test_norm_of_a_large_tensor_of_equal_numbers_is_exact():
    # A plain float32 sum is wrong by 0.3 %.
    gradient = torch.full((25_000_000,), 0.1)
    assert measure(named(gradient)).value == pytest.approx(oracle.norm([gradient]), rel=1e-6)


def test_low_precision_is_summed_in_float32():
    gradient = torch.randn(100_000).bfloat16()
    assert measure(named(gradient)).value == pytest.approx(oracle.norm([gradient]), rel=1e-6)


def test_tied_weights_count_once_and_missing_gradients_do_not_count():
    tied, without = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    tied.grad = torch.tensor([3.0, 4.0])
    norms = measure([("a", tied), ("without", without), ("b", tied)])
    assert norms.names == ("a",)
    assert norms.value == 5.0


@pytest.mark.parametrize("order", ORDERS)
def test_no_gradients_have_norm_zero(order):
    norms = measure([("p", nn.Parameter(torch.zeros(2)))], norm_type=order)
    assert (norms.names, norms.value, norms.per_tensor.shape) == ((), 0.0, (0,))
    assert norms.finite


def test_complex_and_non_contiguous_gradients():
    gradients = [
        torch.randn(4, 5, dtype=torch.complex64),
        torch.randn(300, 200).t(),
        torch.randn(9, 8)[::2, 1::3],
    ]
    for order in ORDERS:
        truth = [oracle.norm([g.abs()], order) for g in gradients]
        found = measure(named(*gradients), norm_type=order).per_tensor
        torch.testing.assert_close(found, torch.tensor(truth), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "rows"), [(1, 50), (9, 50), (1, 40_000)])
def test_norm_of_sparse_gradients_is_that_of_dense_ones(order, dtype, count, rows):
    """With repeated positions, whose values are added up, and with none."""
    weights = {}
    for sparse in (True, False):
        torch.manual_seed(0)
        layers = [nn.Embedding(rows, 4, sparse=sparse, dtype=dtype) for _ in range(count)]
        other = nn.Linear(4, 2, dtype=dtype)
        indices = torch.randint(rows, (2, 30)).repeat(1, 2)
        loss = sum((other(layer(indices)) ** 2).sum() for layer in layers)
        (loss + layers[0](indices[:, :0]).sum()).backward()
        weights[sparse] = named(*[p.grad for layer in (*layers, other) for p in layer.parameters()])
    found, truth = (measure(weights[sparse], norm_type=order) for sparse in (True, False))
    assert weights[True][0][1].grad.is_sparse
    rtol = 1e-5 if dtype == torch.float32 else 2e-2  # the sums are rounded in another order
    torch.testing.assert_close(found.per_tensor, truth.per_tensor, rtol=rtol, atol=0)
    assert found.value == pytest.approx(truth.value, rel=rtol)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_other_layout_raises_with_its_name():
    weight = nn.Parameter(torch.ones(2, 2).to_sparse_csr())
    weight.grad = torch.ones(2, 2).to_sparse_csr()
    with pytest.raises(ValueError, match=r"gradient of w must be dense.*sparse_csr"):
        measure([("w", weight)])


@pytest.mark.parametrize("order", [0.0, 3.0, -1.0, math.nan])
def test_other_orders_raise(order):
    with pytest.raises(ValueError, match="norm_type must be 1, 2 or inf, got"):
        measure([], norm_type=order)


@pytest.mark.parametrize("order", ORDERS)
def test_selection_has_its_own_total(order):
    gradients = [torch.randn(3), torch.randn(4), torch.full((2,), math.nan)]
    norms = measure(named(*gradients), norm_type=order)
    part = norms.select([1, 0])
    assert part.names == ("p1", "p0")
    assert part.value == pytest.approx(oracle.norm(gradients[:2], order), rel=1e-6)
    assert part.finite
    assert not norms.select([2]).finite
    assert norms.select([]).value == 0.0


def test_total_is_read_from_the_device_once():
    total = Mock(spec=torch.Tensor)
    total.item.return_value = 3.0
    norms = as_device_norms(measure(named(torch.ones(1))), total=total)
    assert [norms.value, norms.value] == [3.0, 3.0]
    total.item.assert_called_once_with()


def test_gradients_are_not_changed():
    gradient = torch.randn(50_000)
    before = gradient.clone()
    measure(named(gradient), norm_type=math.inf)
    assert torch.equal(gradient, before)


def test_norms_of_any_tensors():
    assert norms_of([torch.ones(4), torch.tensor(-3.0)]).tolist() == [2.0, 3.0]
    assert norms_of([]).shape == (0,)


@pytest.mark.parametrize("order", ORDERS)
def test_value_equals_the_total_in_both_representations(order):
    norms = measure(named(torch.randn(7), torch.randn(300, 300)), norm_type=order)
    assert norms.is_on_host
    elsewhere = as_device_norms(norms)
    assert not elsewhere.is_on_host
    assert norms.value == norms.total.item() == elsewhere.value


@pytest.mark.parametrize("order", ORDERS)
def test_both_representations_have_the_same_values(order):
    on_host = measure(named(torch.randn(7), torch.randn(300, 300), torch.randn(3)), norm_type=order)
    on_device = as_device_norms(on_host)
    selections = [pair.select([2, 0]) for pair in (on_host, on_device)]
    scaled = [pair.scaled(0.25) for pair in (on_host, on_device)]
    for one, other in ((on_host, on_device), selections, scaled):
        assert one.names == other.names
        assert one.parameters == other.parameters
        assert one.norm_type == other.norm_type
        torch.testing.assert_close(one.per_tensor, other.per_tensor, rtol=1e-7, atol=0)
        torch.testing.assert_close(one.total, other.total, rtol=1e-7, atol=0)
        assert one.finite.item() == other.finite.item()
        assert one.value == pytest.approx(other.value, rel=1e-7)
        one.take_value(5.0), other.take_value(5.0)
        assert one.value == other.value == 5.0
