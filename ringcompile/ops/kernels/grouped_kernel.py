"""Rows sorted by expert, each times the matrix of its own, in Triton: any GPU, and the CPU.

Each expert's rows are cut into tiles, and each program finds its tile in the ends of the experts'
rows on the device: the host need not know how many rows an expert has. There are as many programs
as tiles can be, one more than whole tiles for each expert; what is too many does nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _INNER = 128, 64
_FEW, _MANY = 32, 128


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x, ends, weight, out, num_rows, num_experts, inner, columns,
    x_row, x_inner, weight_expert, weight_column, weight_inner, out_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One tile of the rows of one expert, by BLOCK_N columns; rows without an expert give 0."""
    tile = tl.program_id(0)
    # The expert whose tile this is; behind the last one are the rows without.
    start, before, expert = 0, 0, num_experts
    first, last = num_rows, num_rows
    for number in range(num_experts):
        end = tl.load(ends + number)
        after = before + tl.cdiv(end - start, BLOCK_M)
        here = (tile >= before) & (tile < after)
        expert = tl.where(here, number, expert)
        first = tl.where(here, start + (tile - before) * BLOCK_M, first)
        last = tl.where(here, end, last)
        start, before = end, after
    first = tl.where(tile >= before, start + (tile - before) * BLOCK_M, first)

    rows = first + tl.arange(0, BLOCK_M)
    wide = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = rows < last, wide < columns
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if expert < num_experts:
        deep = tl.arange(0, BLOCK_K)
        x_at = x + rows.to(tl.int64)[:, None] * x_row
        weight_at = weight + expert.to(tl.int64) * weight_expert + wide[None, :] * weight_column
        for begin in range(0, inner, BLOCK_K):
            at = begin + deep
            is_inner = at < inner
            a = tl.load(
                x_at + at[None, :] * x_inner, is_row[:, None] & is_inner[None, :], other=0.0
            )
            b = tl.load(
                weight_at + at.to(tl.int64)[:, None] * weight_inner,
                is_inner[:, None] & is_column[None, :], other=0.0,
            )
            acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(
        out + rows.to(tl.int64)[:, None] * out_row + wide[None, :],
        acc.to(out.dtype.element_ty), is_row[:, None] & is_column[None, :],
    )


def launch(rows: Tensor, ends: Tensor, matrices: Tensor, out: Tensor) -> None:
    """Write rows [N,I] times their matrices [E,O,I] to out [N,O], which is contiguous."""
    (num_rows, inner), (num_experts, columns) = rows.shape, matrices.shape[:2]
    block_m = _FEW if num_rows <= _FEW * num_experts else _MANY
    tiles = triton.cdiv(num_rows, block_m) + num_experts + 1
    _multiply[(tiles, triton.cdiv(columns, _COLUMNS))](
        rows, ends, matrices, out, num_rows, num_experts, inner, columns,
        *rows.stride(), *matrices.stride(), out.stride(0),
        BLOCK_M=block_m, BLOCK_N=_COLUMNS, BLOCK_K=_INNER if rows.element_size() <= 2 else 32,
        num_warps=8 if block_m == _MANY else 4, num_stages=3,
    )
