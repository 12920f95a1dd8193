"""Rows through their experts' matrices, against one product a row in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringcompile.ops import experts
from ringcompile.ops.experts import expert_linear, grouped_linear, sort_rows
from ringcompile.ops.kernels import grouped
from ringcompile.ops.schemas import op

EXACT = {"atol": 1e-12, "rtol": 1e-12}


def by_row(
    x: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    rows, chosen = x.reshape(-1, x.shape[-1]), expert.reshape(-1)
    out_width = weight.shape[2 if transposed else 1]
    out = torch.zeros(len(rows), out_width, dtype=torch.float64)
    for i, e in enumerate(chosen.tolist()):
        if e < len(weight):
            matrix = weight[e].double() if transposed else weight[e].double().T
            out[i] = (rows[i].double()[:, None] * matrix).sum(0)
            if bias is not None:
                out[i] += bias[e].double()
    return out.reshape(*x.shape[:-1], out_width)


@settings(max_examples=80, deadline=None)
@given(
    lead=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    num_experts=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    transposed=st.booleans(),
    with_bias=st.booleans(),
    call=st.sampled_from([expert_linear, partial(expert_linear, on_device=True)]),
    index=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 2**16),
)
def test_every_row_through_its_own_matrix(
    lead: list[int],
    num_experts: int,
    sizes: tuple[int, int],
    transposed: bool,
    with_bias: bool,
    call: Callable[..., Tensor],
    index: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    width, out_width = sizes
    x = torch.randn(*lead, width, dtype=torch.float64)
    expert = torch.randint(0, num_experts + 1, lead, dtype=index)  # the last: no expert
    shape = (width, out_width) if transposed else (out_width, width)
    weight = torch.randn(num_experts, *shape, dtype=torch.float64)
    bias = torch.randn(num_experts, out_width, dtype=torch.float64) if with_bias else None
    found = call(x, expert, weight, bias, transposed=transposed)
    expected = by_row(x, expert, weight, bias, transposed)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrower_dtypes(dtype: torch.dtype) -> None:
    x, weight, bias = (
        torch.randn(size).to(dtype) for size in ((9, 2, 16), (4, 8, 16), (4, 8))
    )
    expert = torch.randint(0, 4, (9, 2))
    found = expert_linear(x, expert, weight, bias)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        found.double(), by_row(x, expert, weight, bias, False), atol=32 * eps, rtol=4 * eps
    )


def test_expanded_rows() -> None:
    """A token's k copies, as the captured models have them."""
    x = torch.randn(5, 1, 6, dtype=torch.float64).expand(5, 3, 6)
    expert = torch.randint(0, 4, (5, 3))
    weight = torch.randn(4, 2, 6, dtype=torch.float64)
    found = expert_linear(x, expert, weight)
    torch.testing.assert_close(found, by_row(x, expert, weight, None, False), **EXACT)


def test_a_row_does_not_depend_on_the_others() -> None:
    """What makes a split over rows free: any part of the rows gives that part of the result."""
    x, weight, bias = (
        torch.randn(size, dtype=torch.float64) for size in ((12, 5), (3, 4, 5), (3, 4))
    )
    expert = torch.randint(0, 3, (12,))
    whole = expert_linear(x, expert, weight, bias)
    for start in range(0, 12, 4):
        rows = slice(start, start + 4)
        part = expert_linear(x[rows], expert[rows], weight, bias)
        torch.testing.assert_close(part, whole[rows], **EXACT)


def test_a_row_without_an_expert_is_zero() -> None:
    """One index past the last expert: how models let a token skip the experts."""
    x, weight, bias = torch.randn(4, 3), torch.randn(2, 5, 3), torch.randn(2, 5)
    out = expert_linear(x, torch.tensor([2, 0, 7, 1]), weight, bias)
    assert out[[0, 2]].count_nonzero() == 0
    assert out[[1, 3]].count_nonzero() == 10


def test_negative_indices_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="index -1 is out of bounds"):
        expert_linear(torch.randn(2, 3), torch.tensor([0, -1]), torch.randn(2, 5, 3))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_shape_without_data(transposed: bool) -> None:
    with torch._subclasses.FakeTensorMode():
        x, expert = torch.empty(7, 2, 3, dtype=torch.bfloat16), torch.zeros(7, 2, dtype=torch.int64)
        weight = torch.empty((4, 3, 5) if transposed else (4, 5, 3), dtype=torch.bfloat16)
        out = op("expert_linear")(x, expert, weight, transposed=transposed)
    assert (out.shape, out.dtype) == ((7, 2, 5), torch.bfloat16)


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out-by-in", "in-by-out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_grouped_product(
    dtype: torch.dtype, transposed: bool, with_bias: bool, index: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, through torch's own stand-in for CPUs: an expert without rows, rows without."""
    x = torch.randn(50, 16).to(dtype)
    expert = torch.randint(0, 6, (50,), dtype=index)
    expert[expert == 2] = 4
    weight = torch.randn(5, *((16, 24) if transposed else (24, 16))).to(dtype)
    bias = torch.randn(5, 24).to(dtype) if with_bias else None
    monkeypatch.setattr(grouped, "takes_torch", lambda rows, matrices: True)
    found = expert_linear(x, expert, weight, bias, transposed=transposed)
    expected = by_row(x, expert, weight, bias, transposed)
    assert (found[expert == 5] == 0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_rows_in_the_order_of_their_experts(index: torch.dtype) -> None:
    expert = torch.tensor([[2, 0], [5, 2], [0, 3]], dtype=index)
    order, place, ends = sort_rows(expert, num_experts=4)
    assert order.tolist() == [1, 4, 0, 3, 5, 2], "those of an expert as they came"
    assert place[order].tolist() == list(range(6))
    assert ends.tolist() == [2, 2, 4, 5], "the row without an expert is behind them"


def test_sorted_rows_one_product_an_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert without rows has none, and rows without an expert take part in none."""
    calls = []

    def linear(x: Tensor, *others: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.nn.functional.linear(x, *others)

    monkeypatch.setattr(experts, "functional", SimpleNamespace(linear=linear))
    x = torch.randn(7, 1, 3)
    out = grouped_linear(x, torch.tensor([2, 2, 5], dtype=torch.int32), torch.randn(3, 4, 3))
    assert out.shape == (7, 1, 4)
    assert calls == [2, 3]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_experts_on_a_gpu_never_wait_for_it(dtype: torch.dtype, with_bias: bool) -> None:
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("our kernel takes capability 8 and later")
    x, weight = torch.randn(300, 64), torch.randn(5, 128, 64)
    bias = torch.randn(5, 128) if with_bias else None
    expert = torch.randint(0, 6, (300,))
    parts = [None if t is None else t.cuda().to(dtype) for t in (x, weight, bias)]
    on_gpu = (parts[0], expert.cuda(), *parts[1:])
    expert_linear(*on_gpu)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = expert_linear(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rounded = [None if t is None else t.to(dtype) for t in (x, weight, bias)]
    expected = by_row(rounded[0], expert, *rounded[1:], False)
    torch.testing.assert_close(found.cpu().double(), expected, atol=0.2, rtol=2e-2)
