"""The contract of ops/kernels, kernel by kernel, against attention written out in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ringcompile.errors import RingCompileError
from ringcompile.ops.kernels import attend, attend_merge, merge, providers
from tests.ops import few_queries
from tests.ops.contract import (
    ATOL,
    BF16,
    FP16,
    FP32,
    FP64,
    INF,
    LAYOUTS,
    Case,
    check,
    reference,
)
from tests.ops.kernel_cases import (
    CASES,
    KERNELS,
    every_kernel,
    every_kernel_of_one_row,
    every_masking_kernel,
    kernel_params,
    zeros,
)


def test_every_provider_has_its_contract_tested() -> None:
    elsewhere = {"hopper", "triton", "decode", "ffpa"}  # test_custom_kernels.py
    assert set(providers()) == {*KERNELS, *elsewhere}


def contract_params() -> list[object]:
    return [
        pytest.param(*param.values, case, id=f"{param.id}-{name}", marks=param.marks)
        for param in kernel_params()
        for name, case in CASES.items()
        if KERNELS[param.values[0]].fits(case)
    ]


@pytest.mark.parametrize(("provider", "dtype", "case"), contract_params())
def test_contract(provider: str, dtype: torch.dtype, case: Case) -> None:
    q, k, v = case.tensors(dtype, KERNELS[provider].device)
    before = [x.clone() for x in (q, k, v)]
    scale = case.dims[0] ** -0.5
    out, lse = attend(q, k, v, scale=scale, causal=case.causal, provider=provider)

    check(out, lse, reference(q, k, v, scale, case.causal))
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert out.dtype == dtype
    assert lse.shape == q.shape[:3]
    assert lse.dtype == (FP64 if dtype == FP64 else FP32)
    assert lse.is_contiguous()
    for x, kept in zip((q, k, v), before, strict=True):
        assert torch.equal(x, kept), "an input was written"


@pytest.mark.parametrize("name", sorted({*few_queries.CHECKS} - {"capped", "two-head-dims"}))
def test_few_queries_on_a_cpu(name: str) -> None:
    few_queries.CHECKS[name]("cpu-flash", "cpu")


@every_kernel_of_one_row
def test_results_are_new_memory(provider: str, dtype: torch.dtype) -> None:
    # One head and one key: the shapes in which a copy is easily skipped.
    q, k, v = Case((1, 1), (32, 1), (64, 64), batch=1).tensors(dtype, KERNELS[provider].device)
    states = [attend(q, k, v, scale=0.125, provider=provider) for _ in range(2)]
    memory = [x.untyped_storage().data_ptr() for x in (q, k, v, *states[0], *states[1])]
    assert len(set(memory)) == len(memory)


@pytest.mark.parametrize("layout", LAYOUTS)
@every_kernel
def test_strided_inputs(provider: str, dtype: torch.dtype, layout: str) -> None:
    q, k, v = CASES["causal-grouped-odd"].tensors(dtype, KERNELS[provider].device)
    want = reference(q, k, v, 0.125, causal=True)
    q, k, v = LAYOUTS[layout](q, k, v)
    check(*attend(q, k, v, scale=0.125, causal=True, provider=provider), want)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_strided_last_dim_falls_to_a_kernel_that_can(dtype: torch.dtype) -> None:
    q, k, v = CASES["grouped"].tensors(dtype, "cpu")
    k = k.mT.contiguous().mT
    check(*attend(q, k, v, scale=0.125), reference(q, k, v, 0.125))


@every_kernel_of_one_row
def test_lse_is_natural(provider: str, dtype: torch.dtype) -> None:
    q = torch.ones(1, 1, 1, 8, dtype=dtype, device=KERNELS[provider].device)
    k = torch.ones(1, 1, 16, 8, dtype=dtype, device=q.device)
    _, lse = attend(q, k, k, scale=0.5, provider=provider)
    # 16 scores of 8 * 0.5: in base 2 it would be 9.77.
    assert lse.item() == pytest.approx(4 + math.log(16), abs=ATOL[dtype])


@every_kernel
def test_scores_in_the_hundreds_do_not_overflow(provider: str, dtype: torch.dtype) -> None:
    q, k, v = CASES["grouped"].tensors(dtype, KERNELS[provider].device)
    _, lse = attend(q, k, v, scale=20.0, provider=provider)
    want = reference(q, k, v, 20.0)
    # exp(88) overflows fp32. The scores are 160 times those of ATOL, and so is their rounding.
    assert want.lse.max() > 300
    torch.testing.assert_close(lse.double(), want.lse, atol=160 * ATOL[dtype], rtol=0)


# Masks: B=2, H=6, Sq=Sk=65.
MASK_SHAPES = {
    "all": (2, 6, 65, 65),
    "heads": (1, 6, 65, 65),
    "batch": (2, 1, 65, 65),
    "rows": (65, 65),
    "rows-3-dims": (6, 65, 65),
    "keys": (65,),
    "padding": (2, 1, 1, 65),
    "per-query": (65, 1),
    "one": (1, 1, 1, 1),
}


def random_mask(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    visible = torch.rand(shape) < 0.6
    if kind == "bool":
        return visible.to(device)
    return torch.randn(shape).masked_fill(~visible, -INF).to(device, dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["alone", "with-causal"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("shape", MASK_SHAPES.values(), ids=MASK_SHAPES)
@every_masking_kernel
def test_masks(
    provider: str, dtype: torch.dtype, shape: tuple[int, ...], kind: str, causal: bool
) -> None:
    device = KERNELS[provider].device
    q, k, v = CASES["causal-grouped-odd"].tensors(dtype, device)
    mask = random_mask(kind, shape, dtype, device)
    out, lse = attend(q, k, v, scale=0.125, causal=causal, mask=mask, provider=provider)
    check(out, lse, reference(q, k, v, 0.125, causal, mask))


@pytest.mark.parametrize("kind", ["bool", "additive"])
@every_masking_kernel
def test_strided_masks(provider: str, dtype: torch.dtype, kind: str) -> None:
    device = KERNELS[provider].device
    # 64 keys: no kernel has to pad, and so to copy, such a mask.
    q, k, v = CASES["causal"].tensors(dtype, device)
    mask = random_mask(kind, (2, 1, 64, 64), dtype, device).mT
    out, lse = attend(q, k, v, scale=0.125, mask=mask, provider=provider)
    check(out, lse, reference(q, k, v, 0.125, mask=mask))


@pytest.mark.parametrize("mask_dtype", [FP64, FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("dtype", [FP64, FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("provider", [name for name in KERNELS if KERNELS[name].device == "cpu"])
def test_additive_masks_of_any_dtype(
    provider: str, dtype: torch.dtype, mask_dtype: torch.dtype
) -> None:
    q, k, v = CASES["grouped"].tensors(dtype, "cpu")
    mask = torch.randn(33, 47).to(mask_dtype)
    out, lse = attend(q, k, v, scale=0.125, mask=mask, provider=provider)
    check(out, lse, reference(q, k, v, 0.125, mask=mask))


def hide_some_rows(n: int) -> Tensor:
    return (torch.arange(n) % 3 != 0)[:, None].expand(n, n)


def hide_first_keys(n: int) -> Tensor:
    # With causal, the first rows see nothing; without, every row sees the last keys.
    return (torch.arange(n) >= 5).expand(n, n)


BLIND = {
    "every-row": (lambda n: torch.zeros(n, n, dtype=torch.bool), False, range(65)),
    "some-rows": (hide_some_rows, False, range(0, 65, 3)),
    "some-rows-causal": (hide_some_rows, True, range(0, 65, 3)),
    "by-mask-and-causal": (hide_first_keys, True, range(5)),
    "none": (hide_first_keys, False, range(0)),
}


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize(("make", "causal", "rows"), BLIND.values(), ids=BLIND)
@every_masking_kernel
def test_rows_that_see_no_key(
    provider: str,
    dtype: torch.dtype,
    make: Callable[[int], Tensor],
    causal: bool,
    rows: range,
    kind: str,
) -> None:
    q, k, v = CASES["causal-grouped-odd"].tensors(dtype, KERNELS[provider].device)
    mask = make(65).to(q.device)
    if kind == "additive":
        mask = torch.zeros(65, 65, dtype=dtype, device=q.device).masked_fill(~mask, -INF)
    out, lse = attend(q, k, v, scale=0.125, causal=causal, mask=mask, provider=provider)

    blind = torch.zeros(65, dtype=torch.bool, device=q.device)
    blind[list(rows)] = True
    assert (lse[..., blind] == -INF).all()
    assert (out[..., blind, :] == 0).all()
    assert lse[..., ~blind].isfinite().all()
    check(out, lse, reference(q, k, v, 0.125, causal, mask))


@every_masking_kernel
def test_long_hidden_prefix(provider: str, dtype: torch.dtype) -> None:
    """Whole blocks of the kernel's own pass by before a row sees its first key."""
    q, k, v = CASES["long"].tensors(dtype, KERNELS[provider].device)
    mask = (torch.arange(1100) >= 700).expand(300, 1100).to(q.device)
    check(
        *attend(q, k, v, scale=0.125, mask=mask, provider=provider),
        reference(q, k, v, 0.125, mask=mask),
    )


@every_masking_kernel
def test_rows_hidden_by_the_lowest_number_are_an_average(provider: str, dtype: torch.dtype) -> None:
    """As in eager softmax: such a mask (Hugging Face's) adds equal numbers, which hides nothing.

    With other blocks it still weighs nothing, its LSE being so low.
    """
    q, k, v = CASES["grouped"].tensors(dtype, KERNELS[provider].device)
    mask = torch.full((33, 47), torch.finfo(dtype).min, dtype=dtype, device=q.device)
    out, lse = attend(q, k, v, scale=0.0, mask=mask, provider=provider)
    mean = v.double().mean(2, keepdim=True).repeat_interleave(3, 1).expand(out.shape)
    error = (out.double() - mean).abs()
    assert (error <= torch.finfo(dtype).eps * v.double().abs().max() + ATOL[dtype]).all()
    assert (lse < -6e4).all()


EMPTY = {
    "no-keys": ((2, 4, 33, 64), (2, 2, 0, 64)),
    "no-queries": ((2, 4, 0, 64), (2, 2, 47, 64)),
    "no-rows": ((2, 4, 0, 64), (2, 2, 0, 64)),
    "no-batch": ((0, 4, 33, 64), (0, 2, 47, 64)),
}


@pytest.mark.parametrize(("q_shape", "k_shape"), EMPTY.values(), ids=EMPTY)
@every_kernel
def test_empty_blocks(
    provider: str, dtype: torch.dtype, q_shape: tuple[int, ...], k_shape: tuple[int, ...]
) -> None:
    device = KERNELS[provider].device
    q = torch.randn(q_shape).to(device, dtype)
    k, v = (torch.randn(k_shape).to(device, dtype) for _ in range(2))
    out, lse = attend(q, k, v, scale=0.125, provider=provider)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:3], FP64 if dtype == FP64 else FP32)
    assert (out == 0).all()
    assert (lse == -INF).all()
    wide, _ = attend(q, k, v, scale=0.125, provider=provider, wide=True)
    assert wide.dtype == lse.dtype
    before = torch.randn_like(wide), torch.randn_like(lse)
    after = [x.clone() for x in before]
    attend_merge(*after, q, k, v, scale=0.125, provider=provider)
    assert all(map(torch.equal, before, after))


Q, KV = (1, 4, 8, 16), (1, 2, 8, 16)
REFUSED = {
    "dims": (
        lambda: attend(zeros(4, 8, 16), zeros(*KV), zeros(*KV), scale=1.0),
        (
            "attention takes 4-dim tensors [B,H,S,D], got q [4, 8, 16], k [1, 2, 8, 16], "
            "v [1, 2, 8, 16]"
        ),
    ),
    "lengths": (
        lambda: attend(zeros(*Q), zeros(*KV), zeros(1, 2, 9, 16), scale=1.0),
        "attention inputs disagree: q [1, 4, 8, 16], k [1, 2, 8, 16], v [1, 2, 9, 16]",
    ),
    "head-dims": (
        lambda: attend(zeros(*Q), zeros(1, 2, 8, 32), zeros(*KV), scale=1.0),
        "attention inputs disagree: q [1, 4, 8, 16], k [1, 2, 8, 32], v [1, 2, 8, 16]",
    ),
    "groups": (
        lambda: attend(zeros(*Q), zeros(1, 3, 8, 16), zeros(1, 3, 8, 16), scale=1.0),
        "KV heads do not divide query heads: q [1, 4, 8, 16], k [1, 3, 8, 16], v [1, 3, 8, 16]",
    ),
    "causal-lengths": (
        lambda: attend(zeros(1, 4, 7, 16), zeros(*KV), zeros(*KV), scale=1.0, causal=True),
        "causal attention needs as many queries as keys, got 7 and 8",
    ),
    "dtypes": (
        lambda: attend(zeros(*Q), zeros(*KV), zeros(*KV, dtype=FP16), scale=1.0),
        (
            "attention takes q, k, v of one float dtype, got torch.float32, torch.float32, "
            "torch.float16"
        ),
    ),
    "mask-shape": (
        lambda: attend(zeros(*Q), zeros(*KV), zeros(*KV), scale=1.0, mask=zeros(8, 9)),
        "mask [1, 1, 8, 9] does not broadcast to the scores [1, 4, 8, 8]",
    ),
    "mask-dims": (
        lambda: attend(zeros(*Q), zeros(*KV), zeros(*KV), scale=1.0, mask=zeros(1, 1, 1, 8, 8)),
        "mask [1, 1, 1, 8, 8] does not broadcast to the scores [1, 4, 8, 8]",
    ),
    "mask-dtype": (
        lambda: attend(
            zeros(*Q), zeros(*KV), zeros(*KV), scale=1.0, mask=zeros(8, 8, dtype=torch.int64)
        ),
        "mask has dtype torch.int64",
    ),
    "provider-name": (
        lambda: attend(zeros(*Q), zeros(*KV), zeros(*KV), scale=1.0, provider="flash"),
        "no attention provider is named 'flash'",
    ),
    "provider-device": (
        lambda: attend(zeros(*Q), zeros(*KV), zeros(*KV), scale=1.0, provider="cuda-flash"),
        "attention provider 'cuda-flash' does not fit: tensors are on cpu, it runs on cuda",
    ),
    "provider-value-dim": (
        lambda: attend(zeros(*Q), zeros(*KV), zeros(1, 2, 8, 24), scale=1.0, provider="cpu-flash"),
        (
            "attention provider 'cpu-flash' does not fit: head_dim of q and k is 16, of v 24, "
            "it takes one size"
        ),
    ),
    "provider-strides": (
        lambda: attend(
            zeros(1, 4, 16, 8).mT, zeros(*KV), zeros(*KV), scale=1.0, provider="cpu-flash"
        ),
        "attention provider 'cpu-flash' does not fit: the last dim is strided",
    ),
    "merge-shapes": (
        lambda: merge(zeros(8, 4), zeros(8), zeros(1, 4), zeros(1)),
        "states to merge differ: out [8, 4] and [1, 4], lse [8] and [1]",
    ),
    "merge-lse-shape": (
        lambda: merge(zeros(8, 4), zeros(8, 1), zeros(8, 4), zeros(8, 1)),
        "states to merge differ: out [8, 4] and [8, 4], lse [8, 1] and [8, 1]",
    ),
    "merge-into-half": (
        lambda: merge(zeros(8, 4, dtype=FP16), zeros(8), zeros(8, 4), zeros(8)),
        (
            "merge would lose precision: out torch.float16, lse torch.float32, "
            "block out torch.float32, block lse torch.float32"
        ),
    ),
    "accumulator-shape": (
        lambda: attend_merge(
            zeros(1, 4, 8, 8), zeros(1, 4, 8), zeros(*Q), *zeros(2, *KV), scale=1.0
        ),
        (
            "the accumulator, out [1, 4, 8, 8] and lse [1, 4, 8], does not fit a block whose "
            "output is [1, 4, 8, 16]"
        ),
    ),
    "accumulator-half": (
        lambda: attend_merge(
            zeros(*Q, dtype=FP16), zeros(1, 4, 8), zeros(*Q), *zeros(2, *KV), scale=1.0
        ),
        "the accumulator is torch.float16 and torch.float32, this block needs torch.float32",
    ),
    "merge-of-double": (
        lambda: merge(zeros(8, 4), zeros(8), zeros(8, 4), zeros(8, dtype=FP64)),
        (
            "merge would lose precision: out torch.float32, lse torch.float32, "
            "block out torch.float32, block lse torch.float64"
        ),
    ),
}


@pytest.mark.parametrize(("act", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(act: Callable[[], object], message: str) -> None:
    with pytest.raises(RingCompileError) as caught:
        act()
    assert caught.value.message == message
