"""States of attention in one tensor: packed for ranks, merged from theirs."""

from __future__ import annotations

import pytest
import torch

from ringcompile.ops.attention import attention, block_attention
from ringcompile.ops.cached import merge_states, pack_state

BATCH, HEADS, LENGTH, DIM = 2, 6, 12, 3


def state(seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(BATCH, HEADS, LENGTH, DIM), torch.randn(BATCH, HEADS, LENGTH)]


def test_a_state_for_all_is_merged_alone_into_itself() -> None:
    out, lse = state()
    packed = pack_state([out, lse])
    assert packed.shape == (1, LENGTH, BATCH, HEADS, DIM + 1)
    found = merge_states(packed)
    assert torch.equal(found[0], out)
    assert torch.equal(found[1], lse)
    assert found[1].is_contiguous()


@pytest.mark.parametrize("runs", [1, 2, 4])
@pytest.mark.parametrize(("dim", "ways"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 3)])
def test_each_rank_has_its_runs_of_heads_or_tokens(dim: int, ways: int, runs: int) -> None:
    out, lse = state()
    size = out.shape[dim]
    if size % (ways * runs):
        with pytest.raises(RuntimeError):
            pack_state([out, lse], dim=dim, ways=ways, runs=runs)
        return
    packed = pack_state([out, lse], dim=dim, ways=ways, runs=runs)
    assert packed.is_contiguous()
    each = size // (ways * runs)
    for way in range(ways):
        kept = torch.cat([
            torch.arange(each) + (run * ways + way) * each for run in range(runs)
        ])
        found = merge_states(packed[way : way + 1])
        assert torch.equal(found[0], out.index_select(dim, kept))
        assert torch.equal(found[1], lse.index_select(dim, kept))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_states_over_parts_of_the_keys_are_merged(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=dtype) for _ in range(3))
    states = [
        block_attention(
            q, [k[:, :, part], v[:, :, part]], head_dim=DIM, queries=None, keys=None, chunk=1,
            limit=LENGTH, scale=0.5, wide=True,
        )
        for part in (slice(0, 5), slice(5, 6), slice(6, 12))
    ]
    out, lse = merge_states(torch.cat([pack_state(one) for one in states]))
    assert out.dtype == lse.dtype == torch.promote_types(dtype, torch.float32)
    whole = attention(*(x.to(out.dtype) for x in (q, k, v)), scale=0.5)
    near = 1e-12 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(out, whole, atol=near, rtol=near)
