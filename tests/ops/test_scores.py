"""Soft caps and sinks: against attention written out in float64, whole and merged from blocks."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from ringcompile.errors import RingCompileError
from ringcompile.ops.attention import attention, block_attention, finish, merge
from ringcompile.ops.blocks import Band
from ringcompile.ops.kernels import attend, providers
from ringcompile.ops.packed_keys import pack

HEADS, GROUPS, DIM, VALUE_DIM = 4, 2, 8, 6
SCALE = 1.5  # scores of several units: a cap of 1 or 2 bends most of them
EXACT, ROUNDED = {"atol": 1e-12, "rtol": 1e-12}, {"atol": 2e-6, "rtol": 2e-6}


def tensors(
    queries: int, keys: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((HEADS, queries, DIM), (GROUPS, keys, DIM), (GROUPS, keys, VALUE_DIM))
    q, k, v = (torch.randn(2, *size, dtype=torch.float64).to(dtype) for size in sizes)
    return q, k, v


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    sink: Tensor | None,
    hidden: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """One query and head at a time, as the formulas read; `hidden` is [B,H,Sq,Sk], True hides."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            for i in range(q.shape[2]):
                weights = []
                for j in range(k.shape[2]):
                    score = SCALE * float(torch.dot(q[b, h, i].double(), k[b, g, j].double()))
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    if bias is not None:
                        score += float(bias[b, h, i, j])
                    seen = hidden is None or not hidden[b, h, i, j]
                    weights.append(math.exp(score) if seen else 0.0)
                total = sum(weights) + (math.exp(float(sink[h])) if sink is not None else 0.0)
                for j, weight in enumerate(weights):
                    out[b, h, i] += weight / (total or 1.0) * v[b, g, j].double()
    return out


def sinks(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([-2.0, 0.5, 1.0, 4.0], dtype=dtype)


def above(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).triu(1).expand(2, HEADS, -1, -1)


# -- kernels ---------------------------------------------------------------------------------------

FITTING = {
    torch.float64: EXACT,
    torch.float32: ROUNDED,
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
    torch.float16: {"atol": 2e-3, "rtol": 2e-3},
}


@pytest.mark.parametrize("dtype", FITTING, ids=str)
@pytest.mark.parametrize("softcap", [0.5, 2.0, 50.0])
@pytest.mark.parametrize("causal", [False, True])
def test_a_soft_cap_bends_scores(softcap: float, causal: bool, dtype: torch.dtype) -> None:
    q, k, v = tensors(5, 5, dtype)
    out, _ = attend(q, k, v, scale=SCALE, causal=causal, softcap=softcap)
    expected = reference(q, k, v, softcap, None, above(5, 5) if causal else None)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, **FITTING[dtype])


def test_the_cap_comes_before_the_mask() -> None:
    """A bias is added to capped scores, and what is hidden stays hidden."""
    q, k, v = tensors(4, 7)
    bias = torch.randn(2, HEADS, 4, 7, dtype=torch.float64) * 3
    hidden = torch.rand(2, HEADS, 4, 7) < 0.4
    hidden[0, 1, 2] = True
    mask = bias.masked_fill(hidden, -math.inf)
    out, lse = attend(q, k, v, scale=SCALE, mask=mask, softcap=1.0)
    torch.testing.assert_close(out, reference(q, k, v, 1.0, None, hidden, bias), **EXACT)
    assert lse[0, 1, 2] == -math.inf


def test_the_lse_is_that_of_capped_scores() -> None:
    q, k, v = tensors(3, 4)
    _, lse = attend(q, k, v, scale=SCALE, softcap=2.0)
    scores = 2.0 * torch.tanh(SCALE * q @ k.repeat_interleave(2, 1).mT / 2.0)
    torch.testing.assert_close(lse, scores.exp().sum(-1).log(), **EXACT)


def test_a_high_cap_is_none() -> None:
    q, k, v = tensors(5, 6)
    plain, _ = attend(q, k, v, scale=SCALE)
    capped, _ = attend(q, k, v, scale=SCALE, softcap=1e9)
    torch.testing.assert_close(capped, plain, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("provider", [name for name in providers() if name != "math"])
def test_other_kernels_refuse_a_cap(provider: str) -> None:
    q, k, v = tensors(3, 3, torch.float32)
    with pytest.raises(RingCompileError, match=r"it takes no soft cap|it runs on cuda"):
        attend(q, k, v, scale=1.0, softcap=2.0, provider=provider)


@pytest.mark.parametrize("softcap", [0.0, -1.0, math.inf, math.nan])
def test_a_cap_is_a_positive_number(softcap: float) -> None:
    q, k, v = tensors(3, 3)
    with pytest.raises(RingCompileError, match="a soft cap is a positive number"):
        attend(q, k, v, scale=1.0, softcap=softcap)


# -- sinks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", FITTING, ids=str)
def test_a_sink_takes_weight(dtype: torch.dtype, softcap: float | None) -> None:
    q, k, v = tensors(5, 7, dtype)
    sink = sinks(dtype)
    out = attention(q, k, v, sink=sink, scale=SCALE, softcap=softcap)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), reference(q, k, v, softcap, sink), **FITTING[dtype]
    )


def test_a_sink_is_a_score_beside_the_others() -> None:
    """As gpt-oss writes it: a column more in the softmax, dropped behind."""
    q, k, v = tensors(4, 4)
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (SCALE * q @ keys.mT).masked_fill(above(4, 4), -math.inf)
    column = sinks().view(1, -1, 1, 1).expand(2, -1, 4, 1)
    expected = torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ values
    found = attention(q, k, v, sink=sinks(), scale=SCALE, lower=0)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("value", [-math.inf, -1e4, 0.0, 1e4, math.inf])
def test_a_row_that_sees_no_key_is_zero(value: float) -> None:
    q, k, v = tensors(3, 3)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 1, :] = False
    sink = torch.full((HEADS,), value, dtype=torch.float64)
    out = attention(q, k, v, mask=mask, sink=sink, scale=SCALE)
    assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
    assert out.isfinite().all()


def test_sinks_without_end() -> None:
    q, k, v = tensors(3, 3)
    off = torch.full((HEADS,), -math.inf, dtype=torch.float64)
    plain = attention(q, k, v, scale=SCALE)
    assert torch.equal(attention(q, k, v, sink=off, scale=SCALE), plain)
    assert attention(q, k, v, sink=-off, scale=SCALE).count_nonzero() == 0


# -- blocks ----------------------------------------------------------------------------------------

LENGTH, CHUNK = 11, 2


def merged(
    q: Tensor, k: Tensor, v: Tensor, order: tuple[int, ...], mask: Tensor, key_mask: Tensor,
    sink: Tensor | None, softcap: float | None, band: Band,
) -> Tensor:
    """Zigzag chunks of three ranks; the rows of each rank over all blocks, in this order."""
    found = torch.zeros(*q.shape[:3], VALUE_DIM, dtype=q.dtype)
    for rank in range(3):
        rows = positions(rank)
        state = None
        for block in order:
            there = positions(block).clamp(max=LENGTH - 1)
            here = rows.clamp(max=LENGTH - 1)
            made = block_attention(
                q[:, :, here], [pack(k[:, :, there], v[:, :, there])], key_mask, mask[:, :, here],
                head_dim=DIM, queries=(rank, 5 - rank), keys=(block, 5 - block), chunk=CHUNK,
                limit=LENGTH, scale=SCALE, softcap=softcap, lower=band.lower, upper=band.upper,
            )  # fmt: skip
            state = made if state is None else merge(state, made, start=0)
        assert state is not None
        real = rows < LENGTH
        found[:, :, rows[real]] = finish(state, sink, dtype=q.dtype)[:, :, real]
    return found


def positions(rank: int) -> Tensor:
    chunks = (rank, 5 - rank)
    return torch.cat([torch.arange(c * CHUNK, (c + 1) * CHUNK) for c in chunks])


@pytest.mark.parametrize("band", [Band(), Band(0), Band(0, 3), Band(-2, 2)], ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["uncapped", "capped"])
@pytest.mark.parametrize("with_sink", [False, True], ids=["", "sink"])
def test_blocks_merge_to_the_whole_in_any_order(
    with_sink: bool, softcap: float | None, band: Band
) -> None:
    q, k, v = tensors(LENGTH, LENGTH)
    sink = sinks() if with_sink else None
    key_mask = torch.rand(2, 1, 1, LENGTH) < 0.7
    bias = torch.randn(2, HEADS, LENGTH, LENGTH, dtype=torch.float64)
    at = torch.arange(LENGTH)
    hidden = (~band.mask(at, at) | ~key_mask).expand(2, HEADS, -1, -1)
    expected = reference(q, k, v, softcap, sink, hidden, bias)
    whole = attention(
        q, k, v, key_mask, bias, sink, scale=SCALE, softcap=softcap, lower=band.lower,
        upper=band.upper,
    )  # fmt: skip
    torch.testing.assert_close(whole, expected, **EXACT)
    for order in permutations(range(3)):
        found = merged(q, k, v, order, bias, key_mask, sink, softcap, band)
        torch.testing.assert_close(found, expected, **EXACT)
