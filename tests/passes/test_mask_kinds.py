"""Chunks, prefixes and packed documents: named, bounded where they can be, and never dropped."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ringcompile.capture.export import capture
from ringcompile.compiler import load, transform
from ringcompile.dump.report import attention_of
from ringcompile.ir.communication import bytes_sent
from ringcompile.ir.expr import bind
from ringcompile.ir.printer import print_program
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from tests.support import counts, difference, run, some_fast
from tests.test_ops_across_the_sequence import H, attend

BATCH, LENGTH = 2, 45
INF, MIN = float("-inf"), torch.finfo(torch.float32).min
ORDERS = ("contiguous", "zigzag")


class Masked(nn.Module):
    """Attention under a mask that is made of hidden states and whole numbers [B, S]."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        return attend(x, attn_mask=self.mask(x, numbers))


def index(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def query(x: Tensor) -> Tensor:
    return index(x)[:, None]


def key(x: Tensor) -> Tensor:
    return index(x)[None, :]


def causal(x: Tensor) -> Tensor:
    return query(x) >= key(x)


def padding(numbers: Tensor) -> Tensor:
    """How many tokens of each sequence are padding in front."""
    return (numbers.cumsum(-1) == 0).sum(-1)


def shifted_chunks(x: Tensor, numbers: Tensor) -> Tensor:
    """Chunks counted from each sequence's first real token, written as transformers does."""
    batch = torch.arange(x.shape[0])[:, None, None, None]
    rows, columns = index(x)[None, None, :, None], index(x)[None, None, None, :]
    shift = padding(numbers)
    return (columns <= rows) & (
        (columns - shift[batch]) // 7 == (rows - shift[batch]) // 7
    )


def restarts(x: Tensor, numbers: Tensor) -> Tensor:
    """Documents told apart by positions that start again."""
    documents = (numbers == 0).cumsum(-1)
    return (documents[:, None, :, None] == documents[:, None, None, :]) & causal(x)


def lookup(x: Tensor, numbers: Tensor) -> Tensor:
    """The same document, looked up by batch entry and position."""
    batch = torch.arange(x.shape[0])[:, None, None, None]
    rows, columns = index(x)[None, None, :, None], index(x)[None, None, None, :]
    return (numbers[batch, rows] == numbers[batch, columns]) & (columns <= rows)


def additive(mask: Tensor, hidden: float) -> Tensor:
    return torch.where(mask, 0.0, hidden)


Mask = Callable[[Tensor, Tensor], Tensor]
CHUNKS: dict[str, tuple[Mask, str]] = {
    "chunks": (
        lambda x, n: causal(x) & (query(x) // 8 == key(x) // 8), "causal + chunks of 8"),
    "chunks, not causal": (
        lambda x, n: query(x) // 8 == key(x) // 8, "full + chunks of 8"),
    "chunks by div": (
        lambda x, n: causal(x) & (torch.div(query(x), 8, rounding_mode="floor") == torch.div(
            key(x), 8, rounding_mode="floor")),
        "causal + chunks of 8"),
    "chunks by trunc": (
        lambda x, n: causal(x) & (torch.div(query(x), 8, rounding_mode="trunc") == torch.div(
            key(x), 8, rounding_mode="trunc")),
        "causal + chunks of 8"),
    "chunks that start earlier": (
        lambda x, n: causal(x) & ((query(x) + 3) // 8 == (key(x) + 3) // 8),
        "causal + chunks of 8"),
    "chunks of four dims": (
        lambda x, n: (causal(x) & (query(x) // 8 == key(x) // 8))[None, None],
        "causal + chunks of 8"),
    "chunks, permuted": (
        lambda x, n: ((query(x) <= key(x)) & (query(x) // 8 == key(x) // 8)).T,
        "causal + chunks of 8"),
    "chunks, expanded": (
        lambda x, n: (causal(x) & (query(x) // 8 == key(x) // 8))[None, None].expand(
            x.shape[0], 3, -1, -1),
        "causal + chunks of 8"),
    "chunks of -inf": (
        lambda x, n: additive(causal(x) & (query(x) // 8 == key(x) // 8), INF),
        "causal + chunks of 8"),
    "chunks of min": (
        lambda x, n: additive(causal(x) & (query(x) // 8 == key(x) // 8), MIN),
        "causal + chunks of 8"),
    "chunks by padding": (shifted_chunks, "causal + chunks of 7"),
    "chunks and keys by data": (
        lambda x, n: causal(x) & (query(x) // 8 == key(x) // 8) & (n > 0)[:, None, None],
        "causal + key mask + chunks of 8"),
    "chunks within a window": (
        lambda x, n: causal(x) & (query(x) - key(x) < 5) & (query(x) // 8 == key(x) // 8),
        "causal window 5 + chunks of 8"),
}  # fmt: skip
OTHERS: dict[str, tuple[Mask, str]] = {
    "prefix": (lambda x, n: causal(x) | (key(x) < 9), "full + prefix"),
    "prefix first": (lambda x, n: (key(x) < 9) | causal(x), "full + prefix"),
    "prefix by data": (
        lambda x, n: (index(x) < padding(n)[:, None])[:, None, None] | causal(x), "full + prefix"),
    "prefix of min": (
        lambda x, n: additive(causal(x) | (key(x) < 9), MIN), "full + prefix"),
    "prefix and keys by data": (
        lambda x, n: (causal(x) | (key(x) < 9)) & (n > 0)[:, None, None],
        "full + key mask + prefix"),
    "prefix or window": (
        lambda x, n: (causal(x) & (query(x) - key(x) < 5)) | (key(x) < 3), "full + prefix"),
    "documents": (
        lambda x, n: n[:, None, :, None] == n[:, None, None, :], "full + documents"),
    "documents and causal": (
        lambda x, n: (n[:, None, :, None] == n[:, None, None, :]) & causal(x),
        "causal + documents"),
    "documents of three dims": (
        lambda x, n: ((n[:, :, None] == n[:, None]) & causal(x)).unsqueeze(1),
        "causal + documents"),
    "documents of -inf": (
        lambda x, n: additive((n[:, None, :, None] == n[:, None, None]) & causal(x), INF),
        "causal + documents"),
    "documents of min": (
        lambda x, n: additive((n[:, None, :, None] == n[:, None, None]) & causal(x), MIN),
        "causal + documents"),
    "documents by restarts": (restarts, "causal + documents"),
    "documents by lookup": (lookup, "causal + documents"),
    "documents within chunks": (
        lambda x, n: (n[:, None, :, None] == n[:, None, None]) & causal(x)
        & (query(x) // 8 == key(x) // 8),
        "causal + documents + chunks of 8"),
    "documents with a bias": (
        lambda x, n: torch.where(
            (n[:, None, :, None] == n[:, None, None]) & causal(x), -0.1 * (query(x) - key(x)),
            INF),
        "causal + documents + relative bias f32[b, 1, s/ring, s]"),
    # Nearly so, and not.
    "different documents": (
        lambda x, n: (n[:, None, :, None] != n[:, None, None]) | (query(x) == key(x)),
        "full + data-dependent mask bool[b, 1, s/ring, s]"),
    "the next document": (
        lambda x, n: (n[:, None, :, None] == (n - 1)[:, None, None]) | causal(x),
        "full + data-dependent mask bool[b, 1, s/ring, s]"),
    "chunks of two sizes": (
        lambda x, n: causal(x) & (query(x) // 8 == key(x) // 4),
        "causal + mask bool[1, 1, s/ring, s]"),
    "chunks of the quotient": (
        lambda x, n: causal(x) & (query(x) / 8 <= key(x) / 8 + 1),
        "causal + mask bool[1, 1, s/ring, s]"),
    "quotients": (
        lambda x, n: causal(x) & (query(x) / 8 == key(x) / 8),
        "causal + mask bool[1, 1, s/ring, s]"),
    "chunks one apart": (
        lambda x, n: causal(x) & (query(x) // 8 - key(x) // 8 <= 1),
        "causal + mask bool[1, 1, s/ring, s]"),
    "trunc across 0": (
        lambda x, n: causal(x) & (
            torch.div(query(x) - 20, 8, rounding_mode="trunc")
            == torch.div(key(x) - 20, 8, rounding_mode="trunc")),
        "causal + mask bool[1, 1, s/ring, s]"),
    "queries and keys shifted apart": (
        lambda x, n: causal(x) & ((query(x) - n[:, :1, None, None]) // 8 == key(x) // 8),
        "causal + data-dependent mask bool[b, 1, s/ring, s]"),
}  # fmt: skip
CASES = {**CHUNKS, **OTHERS}
# Ways of writing what another case is read as already.
ALIKE = {
    "chunks by div", "chunks of four dims", "chunks, permuted", "chunks, expanded",
    "chunks of -inf", "prefix first", "prefix of min", "documents of three dims",
    "documents of -inf", "chunks of the quotient", "quotients", "chunks one apart",
}
some = pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in CASES
])


def numbers(length: int) -> Tensor:
    """Documents [B,S] of uneven lengths, the first one number 0; some start in the middle."""
    starts = torch.zeros(BATCH, length, dtype=torch.int64)
    starts[0, [3, 11, 12, length - 9]] = 1
    starts[1, [6, length // 2]] = 1
    return starts.cumsum(-1)


def inputs(length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, length, H), numbers(length)


@cache
def captured(name: str) -> tuple[nn.Module, Program]:
    module = Masked(CASES[name][0]).eval()
    return module, capture(module, inputs(33))


def compiled(name: str, spec: str = "ring=3", order: str = "auto") -> ParallelProgram:
    return transform(captured(name)[1], spec, order=order)


def rows_that_see(name: str, x: Tensor, n: Tensor) -> Tensor:
    mask = CASES[name][0](x, n)
    seen = mask if mask.dtype == torch.bool else mask > MIN
    return seen.expand(x.shape[0], 3, x.shape[1], x.shape[1]).any(-1).all(1)


@some
def test_described(name: str) -> None:
    (found,) = attention_of(compiled(name).program)
    assert found.mask == CASES[name][1]


def quick(name: str, ranks: int, order: str) -> bool:
    """Each kind on three ranks and on four, in one order each; every eighth on sixteen as well."""
    place = list(CASES).index(name)
    if name in ALIKE:
        return False
    if ranks == 16:
        return place % 8 == 0 and order == ORDERS[place // 8 % 2]
    return order == ORDERS[(ranks + place) % 2]


@pytest.mark.parametrize(
    ("name", "ranks", "order"), some_fast(CASES, [3, 4, 16], ORDERS, fast=quick)
)
def test_numbers(name: str, ranks: int, order: str) -> None:
    module, (x, n) = captured(name)[0], inputs(LENGTH)
    rows, found = rows_that_see(name, x, n), run(compiled(name, f"ring={ranks}", order), (x, n))
    assert rows.any()
    assert difference(found.outputs[rows], module(x, n)[rows]) < 2e-6


@pytest.mark.parametrize("name", CASES)
def test_the_inputs_tell_the_mask_apart(name: str) -> None:
    x, n = inputs(LENGTH)
    mask = CASES[name][0](x, n)
    assert difference(attend(x, attn_mask=mask), attend(x)) > 1e-3
    if name.startswith(("chunks", "documents")) and "causal" not in CASES[name][1][:1]:
        assert difference(attend(x, attn_mask=mask), attend(x, is_causal=True)) > 1e-3


def test_a_shift_by_batch_entry_that_becomes_one_by_head() -> None:
    """Queries and keys are then shifted by different numbers: nothing bounds their distance."""

    def mask(x: Tensor, n: Tensor) -> Tensor:
        shift = n[:, :1, None, None]
        rows = (query(x) - shift).transpose(0, 1) // 8
        return causal(x)[None, None] & (rows == (key(x) - shift) // 8) | (query(x) == key(x))

    def given(length: int) -> tuple[Tensor, Tensor]:
        shifts = torch.tensor([0, 9, 20])[:, None].expand(-1, length).contiguous()
        return torch.randn(3, length, H), shifts

    module, values = Masked(mask).eval(), given(LENGTH)
    parallel = transform(capture(module, given(33)), "ring=3")
    assert difference(run(parallel, values).outputs, module(*values)) < 2e-6


def sent(name: str, length: int | None) -> list[object]:
    parallel = transform(captured(name)[1], "ring=8", order="contiguous", length=length)
    shares = {"n": 8, "b": BATCH}
    return [bind(bytes_sent(parallel.rank(rank)), shares) for rank in range(8)]


@pytest.mark.parametrize("name", some_fast(CHUNKS, fast=lambda name: name not in ALIKE))
def test_only_what_is_in_reach_is_sent(name: str) -> None:
    """64 tokens on 8 ranks: 8 a rank, so that a chunk of 8 or fewer reaches one rank back."""
    bound = 64
    share = 8 * 3 * 4 * 2 * BATCH * 4  # 8 tokens, 3 heads of 4, keys and values, float32
    for rank, num_bytes in enumerate(sent(name, bound)):
        first, last = rank == 0, rank == 7
        to_next, to_previous = not last, "not causal" in name and not first
        assert num_bytes == share * (to_next + to_previous)
    module, values = captured(name)[0], inputs(bound)
    parallel = transform(captured(name)[1], "ring=8", order="contiguous", length=bound)
    rows = rows_that_see(name, *values)
    assert difference(run(parallel, values).outputs[rows], module(*values)[rows]) < 2e-6
    found = counts(parallel, 4)
    blocks = 3 if "not causal" in name else 2
    assert (found["block_attention"], found["attend_merge"]) == (1, blocks - 1)


def test_without_a_bound_everything_is_sent() -> None:
    share = 8 * 3 * 4 * 2 * BATCH * 4
    assert sent("documents", 64) == [share * 7] * 8


def test_the_kind_stands_in_dumps_and_artifacts(tmp_path: Path) -> None:
    parallel = compiled("documents within chunks")
    assert "documents + chunks of 8" in print_program(parallel.program)
    parallel.save(tmp_path / "out")
    (found,) = attention_of(load(tmp_path / "out").program)
    assert found.mask == "causal + documents + chunks of 8"
