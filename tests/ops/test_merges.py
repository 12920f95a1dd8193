"""Blocks that are merged, or folded in one after another, are the attention of the whole."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ringcompile.ops.kernels import attend, attend_merge, merge
from tests.ops.contract import (
    BF16,
    FP16,
    FP32,
    FP64,
    INF,
    Case,
    accumulator,
    check_merged,
    reference,
    transposed,
)
from tests.ops.kernel_cases import (
    CASES,
    KERNELS,
    every_kernel,
    zeros,
)

Blocks = list[tuple[Tensor, Tensor]]


def blocks_of(q: Tensor, k: Tensor, v: Tensor, num_blocks: int, provider: str) -> Blocks:
    """Attention over each block of keys; tensor_split makes uneven ones."""
    pairs = zip(k.tensor_split(num_blocks, 2), v.tensor_split(num_blocks, 2), strict=True)
    return [attend(q, *pair, scale=0.125, provider=provider) for pair in pairs]


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 47, 50], ids="{}-blocks".format)
@every_kernel
def test_merged_blocks_are_the_whole(provider: str, dtype: torch.dtype, num_blocks: int) -> None:
    if num_blocks >= 47 and KERNELS[provider].min_rows > 1:
        pytest.skip("it takes no block of one key")
    q, k, v = CASES["grouped"].tensors(dtype, KERNELS[provider].device)
    out, lse = accumulator(q, v)
    # Last block first: the order in which a ring delivers is not the order of the keys. With 50
    # blocks of 47 keys, three are empty.
    for block in reversed(blocks_of(q, k, v, num_blocks, provider)):
        merge(out, lse, *block)
    check_merged(out, lse, reference(q, k, v, 0.125), dtype)


@pytest.mark.parametrize("num_blocks", [1, 3, 50], ids="{}-blocks".format)
@every_kernel
def test_blocks_folded_in_are_the_whole(provider: str, dtype: torch.dtype, num_blocks: int) -> None:
    if num_blocks >= 47 and KERNELS[provider].min_rows > 1:
        pytest.skip("it takes no block of one key")
    q, k, v = CASES["grouped"].tensors(dtype, KERNELS[provider].device)
    out, lse = accumulator(q, v)
    for pair in zip(k.tensor_split(num_blocks, 2), v.tensor_split(num_blocks, 2), strict=True):
        attend_merge(out, lse, q, *pair, scale=0.125, provider=provider)
    check_merged(out, lse, reference(q, k, v, 0.125), dtype)


@every_kernel
def test_a_wide_output_is_an_accumulator(provider: str, dtype: torch.dtype) -> None:
    q, k, v = CASES["grouped"].tensors(dtype, KERNELS[provider].device)
    out, lse = attend(q, k[:, :, :20], v[:, :, :20], scale=0.125, provider=provider, wide=True)
    assert out.dtype == lse.dtype == (FP64 if dtype == FP64 else FP32)
    attend_merge(out, lse, q, k[:, :, 20:], v[:, :, 20:], scale=0.125, provider=provider)
    check_merged(out, lse, reference(q, k, v, 0.125), dtype)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=str)
def test_merge_into_some_rows_of_a_larger_accumulator(dtype: torch.dtype) -> None:
    # More rows than the merge takes at a time for a narrower dtype.
    q, k, v = Case((2, 1), (700, 40), (16, 16)).tensors(dtype, "cpu")
    whole = torch.full((2, 2, 1000, 16), 7.0, dtype=FP64 if dtype == FP64 else FP32)
    whole_lse = torch.full((2, 2, 1000), 7.0, dtype=whole.dtype)
    out, lse = whole.narrow(2, 200, 700), whole_lse.narrow(2, 200, 700)
    first, second = blocks_of(q, k, v, 2, "math")
    out.copy_(first[0])
    lse.copy_(first[1])
    merge(out, lse, *second)
    check_merged(out, lse, reference(q, k, v, 0.125), dtype)
    for x in (whole, whole_lse):
        assert (x[:, :, :200] == 7).all()
        assert (x[:, :, 900:] == 7).all()


def test_merge_takes_transposed_states() -> None:
    q, k, v = transposed(*CASES["grouped"].tensors(FP32, "cpu"))
    (out, lse), block = blocks_of(q, k, v, 2, "cpu-flash")
    assert not out.is_contiguous(), "the kernel no longer gives out in q's layout"
    merge(out, lse, *block)
    check_merged(out, lse, reference(q, k, v, 0.125), FP32)


@pytest.mark.parametrize("dtype", [FP64, FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("empty", ["left", "right", "both"])
def test_merge_with_an_empty_side(empty: str, dtype: torch.dtype) -> None:
    q, k, v = CASES["grouped"].tensors(dtype, "cpu")
    full = attend(q, k, v, scale=0.125)
    none = attend(q, k[:, :, :0], v[:, :, :0], scale=0.125)
    left, right = {"left": (none, full), "right": (full, none), "both": (none, none)}[empty]
    out, lse = left[0].to(left[1].dtype, copy=True), left[1].clone()
    merge(out, lse, *right)
    want_out, want_lse = none if empty == "both" else full
    # Exactly: an empty side changes no bit of the other.
    assert torch.equal(out, want_out.to(out.dtype))
    assert torch.equal(lse, want_lse)


def test_merge_does_not_hide_nan() -> None:
    out, lse = zeros(3, 4), torch.tensor([0.0, math.nan, -INF])
    merge(out, lse, torch.ones(3, 4), torch.tensor([math.nan, 0.0, math.nan]))
    assert out.isnan().all()
    assert lse.isnan().all()


def average(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Blocks averaged as if each held the same share of every row's weight."""
    out.lerp_(out_b, 0.5)
    torch.logaddexp(lse, lse_b, out=lse)


def base_two(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """The LSE of a kernel that counts in base 2, taken for a natural one."""
    merge(out, lse, out_b, lse_b / math.log(2))


def half_lse(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """The LSE sent in half precision."""
    merge(out, lse, out_b, lse_b.half().float())


def drop(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """The block never arrived."""


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("wrong", [average, base_two, half_lse, drop])
def test_the_comparison_sees_a_wrong_merge(
    wrong: Callable[[Tensor, Tensor, Tensor, Tensor], None], dtype: torch.dtype
) -> None:
    q, k, v = CASES["grouped"].tensors(dtype, "cpu")
    first, second = blocks_of(q, k, v, 2, "math")
    want = reference(q, k, v, 0.125)
    out, lse = first[0].to(FP32, copy=True), first[1].clone()
    wrong(out, lse, *(x.float() for x in second))
    with pytest.raises(AssertionError):
        check_merged(out, lse, want, dtype)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_the_comparison_sees_a_wrong_output_beside_a_right_lse(dtype: torch.dtype) -> None:
    q, k, v = CASES["grouped"].tensors(dtype, "cpu")
    first, second = blocks_of(q, k, v, 2, "math")
    out, lse = first[0].to(FP32, copy=True), first[1].clone()
    average(out, lse, second[0].float(), second[1])
    with pytest.raises(AssertionError, match="off by"):
        check_merged(out, lse, reference(q, k, v, 0.125), dtype)
