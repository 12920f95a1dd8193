"""What prefix sums, recurrences and linear attention cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch

from ringcompile.cost.kernels import Kernel
from ringcompile.cost.work import Work, kernel, product
from ringcompile.ops.linear_attention import BLOCK, block_of
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
    q, v, decay = work["q"], work["v"], work["decay"]
    blocks = _BlockKernels(q, v, decay, q.shape[-2], block_of(q, decay), work["beta"] is not None)
    if blocks.count == 1 and work["state"] is None:
        return blocks.within()
    return [*blocks.within(), *blocks.states(), blocks.read()]


def _linear_state(work: Work) -> list[Kernel]:
    """As in linear attention, but nothing is read; by the delta rule, of keys as well as values."""
    k, v, decay = work["k"], work["v"], work["decay"]
    delta = work["beta"] is not None
    if delta:
        v = torch.empty((*v.shape[:-1], k.shape[-1] + v.shape[-1]), dtype=v.dtype, device="meta")
    blocks = _BlockKernels(k, v, decay, k.shape[-2], block_of(k, decay), delta)
    return [*blocks.solved(), *blocks.states()]


def _chained_states(work: Work) -> list[Kernel]:
    """A matmul for each run of tokens."""
    totals, out = work["totals"], work.results[0]
    heads, (count, size, features) = prod(out.shape[:-3]), out.shape[-3:]
    return [product(heads, size, size, features, totals.dtype)] * count


def _running_linear_attention(work: Work) -> list[Kernel]:
    """The new tokens with those of their block before them; states are kept block by block."""
    q, v, size = work["q"], work["v"], work["q"].shape[-2] + KEPT - 1
    blocks = _BlockKernels(q, v, work["decay"], size, KEPT, work["beta"] is not None)
    taken = [work[name] for name in ("kept_k", "kept_v", "k", "v")]
    return [kernel("strided", taken, taken), *blocks.within(), *blocks.states(), blocks.read()]


class _BlockKernels:
    """The kernels of `ops/linear_attention.Blocks`.

    Args:
        k: [..,S,N], keys or queries.
        v: [..,S,P].
        decay: [..,S] or [..,S,N].
        size: how many tokens there are.
        block: the most tokens of a block.
        delta: whether it is by the delta rule.
    """

    def __init__(
        self, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, size: int, block: int,
        delta: bool,
    ) -> None:
        self.heads, self.length = prod(k.shape[:-2]), min(size, block)
        self.count, self.delta = -(-size // self.length), delta
        self.inner, self.columns = k.shape[-1], v.shape[-1]
        self.dtype, self.each = v.dtype, decay.dim() == k.dim()

    def _product(self, rows: int, inner: int, columns: int) -> Kernel:
        """A matmul in each block."""
        return product(self.heads * self.count, rows, inner, columns, self.dtype)

    def _scores(self) -> list[Kernel]:
        """Of all pairs of a block; where features decay apart, feature by feature."""
        length = self.length
        width = self.inner if self.each else 1
        shape = (self.heads * self.count, length, length, width)
        pairs = torch.empty(shape, dtype=self.dtype, device="meta")
        passes = [kernel("stream", [pairs], [pairs])] * 4  # summed, exponentials, times scores
        return passes if self.each else [*passes, self._product(length, self.inner, length)]

    def solved(self) -> list[Kernel]:
        """By the delta rule: what tokens take in, by a triangular matrix; half of it is 0."""
        columns = (self.inner + self.columns) // 2
        return [*self._scores(), self._product(self.length, self.length, columns)] * self.delta

    def within(self) -> list[Kernel]:
        return [
            *self.solved(), *self._scores(),
            self._product(self.length, self.length, self.columns),
        ]

    def states(self) -> list[Kernel]:
        """Those behind each block, and from block to block."""
        own = self._product(self.inner, self.length, self.columns)
        if self.delta:  # what the state in front has for its keys, and what it leaves of that
            return [own, self.read(), own]
        entries = self.count + 1
        return [own, product(self.heads, entries, min(entries, BLOCK), self.inner * self.columns,
                             self.dtype)]

    def read(self) -> Kernel:
        """Queries times the state in front of their block."""
        return self._product(self.length, self.inner, self.columns)


ROWS: dict[str, Callable[[Work], list[Kernel]]] = {
    "scan": _running_sum,
    "recurrence": _recurrence,
    "linear_attention": _linear_attention,
    "linear_state": _linear_state,
    "chained_states": _chained_states,
    "running_linear_attention": _running_linear_attention,
}
