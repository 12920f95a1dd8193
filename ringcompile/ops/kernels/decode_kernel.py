"""Attention of a few queries over many keys in Triton, as decoding takes it: any GPU, and the CPU.

The query heads of one KV head are rows of one tile, so that each key is read once for all of them.
A few queries alone would keep a few multiprocessors busy; so keys are cut into parts that are
attended to side by side, and a second kernel brings their results together by log-sum-exps
(Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringcompile.ops.kernels.contract import BlockCall

_LOG2_E = 1.4426950408889634
# Keys that a part has at least: fewer cost more in their own launch and merge than they save.
_KEYS_A_PART = 256
_MOST_PARTS = 128
# Multiprocessors that Triton's interpreter is taken to have.
_ON_CPU = 8


@triton.jit
def _hidden_as(bias, seen, BOOLEAN: tl.constexpr):
    """What a mask adds to scores in base 2; -inf at keys that are none."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    if BOOLEAN:
        return tl.where(seen & (bias != 0), 0.0, float("-inf"))
    return tl.where(seen, bias.to(tl.float32) * LOG2_E, float("-inf"))


@triton.jit(do_not_specialize=["num_queries", "num_keys", "part_keys"])
def _attend(
    q, k, v, mask, out, lse,
    num_queries, num_keys, part_keys, num_kv_heads, group_size, key_dim, value_dim, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_key,
    out_part, out_batch, out_head, out_row, lse_part, lse_batch, lse_head, lse_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr, BOOLEAN: tl.constexpr, CAPPED: tl.constexpr, CAUSAL: tl.constexpr,
):
    """A tile of the rows of one KV head over one part of its keys; `scale` includes log2(e).

    Row r is query r // group_size of head r % group_size among those of the KV head.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    part = tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = rows // group_size
    head = kv_head * group_size + rows % group_size
    is_row = query < num_queries
    dims, width = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)

    rows_at = q + batch * q_batch + head * q_head + query * q_row
    queries = tl.load(
        rows_at[:, None] + dims[None, :], is_row[:, None] & (dims < key_dim)[None, :], other=0.0
    )
    k_at, v_at = k + batch * k_batch + kv_head * k_head, v + batch * v_batch + kv_head * v_head
    mask_at = mask + batch * mask_batch + head * mask_head + query * mask_row

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    last = tl.minimum((part + 1) * part_keys, num_keys)
    for first in tl.range(part * part_keys, last, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        is_key = key < last
        keys = tl.load(
            k_at + key.to(tl.int64)[:, None] * k_row + dims[None, :],
            is_key[:, None] & (dims < key_dim)[None, :], other=0.0,
        )
        scores = tl.dot(queries, keys.T, input_precision="ieee") * scale
        if CAPPED:
            # cap * tanh(score / cap), by the exponential of twice its size, which stays below 1.
            bent = scores / (cap * LOG2_E)
            shrunk = tl.exp2(-2 * LOG2_E * tl.abs(bent))
            size = (1 - shrunk) / (1 + shrunk) * (cap * LOG2_E)
            scores = tl.where(bent < 0, -size, size)
        seen = is_key[None, :] & is_row[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= query[:, None])
        if MASKED:
            bias = tl.load(mask_at[:, None] + key[None, :] * mask_key, seen, other=0)
            scores += _hidden_as(bias, seen, BOOLEAN)
        else:
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(
            v_at + key.to(tl.int64)[:, None] * v_row + width[None, :],
            is_key[:, None] & (width < value_dim)[None, :], other=0.0,
        )
        acc = acc * shrink[:, None] + tl.dot(
            weights.to(values.dtype), values, input_precision="ieee"
        )
        top = new_top

    blind = total == 0.0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    sums = tl.where(blind, float("-inf"), top + tl.log2(tl.where(blind, 1.0, total))) / LOG2_E
    out_at = out + part.to(tl.int64) * out_part + batch * out_batch + head * out_head
    tl.store(
        (out_at + query * out_row)[:, None] + width[None, :], acc.to(out.dtype.element_ty),
        is_row[:, None] & (width < value_dim)[None, :],
    )
    lse_at = lse + part.to(tl.int64) * lse_part + batch * lse_batch + head * lse_head
    tl.store(lse_at + query * lse_row, sums, is_row)


@triton.jit(do_not_specialize=["num_parts"])
def _merge_parts(
    parts, part_lse, out, lse, num_parts, num_heads, num_queries, value_dim,
    out_batch, out_head, out_row, BLOCK_E: tl.constexpr,
):
    """One row from its parts [parts,B,H,Sq,E] and their log-sum-exps, both contiguous."""
    row = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0).to(tl.int64)
    width = tl.arange(0, BLOCK_E)
    top = tl.load(part_lse + row)
    for part in tl.range(1, num_parts):
        top = tl.maximum(top, tl.load(part_lse + part * num_rows + row))
    base = tl.where(top == float("-inf"), 0.0, top)
    total, acc = tl.zeros([1], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    for part in tl.range(0, num_parts):
        weight = tl.exp(tl.load(part_lse + part * num_rows + row) - base)
        at = parts + (part * num_rows + row) * value_dim
        total += weight
        acc += weight * tl.load(at + width, width < value_dim, other=0.0)
    whole = tl.where(total == 0.0, 1.0, total)
    query, head = row % num_queries, row // num_queries % num_heads
    out_at = out + row // num_queries // num_heads * out_batch + head * out_head + query * out_row
    tl.store(out_at + width, (acc / whole).to(out.dtype.element_ty), width < value_dim)
    one = tl.arange(0, 1)
    tl.store(
        lse + row + one, tl.where(total == 0.0, float("-inf"), base + tl.log(whole))
    )


def launch(call: BlockCall, out: Tensor, lse: Tensor, *, fold: bool) -> None:
    """Write attention over the call's keys to out and LSE [B,H,Sq], which is contiguous."""
    assert not fold, "the caller merges"
    (batch, heads, num_queries, key_dim), (groups, num_keys) = call.q.shape, call.k.shape[1:3]
    group_size, value_dim = heads // groups, call.v.shape[3]
    block_d, block_e = (max(16, triton.next_power_of_2(n)) for n in (key_dim, value_dim))
    widest = max(block_d, block_e) * call.q.element_size()
    block_m = min(max(16, triton.next_power_of_2(group_size * num_queries)), 32)
    block_n = max(16, min(64, 16384 // widest))
    tiles = triton.cdiv(group_size * num_queries, block_m)
    part_keys = _keys_of_a_part(num_keys, batch * groups * tiles, call.q.device, block_n)
    parts = triton.cdiv(num_keys, part_keys)
    part_out, part_lse = out.unsqueeze(0), lse.unsqueeze(0)
    if parts > 1:
        part_out = out.new_empty((parts, *out.shape), dtype=torch.float32)
        part_lse = lse.new_empty((parts, *lse.shape))
    mask = call.mask if call.mask is not None else call.q.new_empty(1, 1, 1, 1)
    by_mask = mask.expand(call.scores).stride()
    boolean = mask.dtype == torch.bool
    _attend[(batch * groups, tiles, parts)](
        call.q, call.k, call.v, mask.view(torch.int8) if boolean else mask, part_out, part_lse,
        num_queries, num_keys, part_keys, groups, group_size, key_dim, value_dim,
        call.scale * _LOG2_E, call.softcap or 1.0,
        *call.q.stride()[:3], *call.k.stride()[:3], *call.v.stride()[:3], *by_mask,
        *part_out.stride()[:4], *part_lse.stride(),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_E=block_e,
        MASKED=call.mask is not None, BOOLEAN=boolean, CAPPED=call.softcap is not None,
        CAUSAL=call.causal, num_warps=4 if widest <= 256 else 8,
    )
    if parts > 1:
        _merge_parts[(batch * heads * num_queries,)](
            part_out, part_lse, out, lse, parts, heads, num_queries, value_dim, *out.stride()[:3],
            BLOCK_E=block_e,
        )


def _keys_of_a_part(num_keys: int, programs: int, device: torch.device, block_n: int) -> int:
    """Keys that a part has, so that all parts together fill the GPU twice: whole blocks."""
    wanted = max(1, min(2 * _multiprocessors(device) // programs, _MOST_PARTS))
    return triton.cdiv(max(triton.cdiv(num_keys, wanted), _KEYS_A_PART), block_n) * block_n


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return _ON_CPU
    return torch.cuda.get_device_properties(device).multi_processor_count
