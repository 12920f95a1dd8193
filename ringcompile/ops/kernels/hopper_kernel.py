"""Attention for head dims of 257 to 512 on Hopper (compute capability 9.0), in Gluon.

There is one program a multiprocessor, and it takes one tile of 64 queries of a head after another.
It has three groups of four warps, each with a part of its own:

    scores   S = Q K^T, the online softmax, weights P to shared memory     loads Q and K
    left     O[:, :256] = shrink * O[:, :256] + P V[:, :256]               loads its half of V
    right    O[:, 256:], likewise                                          loads its half of V

While one group exponentiates or shrinks its accumulator, the others keep the matrix units busy. K
comes in pieces of 128 columns, V of 16 rows, through rings of slots in shared memory; whoever has
used a slot up asks the copy engine for what comes next, so that no warps are spent on loading. P
has two buffers: scores for the next keys, or the next tile, are computed while the last weights are
used, and while an output is written.

Whole tiles of 64 keys, [64, 512] each, would not fit twice beside the queries. Registers: 12 warps
leave 168 a thread, of which half an accumulator of [64, 512] float32 takes 128.

The block is folded into what out and LSE hold already by starting from it: an accumulator `out`
with the maximum `lse` and the sum 1 is the state of an online softmax that has seen those keys.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringcompile.ops.kernels.contract import BlockCall
from ringcompile.ops.kernels.hopper_parts import (
    barriers,
    copy,
    fetch,
    num_own,
    places,
    wait_for_all,
    work,
)

_LOG2_E = 1.4426950408889634
_BLOCK_M, _BLOCK_N = 64, 64
_K_COLUMNS, _K_SLOTS = 128, 4
_V_ROWS, _V_COLUMNS, _V_SLOTS = 16, 256, 4


@gluon.jit
def _score_tile(
    block, turn, piece, end, top, total, queries, k, k_ring, k_full, weights, weights_full,
    weights_empty, shrinks, totals, scale, batch, kv_head, first, num_keys,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr, PIECES: gl.constexpr,
    SLOTS: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr, LAYOUT: gl.constexpr,
):
    """Weights of one tile of keys, handed over; returns the next piece and the softmax so far.

    `turn` counts tiles of keys, and `piece` pieces of them, since the program began.
    """
    scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, LAYOUT)
    for i in gl.static_range(PIECES):
        slot = piece % SLOTS
        mbarrier.wait(k_full.index(slot), (piece // SLOTS) & 1)
        scores = warpgroup_mma(
            queries.index(i).reshape((BLOCK_M, COLUMNS)),
            k_ring.index(slot).reshape((BLOCK_N, COLUMNS)).permute((1, 0)),
            scores, use_acc=i > 0, is_async=True,
        )
        if i > 0:  # the product before this one is done: its slot is free
            scores = warpgroup_mma_wait(1, deps=[scores])
            wait_for_all()
            fetch(
                k, k_ring, k_full, piece - 1 + SLOTS, end, block * PIECES + i - 1 + SLOTS, batch,
                kv_head, 0, BLOCK_N, COLUMNS, PIECES, SLOTS,
            )
        piece += 1
    scores = warpgroup_mma_wait(0, deps=[scores])
    wait_for_all()
    fetch(
        k, k_ring, k_full, piece - 1 + SLOTS, end, (block + 1) * PIECES - 1 + SLOTS, batch,
        kv_head, 0, BLOCK_N, COLUMNS, PIECES, SLOTS,
    )
    if MASK:
        keys = block * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        if CAUSAL:
            rows = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
            scores = gl.where(keys[None, :] <= rows[:, None], scores, float("-inf"))
        else:
            scores = gl.where(keys[None, :] < num_keys, scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    tile = gl.exp2(scores * scale - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    total = total * shrink + gl.sum(tile, 1)

    buffer = turn % 2
    mbarrier.wait(weights_empty.index(buffer), ((turn // 2) & 1) ^ 1)
    weights.index(buffer).store(tile.to(weights.dtype))
    shrinks.index(buffer).store(shrink)
    if MASK:  # the last of its tile of queries
        totals.index(buffer).store(total)
    fence_async_shared()
    wait_for_all()
    mbarrier.arrive(weights_full.index(buffer))
    return piece, new_top, total


@gluon.jit
def _scores(
    q, queries, q_full, k, k_ring, k_full, weights, weights_full, weights_empty, shrinks, totals,
    lse, lse_batch, lse_head, lse_row, scale, num_rows, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr, PIECES: gl.constexpr,
    SLOTS: gl.constexpr, CAUSAL: gl.constexpr, FOLD: gl.constexpr,
):
    """The part of the group that computes weights."""
    LOG2_E: gl.constexpr = 1.4426950408889634
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    num_keys = sizes[0]
    rows = gl.arange(0, BLOCK_M, ROW)
    piece = 0
    turn = 0
    for number in range(num_own(sizes[4])):
        batch, head, kv_head, first, num_blocks = work(number, sizes, CAUSAL, BLOCK_M, BLOCK_N)
        end = piece + num_blocks * PIECES
        mbarrier.expect(q_full, BLOCK_M * COLUMNS * PIECES * 2)
        for i in gl.static_range(PIECES):
            copy(q, [batch, head, first, i * COLUMNS], q_full, queries.index(i))
        for i in gl.static_range(SLOTS):
            fetch(
                k, k_ring, k_full, piece + i, end, i, batch, kv_head, 0,
                BLOCK_N, COLUMNS, PIECES, SLOTS,
            )
        kept = first + rows < num_rows
        lse_at = lse + batch.to(gl.int64) * lse_batch + head.to(gl.int64) * lse_head
        lse_at = lse_at + (first + rows) * lse_row
        if FOLD:
            before = gl.load(lse_at, mask=kept, other=float("-inf"))
            top = before * LOG2_E
            total = gl.where(before == float("-inf"), 0.0, 1.0)
        else:
            top = gl.full([BLOCK_M], float("-inf"), gl.float32, ROW)
            total = gl.full([BLOCK_M], 0.0, gl.float32, ROW)
        mbarrier.wait(q_full, number & 1)
        # Only the last tile of keys needs a mask: the diagonal, or the end of the keys.
        for block in range(num_blocks - 1):
            piece, top, total = _score_tile(
                block, turn, piece, end, top, total, queries, k, k_ring, k_full, weights,
                weights_full, weights_empty, shrinks, totals, scale, batch, kv_head, first,
                num_keys,
                BLOCK_M, BLOCK_N, COLUMNS, PIECES, SLOTS, False, CAUSAL, LAYOUT,
            )
            turn += 1
        piece, top, total = _score_tile(
            num_blocks - 1, turn, piece, end, top, total, queries, k, k_ring, k_full, weights,
            weights_full, weights_empty, shrinks, totals, scale, batch, kv_head, first, num_keys,
            BLOCK_M, BLOCK_N, COLUMNS, PIECES, SLOTS, True, CAUSAL, LAYOUT,
        )
        turn += 1
        gl.store(lse_at, (top + gl.log2(total)) / LOG2_E, mask=kept)


@gluon.jit
def _values(
    v, ring, full, weights, weights_full, weights_empty, shrinks, totals,
    out, out_batch, out_head, out_row, num_rows, value_dim, sizes, column,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    SLOTS: gl.constexpr, CAUSAL: gl.constexpr, FOLD: gl.constexpr,
):
    """The part of a group that accumulates half the columns of the output."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    PIECES: gl.constexpr = BLOCK_N // ROWS
    piece = 0
    turn = 0
    for number in range(num_own(sizes[4])):
        batch, head, kv_head, first, num_blocks = work(number, sizes, CAUSAL, BLOCK_M, BLOCK_N)
        end = piece + num_blocks * PIECES
        for i in gl.static_range(SLOTS):
            fetch(
                v, ring, full, piece + i, end, i, batch, kv_head, column, ROWS, COLUMNS, 1, SLOTS
            )
        at = out + batch.to(gl.int64) * out_batch + head.to(gl.int64) * out_head
        at += first.to(gl.int64) * out_row + column
        if FOLD:
            out_at, kept = places(
                at, out_row, num_rows - first, value_dim - column, BLOCK_M, COLUMNS, LAYOUT
            )
            acc = gl.load(out_at, mask=kept, other=0.0)
        else:
            acc = gl.zeros([BLOCK_M, COLUMNS], gl.float32, LAYOUT)
        for block in range(num_blocks):
            buffer = turn % 2
            mbarrier.wait(weights_full.index(buffer), (turn // 2) & 1)
            shrink = shrinks.index(buffer).load(ROW)
            acc = acc * shrink[:, None]
            for i in gl.static_range(PIECES):
                slot = piece % SLOTS
                mbarrier.wait(full.index(slot), (piece // SLOTS) & 1)
                acc = warpgroup_mma(
                    weights.index(buffer).slice(i * ROWS, ROWS, 1),
                    ring.index(slot).reshape((ROWS, COLUMNS)), acc, is_async=True,
                )
                if i > 0:  # the product before this one is done: its slot is free
                    acc = warpgroup_mma_wait(1, deps=[acc])
                    wait_for_all()
                    fetch(
                        v, ring, full, piece - 1 + SLOTS, end, block * PIECES + i - 1 + SLOTS,
                        batch, kv_head, column, ROWS, COLUMNS, 1, SLOTS,
                    )
                piece += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            wait_for_all()
            fetch(
                v, ring, full, piece - 1 + SLOTS, end, (block + 1) * PIECES - 1 + SLOTS,
                batch, kv_head, column, ROWS, COLUMNS, 1, SLOTS,
            )
            if block < num_blocks - 1:
                mbarrier.arrive(weights_empty.index(buffer))
            turn += 1
        # The sums came with the last weights, and are read before these are given back.
        total = totals.index((turn - 1) % 2).load(ROW)
        wait_for_all()
        mbarrier.arrive(weights_empty.index((turn - 1) % 2))
        # Not before the loop, where 128 addresses would need as many registers.
        out_at, kept = places(
            at, out_row, num_rows - first, value_dim - column, BLOCK_M, COLUMNS, LAYOUT
        )
        gl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=kept)


@gluon.jit(do_not_specialize=["num_rows", "num_keys", "num_heads", "group_size", "num_items"])
def attend(
    q, k, v, out, lse,
    num_rows, num_keys, num_heads, group_size, num_items, value_dim, scale,
    out_batch, out_head, out_row, lse_batch, lse_head, lse_row,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, K_COLUMNS: gl.constexpr, K_PIECES: gl.constexpr,
    K_SLOTS: gl.constexpr, V_ROWS: gl.constexpr, V_COLUMNS: gl.constexpr, V_SLOTS: gl.constexpr,
    CAUSAL: gl.constexpr, FOLD: gl.constexpr,
):
    """All tiles of BLOCK_M queries of all heads, `num_items`; `scale` includes log2(e)."""
    queries = gl.allocate_shared_memory(q.dtype, [K_PIECES, 1, 1, BLOCK_M, K_COLUMNS], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [K_SLOTS, 1, 1, BLOCK_N, K_COLUMNS], k.layout)
    left = gl.allocate_shared_memory(v.dtype, [V_SLOTS, 1, 1, V_ROWS, V_COLUMNS], v.layout)
    right = gl.allocate_shared_memory(v.dtype, [V_SLOTS, 1, 1, V_ROWS, V_COLUMNS], v.layout)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_N], q.dtype)
    weights = gl.allocate_shared_memory(q.dtype, [2, BLOCK_M, BLOCK_N], WEIGHTS)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shrinks = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], VECTOR)
    totals = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], VECTOR)
    q_full = barriers(1, 1).index(0)
    k_full = barriers(K_SLOTS, 1)
    left_full = barriers(V_SLOTS, 1)
    right_full = barriers(V_SLOTS, 1)
    weights_full = barriers(2, 1)
    weights_empty = barriers(2, 2)
    fence_async_shared()
    num_tiles = (num_rows + BLOCK_M - 1) // BLOCK_M
    sizes = (num_keys, num_heads, group_size, num_tiles, num_items)

    gl.warp_specialize([
        (_scores, (
            q, queries, q_full, k, k_ring, k_full, weights, weights_full, weights_empty, shrinks,
            totals, lse, lse_batch, lse_head, lse_row, scale, num_rows, sizes,
            BLOCK_M, BLOCK_N, K_COLUMNS, K_PIECES, K_SLOTS, CAUSAL, FOLD,
        )),
        (_values, (
            v, left, left_full, weights, weights_full, weights_empty, shrinks, totals,
            out, out_batch, out_head, out_row, num_rows, value_dim, sizes, 0,
            BLOCK_M, BLOCK_N, V_ROWS, V_COLUMNS, V_SLOTS, CAUSAL, FOLD,
        )),
        (_values, (
            v, right, right_full, weights, weights_full, weights_empty, shrinks, totals,
            out, out_batch, out_head, out_row, num_rows, value_dim, sizes, V_COLUMNS,
            BLOCK_M, BLOCK_N, V_ROWS, V_COLUMNS, V_SLOTS, CAUSAL, FOLD,
        )),
    ], [4, 4], [168, 168])


def launch(call: BlockCall, out: Tensor, lse: Tensor, *, fold: bool) -> None:
    """Write attention over the call's keys to out and LSE, or fold it into them."""
    (batch, heads, num_rows, head_dim), (groups, num_keys) = call.q.shape, call.k.shape[1:3]
    num_items = -(-num_rows // _BLOCK_M) * batch * heads
    attend[(min(num_items, _num_multiprocessors(call.q.device.index)),)](
        _described(call.q, _BLOCK_M, _K_COLUMNS),
        _described(call.k, _BLOCK_N, _K_COLUMNS),
        _described(call.v, _V_ROWS, _V_COLUMNS),
        out, lse,
        num_rows, num_keys, heads, heads // groups, num_items, out.shape[3], call.scale * _LOG2_E,
        *out.stride()[:3], *lse.stride(),
        **constants(head_dim, causal=call.causal, fold=fold),
        num_warps=4,
    )


@lru_cache
def _num_multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def constants(head_dim: int, *, causal: bool, fold: bool) -> dict[str, int | bool]:
    """The compile-time arguments of `attend`."""
    return {
        "BLOCK_M": _BLOCK_M, "BLOCK_N": _BLOCK_N, "K_COLUMNS": _K_COLUMNS,
        "K_PIECES": -(-head_dim // _K_COLUMNS), "K_SLOTS": _K_SLOTS, "V_ROWS": _V_ROWS,
        "V_COLUMNS": _V_COLUMNS, "V_SLOTS": _V_SLOTS, "CAUSAL": causal, "FOLD": fold,
    }


@lru_cache  # making one takes as long as ten launches
def layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    """How a piece of a tensor lies in shared memory; the same for both halves."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], gl.float16)


def _described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    block = [1, 1, rows, columns]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout(rows, columns))
