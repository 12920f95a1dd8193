"""Bands, chunk relations and block attention, held against positions one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product as pairs

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringcompile.ops.attention import attention, block_attention, finish, merge
from ringcompile.ops.blocks import Band, Piece, pieces
from ringcompile.ops.packed_keys import pack, unpack

ENDS = (None, *range(-4, 5))
BANDS = [
    Band(lower, upper)
    for lower, upper in pairs(ENDS, ENDS)
    if lower is None or upper is None or lower <= upper
]
EMPTY = [Band(lower, upper) for lower, upper in pairs(ENDS[1:], ENDS[1:]) if lower > upper]  # type: ignore[operator]


def sees(band: Band, query: int, key: int) -> bool:
    """By definition."""
    above = band.lower is None or query - key >= band.lower
    return above and (band.upper is None or query - key <= band.upper)


def relation(band: Band, queries: range, keys: range) -> str:
    seen = {sees(band, query, key) for query in queries for key in keys}
    return {(True,): "full", (False,): "empty"}.get(tuple(seen), "partial")


def of_chunks(band: Band, query: int, key: int, chunk: int) -> str:
    return relation(
        band,
        range(query * chunk, (query + 1) * chunk),
        range(key * chunk, (key + 1) * chunk),
    )


def test_relation() -> None:
    for band, low, high in pairs(BANDS, range(-6, 7), range(-6, 7)):
        if low <= high:
            expected = relation(band, range(low, high + 1), range(1))
            assert band.relation(low, high) == expected, (band, low, high)


def test_chunk_relation_of_known_length() -> None:
    for band, query, key, chunk in pairs(BANDS, range(5), range(5), range(1, 5)):
        assert band.chunk_relation(query, key, chunk) == of_chunks(band, query, key, chunk)


def test_chunk_relation_of_unknown_length_holds_for_every_length() -> None:
    """And says what is the same for all lengths, where a query sees itself."""
    for band, apart in pairs(BANDS, range(-5, 6)):
        query, key = max(apart, 0), max(-apart, 0)
        found = {of_chunks(band, query, key, chunk) for chunk in range(1, 12)}
        expected = found.pop() if len(found) == 1 else "partial"
        said = band.chunk_relation(query, key, None)
        assert said == expected or (said == "partial" and not sees(band, 0, 0)), (band, apart)


def test_a_band_that_lets_nothing_through_is_never_full() -> None:
    for band, query, key, chunk in pairs(EMPTY, range(4), range(4), (None, 1, 2, 3)):
        assert band.chunk_relation(query, key, chunk) != "full"


def test_both_bands() -> None:
    for a, b in pairs(BANDS, BANDS[::3]):
        both = a & b
        assert both == b & a
        assert all(sees(both, i, 0) == (sees(a, i, 0) and sees(b, i, 0)) for i in range(-6, 7))


def test_mask() -> None:
    queries, keys = torch.tensor([7, 0, 3, 3]), torch.tensor([2, 9, 3])
    for band in (*BANDS, *EMPTY):
        expected = [[sees(band, q, k) for k in keys.tolist()] for q in queries.tolist()]
        assert band.mask(queries, keys).tolist() == expected


TEXTS = {
    "full": Band(),
    "causal": Band(0),
    "causal window 5": Band(0, 4),
    "causal window 1": Band(0, 0),
    "band -3..3": Band(-3, 3),
    "band None..0": Band(None, 0),
    "band 1..None": Band(1),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text(text: str) -> None:
    assert str(TEXTS[text]) == text
    assert TEXTS[text].is_causal == (text == "causal")


PIECES: dict[str, tuple[list[int] | None, int, int, int, list[tuple[int, int, int]]]] = {
    "whole": (None, 4, 9, 9, [(0, 9, 0)]),
    "whole, padded": (None, 4, 7, 9, [(0, 7, 0)]),
    "one chunk": ([2], 4, 99, 4, [(8, 4, 0)]),
    "two chunks": ([1, 6], 4, 99, 8, [(4, 4, 0), (24, 4, 4)]),
    "the end in a chunk": ([1, 2], 4, 9, 8, [(4, 4, 0), (8, 1, 4)]),
    "a chunk behind the end": ([0, 3], 4, 9, 8, [(0, 4, 0)]),
    "nothing but padding": ([5], 4, 9, 4, []),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces(name: str) -> None:
    chunks, chunk, limit, rows, expected = PIECES[name]
    assert pieces(chunks, chunk, limit, rows) == tuple(Piece(*piece) for piece in expected)


# -- block attention against the whole score matrix ------------------------------------------------

BATCH, HEADS, GROUPS, DIM = 2, 4, 2, 3


@dataclass(frozen=True)
class Block:
    """One call of block attention; chunks None are positions 0, 1, 2, ..."""

    queries: tuple[int, ...] | None
    keys: tuple[int, ...] | None
    chunk: int
    limit: int
    band: Band
    key_mask: str | None = None
    mask: str | None = None
    value_dim: int = 5
    packed: bool = True

    @property
    def num_queries(self) -> int:
        return self.chunk * 2 if self.queries is None else self.chunk * len(self.queries)

    @property
    def num_keys(self) -> int:
        return self.limit if self.keys is None else self.chunk * len(self.keys)


def rows_of(chunks: tuple[int, ...] | None, chunk: int, count: int) -> torch.Tensor:
    if chunks is None:
        return torch.arange(count)
    return torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in chunks])


def random_mask(kind: str | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Bool or additive, over the whole batch and all heads, or the same for all of them."""
    if kind is None:
        return None
    if "one" in kind:
        shape = (1, 1, *shape[2:])
    if "row" in kind:
        shape = (*shape[:2], 1, shape[3])
    if "bool" in kind:
        return torch.rand(shape) < 0.6
    bias = torch.randn(shape, dtype=torch.float64)
    return bias.masked_fill(torch.rand(shape) < 0.3, -math.inf) if "hiding" in kind else bias


def dense(
    block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and LSE of the whole score matrix; `masks` are over the columns of these keys."""
    here = rows_of(block.queries, block.chunk, q.shape[2])
    there = rows_of(block.keys, block.chunk, k.shape[2])
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * 0.7
    visible = block.band.mask(here, there) & (there < block.limit)
    scores = scores.masked_fill(~visible, -math.inf)
    for mask in masks:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
    return weights @ v, lse


def columns(mask: torch.Tensor, block: Block, num_keys: int) -> torch.Tensor:
    """A mask over the whole sequence, over a block's keys; padding gets any column."""
    if mask.shape[3] == 1:
        return mask
    there = rows_of(block.keys, block.chunk, num_keys).clamp(max=block.limit - 1)
    return mask[..., there]


def check(block: Block) -> None:
    torch.manual_seed(0)
    q = torch.randn(BATCH, HEADS, block.num_queries, DIM, dtype=torch.float64)
    k = torch.randn(BATCH, GROUPS, block.num_keys, DIM, dtype=torch.float64)
    v = torch.randn(BATCH, GROUPS, block.num_keys, block.value_dim, dtype=torch.float64)
    kv = [pack(k, v)] if block.packed else [k, v]
    key_mask = random_mask(block.key_mask, (BATCH, 1, 1, block.limit))
    mask = random_mask(block.mask, (BATCH, HEADS, block.num_queries, block.limit))
    out, lse = block_attention(
        q, kv, key_mask, mask, head_dim=DIM, queries=block.queries, keys=block.keys,
        chunk=block.chunk, limit=block.limit, scale=0.7,
        lower=block.band.lower, upper=block.band.upper,
    )  # fmt: skip
    masks = [columns(m, block, block.num_keys) for m in (key_mask, mask) if m is not None]
    expected, expected_lse = dense(block, q, k, v, masks)
    real = rows_of(block.queries, block.chunk, block.num_queries) < block.limit
    assert out.shape == expected.shape
    assert lse.shape == expected_lse.shape
    torch.testing.assert_close(out[:, :, real], expected[:, :, real], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse[:, :, real], expected_lse[:, :, real], atol=1e-12, rtol=1e-12)


KINDS = (None, "bool", "bool, one", "bias", "bias, hiding", "bias, hiding, one")
chunk_sets = st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True).map(
    lambda chunks: tuple(sorted(chunks))
)

# Tiles have some chunks of queries in falling order.
orders = st.lists(st.integers(0, 5), min_size=1, max_size=5, unique=True).map(tuple)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    ends = st.none() | st.integers(-8, 8)
    lower, upper = draw(ends), draw(ends)
    if lower is not None and upper is not None and draw(st.booleans()):
        lower, upper = min(lower, upper), max(lower, upper)
    queries = draw(chunk_sets | orders)
    return Block(
        queries,
        draw(st.none() | st.just(queries) | chunk_sets),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 24)),
        draw(st.just(Band(0)) | st.just(Band()) | st.just(Band(lower, upper))),
        draw(st.sampled_from(KINDS)),
        draw(st.sampled_from((*KINDS, "bool, row", "bias, row, one"))),
        draw(st.sampled_from([1, DIM, 5])),
        draw(st.booleans()),
    )


@settings(max_examples=300, deadline=None)
@given(blocks())
def test_block_attention_is_dense_attention(block: Block) -> None:
    check(block)


BLOCKS = {
    "the same keys and padding behind them": Block((0,), (0, 1), 1, 1, Band(0)),
    "own block, causal": Block((1,), (1,), 4, 99, Band(0)),
    "own block, causal, padded": Block((1,), (1,), 4, 6, Band(0)),
    "own zigzag block, causal": Block((1, 4), (1, 4), 3, 18, Band(0)),
    "own zigzag block, causal, padded": Block((0, 5), (0, 5), 3, 16, Band(0)),
    "own block, causal, with a key mask": Block((0, 3), (0, 3), 3, 11, Band(0), "bool"),
    "queries of a tile": Block((2, 3, 9, 8), (3, 8), 2, 24, Band(0)),
    "queries of a tile, padded": Block((4, 5, 7, 6), (5, 6), 3, 20, Band(0)),
    "queries of a tile, a window": Block((2, 3, 9, 8), (3, 8), 2, 24, Band(0, 5)),
    "queries of a tile, a short window": Block((2, 3, 9, 8), (3, 8), 4, 48, Band(0, 2)),
    "queries of a tile, with a key mask": Block((2, 3, 9, 8), (3, 8), 2, 24, Band(0), "bool"),
    "falling, causal": Block((5, 2), (5, 2), 3, 18, Band(0)),
    "a block in sight": Block((3,), (0,), 4, 16, Band(0)),
    "a block out of sight": Block((0,), (3,), 4, 16, Band(0)),
    "half a block in sight": Block((1, 2), (0, 3), 4, 16, Band(0)),
    "nothing but padding": Block((0, 1), (5,), 4, 16, Band()),
    "a window across the edge": Block((2,), (1,), 4, 16, Band(0, 2)),
    "a window in both directions": Block((1, 4), (0, 5), 3, 17, Band(-4, 4)),
    "whole keys": Block((1, 2), None, 3, 11, Band(0)),
    "whole keys, masked": Block((0,), None, 3, 11, Band(), "bias, hiding", "bool"),
    "whole queries and keys": Block(None, None, 3, 6, Band(0)),
    "everything at once": Block((0, 7), (1, 6), 2, 15, Band(-9, 12), "bool", "bias, hiding"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_attention(name: str) -> None:
    check(BLOCKS[name])


@pytest.mark.parametrize("band", [Band(), Band(0), Band(0, 4), Band(-3, 3)], ids=str)
@pytest.mark.parametrize("length", [18, 16, 7])
def test_blocks_merge_to_the_whole(length: int, band: Band) -> None:
    """All blocks of a zigzag ring of 3, merged in any order, are whole attention."""
    q = torch.randn(BATCH, HEADS, length, DIM, dtype=torch.float64)
    k, v = (torch.randn(BATCH, GROUPS, length, n, dtype=torch.float64) for n in (DIM, 2))
    chunk = -(-length // 6)
    whole = attention(q, k, v, scale=0.7, lower=band.lower, upper=band.upper)
    for rank, first in pairs(range(3), range(3)):
        rows = rows_of((rank, 5 - rank), chunk, 0)
        state = None
        for block in [(first + i) % 3 for i in range(3)]:
            keys = (block, 5 - block)
            there = rows_of(keys, chunk, 0).clamp(max=length - 1)
            made = block_attention(
                q[:, :, rows.clamp(max=length - 1)], [pack(k[:, :, there], v[:, :, there])],
                head_dim=DIM, queries=(rank, 5 - rank), keys=keys, chunk=chunk, limit=length,
                scale=0.7, lower=band.lower, upper=band.upper,
            )  # fmt: skip
            state = made if state is None else merge(state, made, start=0)
        assert state is not None
        found = finish(state, dtype=torch.float64)[:, :, rows < length]
        torch.testing.assert_close(found, whole[:, :, rows[rows < length]], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("value_dim", [1, 2, DIM, 2 * DIM])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_unpack_undoes_pack(groups: int, value_dim: int) -> None:
    k, v = torch.randn(BATCH, groups, 7, DIM), torch.randn(BATCH, groups, 7, value_dim)
    for kv in ([pack(k, v)], [k, v]):
        found = unpack(kv, DIM)
        assert torch.equal(found[0], k)
        assert torch.equal(found[1], v)
    rows = unpack([pack(k, v)[2:5]], DIM)
    assert torch.equal(rows[0], k[:, :, 2:5])
    assert torch.equal(rows[1], v[:, :, 2:5])
    assert pack(k, v)[2:5].is_contiguous()


@pytest.mark.parametrize("value_dim", [1, DIM])
def test_keys_and_values_that_lie_side_by_side_are_packed_already(value_dim: int) -> None:
    k, v = torch.randn(BATCH, 3, 7, DIM), torch.randn(BATCH, 3, 7, value_dim)
    packed = pack(k, v)
    again = pack(*unpack([packed], DIM))
    assert again.data_ptr() == packed.data_ptr()
    assert again.is_contiguous()
    assert torch.equal(again, packed)
    part = pack(*(x[:, :, 2:4] for x in unpack([packed], DIM)))
    assert part.data_ptr() == packed[2:4].data_ptr()
    assert torch.equal(part, packed[2:4])


def _side_by_side() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values in one buffer, but not as `pack` puts them."""
    buffer = torch.randn(7, BATCH, 6, DIM).permute(1, 2, 0, 3)
    one = torch.randn(BATCH, 1, 7, DIM)
    return {
        "values first": (buffer[:, 3:], buffer[:, :3]),
        "a gap between": (buffer[:, :2], buffer[:, 4:]),
        "overlapping": (buffer[:, :3], buffer[:, 2:5]),
        "the same": (buffer[:, :3], buffer[:, :3]),
        "other tokens": (buffer[:, :3, :3], buffer[:, :3, 3:6]),
        "one head for all": (one.expand(-1, 3, -1, -1), one.expand(-1, 3, -1, -1)),
    }


@pytest.mark.parametrize("k_v", _side_by_side().values(), ids=_side_by_side())
def test_what_lies_otherwise_is_packed_anew(k_v: tuple[torch.Tensor, torch.Tensor]) -> None:
    k, v = unpack([pack(*k_v)], DIM)
    assert torch.equal(k, k_v[0])
    assert torch.equal(v, k_v[1])


def test_a_merge_touches_its_rows_only() -> None:
    state = [torch.randn(1, 2, 6, DIM), torch.randn(1, 2, 6)]
    before = [x.clone() for x in state]
    block = [torch.randn(1, 2, 3, DIM), torch.randn(1, 2, 3)]
    merged = merge(state, block, start=2)
    for after, was in zip(merged, before, strict=True):
        assert torch.equal(after[:, :, :2], was[:, :, :2])
        assert torch.equal(after[:, :, 5:], was[:, :, 5:])
        assert not torch.equal(after[:, :, 2:5], was[:, :, 2:5])
