"""Buffers that hold a mask: read where every element fits, and left alone where one does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.dump.report import attention_of
from tests.support import difference, run
from tests.test_ops_across_the_sequence import H, attend

SIZE, LENGTH = 40, 23
INF = float("-inf")


class Buffered(nn.Module):
    """Attention under a mask made of a buffer."""

    def __init__(self, buffer: Tensor, mask: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.mask = mask
        self.register_buffer("buffer", buffer)

    def forward(self, x: Tensor) -> Tensor:
        return attend(x, attn_mask=self.mask(self.buffer, x.shape[1]))


def square(buffer: Tensor, size: int) -> Tensor:
    return buffer[..., :size, :size]


def flags(buffer: Tensor, size: int) -> Tensor:
    return square(buffer, size) != 0


def positions(buffer: Tensor, size: int) -> Tensor:
    return buffer[:, :size] <= buffer[:, :size].T


def one_flipped(mask: Tensor, row: int, column: int) -> Tensor:
    mask = mask.clone()
    mask[row, column] = ~mask[row, column]
    return mask


def ones() -> Tensor:
    return torch.ones(SIZE, SIZE, dtype=torch.bool)


NUMBERS = torch.arange(SIZE)
PAIRS, BIAS = "full + mask bool[1, 1, s/ring, s]", "full + bias f32[1, 1, s/ring, s]"
BUFFERS: dict[str, tuple[Tensor, Callable[[Tensor, int], Tensor], str]] = {
    "tril": (ones().tril(), square, "causal"),
    "tril of four dims": (ones().tril()[None, None], square, "causal"),
    "tril of numbers": (torch.ones(SIZE, SIZE).tril(), flags, "causal"),
    "tril of bytes": (torch.ones(SIZE, SIZE, dtype=torch.uint8).tril(), flags, "causal"),
    "not triu": (ones().triu(1), lambda b, s: ~square(b, s), "causal"),
    "tril(2)": (ones().tril(2), square, "band -2..None"),
    "tril(-1)": (ones().tril(-1) | torch.eye(SIZE).bool(), square, "causal"),
    "window": (ones().tril() ^ ones().tril(-5), square, "causal window 5"),
    "window on both sides": (ones().tril(2) & ones().triu(-3), square, "band -2..3"),
    "outside of a window": (
        ~(ones().tril() & ones().triu(-3)), lambda b, s: ~square(b, s), PAIRS),
    "-inf": (torch.full((SIZE, SIZE), INF).triu(1), square, "causal"),
    "positions": (NUMBERS[None], positions, "causal"),
    "positions from two": (NUMBERS[None] + 2, positions, "causal"),
    "tril without the corner": (
        one_flipped(ones().tril(), SIZE - 1, 0), square, f"causal window {SIZE - 1}"),
    # Not quite.
    "outside of a window, as it is": (~(ones().tril(4) & ones().triu(-3)), square, PAIRS),
    "tril but for one": (one_flipped(ones().tril(), 30, 7), square, PAIRS),
    "tril but for the end": (one_flipped(ones().tril(), SIZE - 2, SIZE - 1), square, PAIRS),
    "tril but for the start": (one_flipped(ones().tril(), 0, 1), square, PAIRS),
    "three numbers": (
        torch.full((SIZE, SIZE), INF).triu(1) + torch.eye(SIZE), square, BIAS),
    "positions but for two": (
        torch.cat([NUMBERS[:5], NUMBERS[[6, 5]], NUMBERS[7:]])[None], positions, PAIRS),
}  # fmt: skip


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers(name: str) -> None:
    buffer, mask, kind = BUFFERS[name]
    module, x = Buffered(buffer, mask).eval(), torch.randn(2, LENGTH, H)
    parallel = transform(capture(module, (torch.randn(2, 17, H),)), "ring=3")
    (found,) = attention_of(parallel.program)
    assert found.mask == kind
    assert difference(run(parallel, (x,)).outputs, module(x)) < 2e-6


def test_a_learned_table_of_zeros_is_no_mask_of_zeros() -> None:
    """It would be another one in the next checkpoint."""
    module = Buffered(torch.zeros(SIZE, SIZE), square)
    del module.buffer
    module.buffer = nn.Parameter(torch.zeros(SIZE, SIZE))
    parallel = transform(capture(module.eval(), (torch.randn(2, 17, H),)), "ring=3")
    (found,) = attention_of(parallel.program)
    assert found.mask == BIAS
