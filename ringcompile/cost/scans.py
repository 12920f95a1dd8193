"""What prefix sums, recurrences and linear attention cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch

from ringcompile.cost.kernels import Kernel
from ringcompile.cost.work import Work, kernel, product
from ringcompile.ops.linear_attention import BLOCK
from ringcompile.ops.slots import BLOCK as KEPT


def _running_sum(work: Work) -> list[Kernel]:
    """Along the last dim a block of threads shares a row; along others each goes on its own.

    Whole numbers are laid out for the former; see `ops/bodies.py`.
    """
    (x, *_), out = work.operands, work.results[0]
    along_memory = work["dim"] % max(x.dim(), 1) >= x.dim() - 1
    if along_memory or x.is_floating_point():
        steps = 0 if along_memory else x.shape[work["dim"]]
        return [replace(kernel("scan", [x], [out]), rows=steps)]
    return [kernel("strided", [x], [x]), kernel("scan", [x], [out]),
            kernel("strided", [out], [out])]


def _recurrence(work: Work) -> list[Kernel]:
    """Five doublings in blocks of 32 and what each block starts from: six passes over both."""
    return [kernel("stream", work.operands[:2], work.operands[:2])] * 6


def _linear_attention(work: Work) -> list[Kernel]:
    """In blocks of tokens: scores, values, the state of each block, and what is read of it."""
    q, v = work["q"], work["v"]
    alone = q.shape[-2] <= BLOCK and work["state"] is None
    within, states = _in_blocks(q, v, q.shape[-2], BLOCK)
    return within if alone else [*within, *states, _read(q, v, q.shape[-2], BLOCK)]


def _linear_state(work: Work) -> list[Kernel]:
    """As in linear attention, but nothing is read."""
    k, v = work["k"], work["v"]
    return _in_blocks(k, v, k.shape[-2], BLOCK)[1]


def _running_linear_attention(work: Work) -> list[Kernel]:
    """The new tokens with those of their block before them; states are kept block by block."""
    q, v = work["q"], work["v"]
    size = q.shape[-2] + KEPT - 1
    within, states = _in_blocks(q, v, size, KEPT)
    taken = [work[name] for name in ("kept_k", "kept_v", "k", "v")]
    moved = [kernel("strided", taken, taken)]
    return [*moved, *within, *states, _read(q, v, size, KEPT)]


def _in_blocks(
    k: torch.Tensor, v: torch.Tensor, size: int, block: int
) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels of what is within blocks, and of states behind them."""
    heads, length = prod(k.shape[:-2]), min(size, block)
    count, (inner, columns) = -(-size // length), (k.shape[-1], v.shape[-1])
    pairs = torch.empty((heads * count, length, length), dtype=v.dtype, device="meta")
    within = [
        product(heads * count, length, inner, length, v.dtype),
        *[kernel("stream", [pairs], [pairs])] * 4,  # decays: summed, exponentials, times scores
        product(heads * count, length, length, columns, v.dtype),
    ]
    states = [
        product(heads * count, inner, length, columns, v.dtype),
        product(heads, count + 1, min(count + 1, BLOCK), inner * columns, v.dtype),
    ]
    return within, states


def _read(q: torch.Tensor, v: torch.Tensor, size: int, block: int) -> Kernel:
    """Queries times the state in front of their block."""
    heads, length = prod(q.shape[:-2]), min(size, block)
    return product(heads * -(-size // length), length, q.shape[-1], v.shape[-1], v.dtype)


ROWS: dict[str, Callable[[Work], list[Kernel]]] = {
    "scan": _running_sum,
    "recurrence": _recurrence,
    "linear_attention": _linear_attention,
    "linear_state": _linear_state,
    "running_linear_attention": _running_linear_attention,
}
