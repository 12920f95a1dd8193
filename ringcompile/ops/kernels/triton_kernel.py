"""Attention for head dims of 257 to 512 in Triton: any GPU with a tensor copy engine, and the CPU.

Accumulators of [64, 512] float32 fill half the registers of a multiprocessor. They stay there only
if Triton deals both products out to its two groups of four warps by columns, which it does as long
as no product's result flows into another product. So the scores of the next keys are computed one
turn ahead and carried over to the turn that uses them.

The block is folded into what out and LSE hold already by starting from it: an accumulator `out`
with the maximum `lse` and the sum 1 is the state of an online softmax that has seen those keys.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ringcompile.ops.kernels.contract import BlockCall

_LOG2_E = 1.4426950408889634
_BLOCK_M, _BLOCK_N, _BLOCK_D = 64, 64, 512


@triton.jit
def _tile(tensor, batch, head, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of one head, zeros behind the last and beyond the head dim."""
    return tensor.load([batch, head, row, 0]).reshape(ROWS, COLUMNS)


@triton.jit
def _add_keys(scores, v, top, total, acc, scale):
    """One turn of the online softmax, in base 2."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return new_top, total, acc


@triton.jit(do_not_specialize=["num_rows", "num_keys", "num_heads", "group_size", "num_tiles"])
def _attend(
    q, k, v, out, lse,
    num_rows, num_keys, num_heads, group_size, num_tiles, value_dim, scale,
    out_batch, out_head, out_row, lse_batch, lse_head, lse_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, FOLD: tl.constexpr,
):
    """One tile of BLOCK_M queries of one head; `scale` includes log2(e)."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    # Causal: the tiles with the most keys first, so that the last to finish are short.
    num_all = tl.num_programs(0) // num_tiles
    if CAUSAL:
        tile = num_tiles - 1 - tl.program_id(0) // num_all
        batch_head = tl.program_id(0) % num_all
    else:
        tile = tl.program_id(0) % num_tiles
        batch_head = tl.program_id(0) // num_tiles
    batch, head = batch_head // num_heads, batch_head % num_heads
    kv_head = head // group_size
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    lse_at = lse + batch.to(tl.int64) * lse_batch + head.to(tl.int64) * lse_head + rows * lse_row
    out_at = (
        out + batch.to(tl.int64) * out_batch + head.to(tl.int64) * out_head
        + rows.to(tl.int64)[:, None] * out_row + columns[None, :]
    )
    kept = (rows < num_rows)[:, None] & (columns < value_dim)[None, :]

    queries = _tile(q, batch, head, first, BLOCK_M, BLOCK_D)
    if FOLD:
        before = tl.load(lse_at, rows < num_rows, other=float("-inf"))
        top = before * LOG2_E
        total = tl.where(before == float("-inf"), 0.0, 1.0)
        acc = tl.load(out_at, kept, other=0.0)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # Only the last tile of keys needs a mask: the diagonal, or the end of the keys.
    num_blocks = tl.cdiv((tile + 1) * BLOCK_M if CAUSAL else num_keys, BLOCK_N)
    keys = _tile(k, batch, kv_head, 0, BLOCK_N, BLOCK_D)
    scores = tl.dot(queries, keys.T)
    for block in tl.range(0, num_blocks - 1):
        keys = _tile(k, batch, kv_head, (block + 1) * BLOCK_N, BLOCK_N, BLOCK_D)
        next_scores = tl.dot(queries, keys.T)
        values = _tile(v, batch, kv_head, block * BLOCK_N, BLOCK_N, BLOCK_D)
        top, total, acc = _add_keys(scores, values, top, total, acc, scale)
        scores = next_scores
    start = (num_blocks - 1) * BLOCK_N
    values = _tile(v, batch, kv_head, start, BLOCK_N, BLOCK_D)
    seen = start + tl.arange(0, BLOCK_N)
    if CAUSAL:
        scores = tl.where(seen[None, :] <= rows[:, None], scores, float("-inf"))
    else:
        scores = tl.where(seen[None, :] < num_keys, scores, float("-inf"))
    top, total, acc = _add_keys(scores, values, top, total, acc, scale)

    tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), kept)
    tl.store(lse_at, (top + tl.log2(total)) / LOG2_E, rows < num_rows)


def launch(call: BlockCall, out: Tensor, lse: Tensor, *, fold: bool) -> None:
    """Write attention over the call's keys to out and LSE, or fold it into them."""
    (batch, heads, num_rows, _), (groups, num_keys) = call.q.shape, call.k.shape[1:3]
    num_tiles = triton.cdiv(num_rows, _BLOCK_M)
    _attend[(num_tiles * batch * heads,)](
        _described(call.q, _BLOCK_M), _described(call.k, _BLOCK_N), _described(call.v, _BLOCK_N),
        out, lse,
        num_rows, num_keys, heads, heads // groups, num_tiles, out.shape[3], call.scale * _LOG2_E,
        *out.stride()[:3], *lse.stride(),
        BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_D=_BLOCK_D,
        CAUSAL=call.causal, FOLD=fold,
        num_warps=8, num_stages=1,
    )


def _described(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, _BLOCK_D])
