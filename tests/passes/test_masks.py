"""What masks are taken for: bands of positions, hidden keys, and tensors that stay what they are.

Each case is compiled, described, and its numbers are held against the module's. A mask that is
nearly causal must not be taken for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.dump.report import attention_of
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from tests.passes.mask_cases import (
    BANDS,
    BIAS,
    CAUTIOUS,
    KEPT,
    MASKS,
    MIN,
    MISTAKEN,
    PAIRS,
)
from tests.support import difference, run, some_fast
from tests.test_ops_across_the_sequence import H, Lambda, attend, heads

ORDERS = ("contiguous", "zigzag")
BATCH, LENGTH = 2, 23
GROUP = 8  # cases in one module, each over values of its own: capture takes most of the time


def group_of(name: str) -> tuple[str, ...]:
    table = next(list(table) for table in (BANDS, KEPT, CAUTIOUS, MISTAKEN) if name in table)
    if name in MISTAKEN:
        return (name,)
    first = table.index(name) // GROUP * GROUP
    return tuple(table[first : first + GROUP])


# The first case of each group that takes lines of the passes which no other group takes.
FAST = {
    "window and keys", "a bias filled with min where a row may be of hidden keys alone",
    "one of three equal positions", "twice as steep", "key - query <= 0", "distance, inclusive",
    "the last slice of a larger one", "ALiBi", "both scaled", "the batch size away",
}


def some(names: Iterable[str]) -> list[Any]:
    return some_fast(names, fast=lambda name: group_of(name)[0] in FAST)


@cache
def captured(group: tuple[str, ...]) -> tuple[Lambda, Program]:
    def attends(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = heads(x), heads(x) * 0.5, heads(x) - 1
        return tuple(
            F.scaled_dot_product_attention(
                q, k, v + 0.1 * i, attn_mask=MASKS[name](x)).transpose(1, 2)
            for i, name in enumerate(group)
        )

    module = Lambda(attends).eval()
    return module, capture(module, (torch.randn(BATCH, 17, H),))


@cache
def compiled(group: tuple[str, ...], order: str) -> ParallelProgram:
    return transform(captured(group)[1], "ring=3", order=order)


def described(name: str) -> str:
    group = group_of(name)
    reports = attention_of(compiled(group, "contiguous").program)
    assert len(reports) == len(group)
    return reports[group.index(name)].mask


@cache
def outputs(
    group: tuple[str, ...], order: str
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Inputs, and what all ranks and the module make of them."""
    x = torch.randn(BATCH, LENGTH, H)
    return x, run(compiled(group, order), (x,)).outputs, captured(group)[0](x)


def rows_that_see(name: str, x: torch.Tensor) -> torch.Tensor:
    """[B, S]: the tokens that see a key in every head; the others' outputs mean nothing."""
    mask = MASKS[name](x)
    if mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool)
    seen = mask if mask.dtype == torch.bool else mask > MIN
    return seen.expand(x.shape[0], 3, x.shape[1], x.shape[1]).any(-1).all(1)


def check_numbers(name: str, order: str) -> None:
    group = group_of(name)
    x, found, expected = outputs(group, order)
    i, rows = group.index(name), rows_that_see(name, x)
    assert found[i].shape == expected[i].shape
    if rows.any():
        assert difference(found[i][rows], expected[i][rows]) < 2e-6


@pytest.mark.parametrize("name", some([*BANDS, *KEPT]))
def test_described(name: str) -> None:
    assert described(name) == {**BANDS, **KEPT}[name][1]


@pytest.mark.parametrize("name", some(CAUTIOUS))
def test_described_as_a_mask_unless_proved(name: str) -> None:
    assert described(name) in (CAUTIOUS[name][1], f"full + {PAIRS}", f"full + {BIAS}")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", some([*BANDS, *KEPT, *CAUTIOUS]))
def test_numbers(name: str, order: str) -> None:
    check_numbers(name, order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MISTAKEN)
def test_numbers_of_what_is_easily_mistaken(name: str, order: str) -> None:
    check_numbers(name, order)


def test_is_causal() -> None:
    module = Lambda(lambda x: attend(x, is_causal=True)).eval()
    parallel = transform(capture(module, (torch.randn(BATCH, 17, H),)), "ring=3")
    (report,) = attention_of(parallel.program)
    assert report.mask == "causal"


def test_masks_tell_the_cases_apart() -> None:
    """The inputs of these tests hide some keys of every kind: a dropped mask would show."""
    x = torch.randn(BATCH, LENGTH, H)
    plain = attend(x)
    for name in [*BANDS, *KEPT, *CAUTIOUS]:
        mask = MASKS[name](x)
        if name not in ("no mask", "true everywhere", "true, of one element", "the length away",
                        "bias by query"):  # fmt: skip
            assert difference(attend(x, attn_mask=mask), plain) > 1e-3, name
    assert heads(x).shape == (BATCH, 3, LENGTH, 4)
