"""The merge of two results of attention over different keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ringcompile.errors import RingCompileError

_NUM_MERGE_ROWS = 256


def merge(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Fold the result of one more block of keys into an accumulator, in place.

        lse' = log(exp(lse) + exp(lse_b));  out' = out + sigmoid(lse_b - lse) * (out_b - out)

    which is the online softmax of FlashAttention (Dao et al., 2022) over whole blocks. A side
    whose LSE is -inf (and out 0) has no weight.

    Args:
        out: [..., S, E], float32 or float64; may be a view of a larger accumulator, as may lse.
        lse: [..., S] in out's dtype.
        out_b: [..., S, E] of the block, in out's dtype or a narrower one.
        lse_b: [..., S] of the block, likewise.

    Raises:
        RingCompileError: shapes differ, or a dtype would lose precision in the merge.
    """
    check_states(out, lse, out_b, lse_b)
    lse_b = lse_b.to(lse.dtype)
    # Where lse_b is -inf the weight is 0; set, because -inf - -inf is NaN. A NaN of lse_b stays.
    weight = torch.sigmoid(lse_b - lse).masked_fill_(lse_b.isneginf(), 0.0).unsqueeze(-1)
    if out_b.dtype == out.dtype:
        out.lerp_(out_b, weight)
    else:
        # A few rows at a time: all of out_b at once would be widened into newly mapped memory,
        # which costs several times the merge. A GPU's allocator keeps its memory: one launch.
        num_rows = _NUM_MERGE_ROWS if out.is_cpu else max(out.shape[-2], 1)
        for start in range(0, out.shape[-2], num_rows):
            rows = slice(start, start + num_rows)
            out[..., rows, :].lerp_(out_b[..., rows, :].to(out.dtype), weight[..., rows, :])
    torch.logaddexp(lse, lse_b, out=lse)


def check_states(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Raise RingCompileError for states that cannot be merged."""
    if out.shape != out_b.shape or lse.shape != lse_b.shape or out.shape[:-1] != lse.shape:
        raise RingCompileError(
            f"states to merge differ: out {list(out.shape)} and {list(out_b.shape)}, "
            f"lse {list(lse.shape)} and {list(lse_b.shape)}"
        )
    wide = out.dtype in (torch.float32, torch.float64) and lse.dtype == out.dtype
    blocks = (out_b.dtype, lse_b.dtype)
    if not wide or any(torch.promote_types(dtype, out.dtype) != out.dtype for dtype in blocks):
        raise RingCompileError(
            f"merge would lose precision: out {out.dtype}, lse {lse.dtype}, "
            f"block out {out_b.dtype}, block lse {lse_b.dtype}",
            hint="accumulate in float32, or float64 for float64",
        )


def check_accumulator(
    out: Tensor, lse: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Raise RingCompileError where out and lse cannot take a block's output of this shape."""
    if tuple(out.shape) != shape or tuple(lse.shape) != shape[:-1]:
        raise RingCompileError(
            f"the accumulator, out {list(out.shape)} and lse {list(lse.shape)}, does not fit a "
            f"block whose output is {list(shape)}"
        )
    if out.dtype != dtype or lse.dtype != dtype:
        raise RingCompileError(
            f"the accumulator is {out.dtype} and {lse.dtype}, this block needs {dtype}",
            hint="accumulate in float32, or float64 for float64",
        )
