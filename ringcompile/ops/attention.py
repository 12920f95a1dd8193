"""Bodies of the attention ops, over the kernels in kernels/.

Everything here is per rank and knows only positions: which mesh, and how blocks travel, is decided
in the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise

import torch

from ringcompile.ops import kernels
from ringcompile.ops.blocks import Band, Piece, is_diagonal, pieces, rise
from ringcompile.ops.packed_keys import unpack

State = list[torch.Tensor]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    lower: int | None = None,
    upper: int | None = None,
) -> torch.Tensor:
    """Attention of whole queries over whole keys: [B,H,Sq,E].

    Args:
        q: [B,H,Sq,D].
        k: [B,G,Sk,D], a key head for every H/G query heads.
        v: [B,G,Sk,E].
        key_mask: [B|1, 1, 1, Sk], bool (True is visible) or additive.
        mask: [B|1, H|1, Sq|1, Sk], bool or additive.
        sink: [H], see `finish`.
        scale: what q k^T is multiplied by before masks are applied.
        softcap: what scores are bent to stay within before masks are applied, see `kernels.attend`.
        lower: the smallest visible query position - key position, see `blocks.Band`.
        upper: the largest one.
    """
    rows, columns = (pieces(None, 0, _NO_LIMIT, x.shape[2]) for x in (q, k))
    masks = _Masks(key_mask, mask, Band(lower, upper))
    state = _attended(_calls(q, k, v, masks, rows, columns), _Scoring(scale, softcap))
    return finish(state, sink, dtype=q.dtype)


def block_attention(
    q: torch.Tensor,
    kv: Sequence[torch.Tensor],
    key_mask: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    head_dim: int,
    queries: Sequence[int] | None,
    keys: Sequence[int] | None,
    chunk: int,
    limit: int,
    scale: float,
    softcap: float | None = None,
    lower: int | None = None,
    upper: int | None = None,
    wide: bool = False,
) -> State:
    """Attention of the queries over one block of keys, as a state [out, lse].

    Args:
        q: [B,H,Sq,D].
        kv: keys [B,G,Sk,D] and values [B,G,Sk,E], or both in one buffer, see `packed_keys.pack`.
        key_mask: as in `attention`; its key dim spans the whole sequence.
        mask: as in `attention`; its key dim spans the whole sequence, its query dim these queries.
        head_dim: D.
        queries: the chunks that the rows of q are, by index; None for positions 0, 1, 2, ...
        keys: the chunks that the rows of kv are, likewise.
        chunk: length of a chunk.
        limit: the true length; keys from here on are padding.
        scale: as in `attention`.
        softcap: as in `attention`.
        lower: as in `attention`, of positions in the whole sequence.
        upper: likewise.
        wide: whether out is wanted as precise as lse, for blocks to be merged into it.
    """
    blocks = _Blocks(queries, keys, chunk, limit)
    masks = _Masks(key_mask, mask, Band(lower, upper))
    calls = _block_calls(q, kv, head_dim, masks, blocks)
    return _attended(calls, _Scoring(scale, softcap), wide)


def attend_merge(
    state: State,
    q: torch.Tensor,
    kv: Sequence[torch.Tensor],
    key_mask: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    start: int,
    head_dim: int,
    queries: Sequence[int] | None,
    keys: Sequence[int] | None,
    chunk: int,
    limit: int,
    scale: float,
    softcap: float | None = None,
    lower: int | None = None,
    upper: int | None = None,
) -> State:
    """Attention over one more block of keys, folded into the state's rows from `start` on.

    The same as `merge(state, block_attention(q, kv, ...), start=start)`, which says what the
    arguments are; the state is used up.
    """
    out, lse = _accumulator(state)
    blocks = _Blocks(queries, keys, chunk, limit)
    masks = _Masks(key_mask, mask, Band(lower, upper))
    for call in _block_calls(q, kv, head_dim, masks, blocks):
        _add(out, lse, call, start + call.first, _Scoring(scale, softcap))
    return [out, lse]


@dataclass(frozen=True)
class _Blocks:
    """Which positions the rows of queries and keys are; see `block_attention`."""

    queries: Sequence[int] | None
    keys: Sequence[int] | None
    chunk: int
    limit: int


def _block_calls(
    q: torch.Tensor, kv: Sequence[torch.Tensor], head_dim: int, masks: _Masks, blocks: _Blocks
) -> list[_KernelCall]:
    k, v = unpack(kv, head_dim)
    rows = pieces(blocks.queries, blocks.chunk, limit=_NO_LIMIT, num_rows=q.shape[2])
    columns = pieces(blocks.keys, blocks.chunk, blocks.limit, num_rows=k.shape[2])
    if blocks.queries == blocks.keys and masks.only_causal:
        k, v = _cleared(k, columns), _cleared(v, columns)
        columns = rows  # padding sits behind every token: no need to leave it out
    return _calls(q, k, v, masks, rows, columns)


def _cleared(x: torch.Tensor, tokens: Sequence[Piece]) -> torch.Tensor:
    """Keys or values with zeros for padding: a weight of 0 leaves nothing of a number, but NaN."""
    if sum(piece.length for piece in tokens) == x.shape[2]:
        return x
    cleared = torch.zeros_like(x)
    for piece in tokens:
        cleared.narrow(2, piece.offset, piece.length).copy_(
            x.narrow(2, piece.offset, piece.length)
        )
    return cleared


@dataclass(frozen=True)
class _Scoring:
    """How q k^T becomes scores, before masks."""

    scale: float
    softcap: float | None


@dataclass(frozen=True)
class _Masks:
    """What hides keys: by key, by query and key, and by position."""

    by_key: torch.Tensor | None
    by_pair: torch.Tensor | None
    band: Band

    @property
    def only_positions(self) -> bool:
        return self.by_key is None and self.by_pair is None

    @property
    def only_causal(self) -> bool:
        return self.band.is_causal and self.only_positions


@dataclass(frozen=True)
class _KernelCall:
    """What one call of a kernel computes: a run of the queries, from row `first` on.

    A call that `adds` goes on from what another call has made of the same rows.
    """

    first: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    causal: bool = False
    mask: torch.Tensor | None = None
    adds: bool = False


def _calls(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    masks: _Masks,
    rows: tuple[Piece, ...],
    columns: tuple[Piece, ...],
) -> list[_KernelCall]:
    """As few as the positions allow, each over what its rows see; together all rows, in order.

    Rows that see their own positions, and others in full, are two calls, neither of which needs a
    mask: the second one adds to the first.
    """
    if masks.only_causal and rows == columns and rise(rows) and q.shape[2] == k.shape[2]:
        # Positions rise along both, in step: the kernel's own causal mask is the right one.
        return [_KernelCall(0, q, k, v, causal=True)]
    plan: list[tuple[Piece, _Seen]] = []
    added: list[tuple[Piece, _Seen]] = []
    for row in rows:
        seen = _visible(row, columns, masks.band)
        full = tuple(each for each in seen if each[1] == "full")
        own = tuple(each for each in seen if each[1] == "partial")
        if full and masks.only_positions and _is_own(row, own, masks.band):
            added.append((row, own))
            seen = full
        plan.append((row, seen))
    made = [_call(q, k, v, masks, run, seen) for run, seen in _runs(plan)]
    later = [_call(q, k, v, masks, (row,), own) for row, own in added]
    return made + [replace(call, adds=True) for call in later]


def _is_own(row: Piece, seen: _Seen, band: Band) -> bool:
    """Whether what a run of rows sees is its own positions up to each of them."""
    return len(seen) == 1 and is_diagonal(row, seen[0][0], band)


def _attended(calls: list[_KernelCall], scoring: _Scoring, wide: bool = False) -> State:
    """The state of all their rows."""
    added = [call for call in calls if call.adds]
    states = [
        kernels.attend(
            call.q, call.k, call.v, scale=scoring.scale, causal=call.causal, mask=call.mask,
            softcap=scoring.softcap, wide=wide or bool(added),
        )
        for call in calls if not call.adds
    ]
    if len(states) == 1:
        out, lse = states[0]
    else:
        outs, lses = zip(*states, strict=True)
        # Tokens first, as keys come: what reads them by token then reads memory in order.
        out = torch.cat([x.permute(2, 0, 1, 3) for x in outs]).permute(1, 2, 0, 3)
        lse = torch.cat(lses, 2)
    for call in added:
        _add(out, lse, call, call.first, scoring)
    return [out if wide or not added else out.to(calls[0].q.dtype), lse]


def _add(
    out: torch.Tensor, lse: torch.Tensor, call: _KernelCall, start: int, scoring: _Scoring
) -> None:
    """Fold a call into the rows of an accumulator from `start` on."""
    rows = start, call.q.shape[2]
    kernels.attend_merge(
        out.narrow(2, *rows), lse.narrow(2, *rows), call.q, call.k, call.v,
        scale=scoring.scale, causal=call.causal, mask=call.mask, softcap=scoring.softcap,
    )


# Larger than any sequence: query rows are never cut off, padded ones are dropped at the exit.
_NO_LIMIT = 2**62
_Seen = tuple[tuple[Piece, str], ...]


def _visible(row: Piece, columns: Sequence[Piece], band: Band) -> _Seen:
    """The columns a run of rows sees, each with its relation."""
    relations = (
        (
            column,
            band.relation(
                row.start - (column.start + column.length - 1),
                row.start + row.length - 1 - column.start,
            ),
        )
        for column in columns
    )
    return tuple((column, relation) for column, relation in relations if relation != "empty")


def _runs(plan: list[tuple[Piece, _Seen]]) -> list[tuple[tuple[Piece, ...], _Seen]]:
    """Join neighbouring rows that see the same columns in full: one kernel call serves them."""
    runs: list[tuple[tuple[Piece, ...], _Seen]] = []
    for row, seen in plan:
        if runs and runs[-1][1] == seen and all(relation == "full" for _, relation in seen):
            runs[-1] = ((*runs[-1][0], row), seen)
        else:
            runs.append(((row,), seen))
    return runs


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    masks: _Masks,
    rows: tuple[Piece, ...],
    seen: _Seen,
) -> _KernelCall:
    """These rows over the columns that they see."""
    first, num_rows = rows[0].offset, sum(row.length for row in rows)
    columns = [column for column, _ in seen]
    k, v = (_take(x, [(c.offset, c.length) for c in columns], 2) for x in (k, v))
    if masks.only_positions and len(rows) == 1 and _is_own(rows[0], seen, masks.band):
        return _KernelCall(first, q.narrow(2, first, num_rows), k, v, causal=True)
    by_position = [(c.start, c.length) for c in columns]
    parts = []
    if any(relation == "partial" for _, relation in seen):
        parts.append(
            masks.band.mask(
                torch.cat([row.positions(q.device) for row in rows]),
                torch.cat([column.positions(q.device) for column in columns]),
            )
        )
    if masks.by_key is not None:
        parts.append(_columns(masks.by_key, by_position))
    if masks.by_pair is not None:
        pairs = masks.by_pair
        pairs = pairs if pairs.shape[2] == 1 else pairs.narrow(2, first, num_rows)
        parts.append(_columns(pairs, by_position))
    return _KernelCall(first, q.narrow(2, first, num_rows), k, v, mask=combine(parts))


def _columns(mask: torch.Tensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The columns of a mask for keys at these positions; a mask with one column is for all keys."""
    return mask if mask.shape[3] == 1 else _take(mask, runs, 3)


def _take(x: torch.Tensor, runs: Sequence[tuple[int, int]], dim: int) -> torch.Tensor:
    """The runs (start, length) of a dim, one behind the other; a view where they are one run."""
    if not runs:
        return x.narrow(dim, 0, 0)
    if all(a[0] + a[1] == b[0] for a, b in pairwise(runs)):
        return x.narrow(dim, runs[0][0], sum(length for _, length in runs))
    return torch.cat([x.narrow(dim, start, length) for start, length in runs], dim)


def combine(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """One mask from several: bool ones are and-ed, additive ones added, bool into additive."""
    flags = [part for part in parts if part.dtype == torch.bool]
    biases = [part for part in parts if part.dtype != torch.bool]
    visible = reduce(operator.and_, flags) if flags else None
    if not biases:
        return visible
    bias = reduce(operator.add, biases)
    return bias if visible is None else torch.where(visible, bias, float("-inf"))


def merge(state: State, block: State, *, start: int) -> State:
    """Fold a block's result into the state's rows from `start` on; the state is used up.

    The accumulator is float32 whatever the inputs are, and float64 for float64.
    """
    out, lse = _accumulator(state)
    num_rows = block[1].shape[2]
    kernels.merge(out.narrow(2, start, num_rows), lse.narrow(2, start, num_rows), *block)
    return [out, lse]


def _accumulator(state: State) -> State:
    """The state's tensors, out as precise as lse."""
    out, lse = state
    return [out if out.dtype == lse.dtype else out.to(lse.dtype), lse]


def finish(
    state: State, sink: torch.Tensor | None = None, *, dtype: torch.dtype
) -> torch.Tensor:
    """The attention output [B,H,S,E] of a state that has seen all keys, in the model's dtype.

    A sink is one more score in the softmax of every query, with the value 0 (gpt-oss, 2025). The
    weights of the keys, exp(x) / (sum + exp(sink)) instead of exp(x) / sum, shrink by the factor
    sum / (sum + exp(sink)) = sigmoid(lse - sink) of their row, so that it can be applied once,
    whichever blocks made the state. A row that sees no key stays 0.

    Args:
        state: [out, lse].
        sink: [H], a score for every query head.
        dtype: the model's.
    """
    out, lse = state
    if sink is None:
        return out.to(dtype)
    weight = torch.sigmoid(lse - sink.to(lse.dtype)[:, None])
    # A head whose sink is -inf, in a row that sees no key: -inf - -inf is NaN.
    weight = weight.masked_fill_(lse.isneginf(), 0.0)
    return (out * weight.unsqueeze(-1)).to(dtype)
