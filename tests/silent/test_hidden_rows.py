"""Rows that an additive mask hides as a whole by finite numbers: a device weighs their keys evenly.

So do all ranks, wherever the keys are; in a ring the log-sum-exp of such a block has no digits left
for the number of its keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.silent.small import CAPTURED, HEADS, VOCABULARY, WIDTH, ids, matches, with_gain
from tests.support import compiled, difference, run, some_fast

Tensor = torch.Tensor
LOW = torch.finfo(torch.float64).min
Make = Callable[[Tensor, Tensor], Tensor]


def earlier(mask: Tensor) -> Tensor:
    return torch.ones(mask.shape[-1], mask.shape[-1], dtype=torch.bool).tril()


def low(visible: Tensor, number: float = LOW) -> Tensor:
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, number)


class Masked(nn.Module):
    """Attention whose scores get `make(scores, mask)` added, or as one op with that mask."""

    def __init__(self, make: Make, one_op: bool) -> None:
        super().__init__()
        self.make, self.one_op = make, one_op
        self.embedding, self.qkv = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        with_gain(self)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                   for t in self.qkv(self.embedding(tokens)).chunk(3, -1))
        if self.one_op:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.make(q, mask))
        else:
            scores = q @ k.transpose(-1, -2)
            y = (scores + self.make(q, mask)).softmax(-1) @ v
        return self.head(y.transpose(1, 2).flatten(2))


def given(q: Tensor, mask: Tensor) -> Tensor:
    return mask


def padded(q: Tensor, mask: Tensor) -> Tensor:
    return low(earlier(mask) & (mask > 0)[:, None, None])


def two_terms(q: Tensor, mask: Tensor) -> Tensor:
    return low(earlier(mask)) + low((mask > 0)[:, None, None])


def clamped(q: Tensor, mask: Tensor) -> Tensor:
    return two_terms(q, mask).clamp(min=LOW)


def times(q: Tensor, mask: Tensor) -> Tensor:
    return low(earlier(mask)) + (1.0 - mask[:, None, None].double()) * LOW / 4


def hidden_before(q: Tensor, mask: Tensor) -> Tensor:
    return low(earlier(mask), -torch.inf) + low((mask > 0)[:, None, None])


def hidden_keys(q: Tensor, mask: Tensor) -> Tensor:
    return low(earlier(mask)) + low((mask > 0)[:, None, None], -torch.inf)


def keys_alone(q: Tensor, mask: Tensor) -> Tensor:
    return low((mask > 0)[:, None, None])


def of_a_window(q: Tensor, mask: Tensor) -> Tensor:
    near = earlier(mask) & ~earlier(mask).tril(-5)
    return low(near, -torch.inf) + low((mask > 0)[:, None, None])


def with_distance(q: Tensor, mask: Tensor) -> Tensor:
    n = torch.arange(mask.shape[-1])
    return padded(q, mask) - (n[:, None] - n).abs().double() * 0.1


def by_head(q: Tensor, mask: Tensor) -> Tensor:
    slope = torch.linspace(0.1, 1, HEADS, dtype=torch.float64)[:, None, None]
    return padded(q, mask) + slope * torch.arange(mask.shape[-1])


ZERO, LOWEST = torch.zeros((), dtype=torch.float64), torch.tensor(LOW, dtype=torch.float64)


def of_constants(q: Tensor, mask: Tensor) -> Tensor:
    return torch.where(earlier(mask) & (mask > 0)[:, None, None], ZERO, LOWEST)


def constants_over_a_bias(q: Tensor, mask: Tensor) -> Tensor:
    keys = torch.where((mask > 0)[:, None, None], ZERO, LOWEST)
    return torch.where(earlier(mask), keys + with_slopes(mask), LOWEST)


def filled_over_a_bias(q: Tensor, mask: Tensor) -> Tensor:
    keys = low((mask > 0)[:, None, None])
    return (keys + with_slopes(mask)).masked_fill(~earlier(mask), LOW)


def of_a_difference(q: Tensor, mask: Tensor) -> Tensor:
    return low(earlier(mask), -torch.inf) + (mask[:, None, None].double() - 1) * 1e30


def of_a_quotient(q: Tensor, mask: Tensor) -> Tensor:
    return low(earlier(mask), -torch.inf) - (1 - mask[:, None, None].double()) / 1e-30


def a_window_of_constants(q: Tensor, mask: Tensor) -> Tensor:
    near = earlier(mask) & ~earlier(mask).tril(-5)
    return torch.where(near & (mask > 0)[:, None, None], ZERO, LOWEST)


def of_queries(q: Tensor, mask: Tensor) -> Tensor:
    return torch.where(earlier(mask) & (mask > 0)[:, None, :, None], ZERO, LOWEST)


def of_a_logarithm(q: Tensor, mask: Tensor) -> Tensor:
    """-inf for keys, and a number for later ones: of padding in front these are what is left."""
    later = torch.where(earlier(mask), 0.0, -1e30).double()
    return mask[:, None, None].double().log2() + later


def of_a_reciprocal(q: Tensor, mask: Tensor) -> Tensor:
    large = torch.full((1,), 1e-30, dtype=torch.float64).reciprocal()
    return low(earlier(mask), -torch.inf) - (1 - mask[:, None, None].double()) * large


def of_an_exponential(q: Tensor, mask: Tensor) -> Tensor:
    return low(earlier(mask), -torch.inf) - torch.exp2((1 - mask[:, None, None].double()) * 100)


def of_an_op_in_no_table(q: Tensor, mask: Tensor) -> Tensor:
    padding = 1 - mask[:, None, None].double()
    return low(earlier(mask), -torch.inf) - torch.special.i0(padding * 99)


def with_slopes(mask: Tensor) -> Tensor:
    n = torch.arange(mask.shape[-1])
    slopes = torch.linspace(0.1, 1, HEADS, dtype=torch.float64)[:, None, None]
    return slopes * (n - n[:, None])


MADE: dict[str, Make] = {
    "constants": of_constants, "constants over a bias": constants_over_a_bias,
    "a fill over a bias": filled_over_a_bias, "a difference": of_a_difference,
    "a quotient": of_a_quotient, "a window of constants": a_window_of_constants,
    "queries": of_queries, "a logarithm": of_a_logarithm, "a reciprocal": of_a_reciprocal,
    "an exponential": of_an_exponential, "an op in no table": of_an_op_in_no_table,
    "padding": padded, "two terms": two_terms, "clamped": clamped, "a factor": times,
    "before it -inf": hidden_before, "keys of -inf": hidden_keys, "keys alone": keys_alone,
    "a window": of_a_window, "a distance": with_distance, "by head": by_head,
}
INFINITE = {"keys of -inf", "a logarithm"}
SPECS = ["ring=4", "ring=2,ulysses=2", "ulysses=2", "tp=2", "pp=2,ring=2", "dp=2", "time=2"]


def masks(length: int, batch: int = 2) -> tuple[Tensor, ...]:
    """Padding on the left, and a sequence of padding alone."""
    keep = torch.ones(batch, length, dtype=torch.int64)
    keep[0, : length // 3] = 0
    keep[-1] = 0
    return ids(length, batch), keep


@pytest.mark.parametrize(
    ("kind", "spec", "one_op"),
    some_fast(MADE, SPECS, [False, True], fast=lambda kind, spec, one_op: (
        one_op == bool(list(MADE).index(kind) % 2)) and (kind, spec) in {
        ("two terms", "ring=4"), ("before it -inf", "ring=2,ulysses=2"), ("keys of -inf", "ring=4"),
        ("constants over a bias", "ring=4"), ("a difference", "ring=4"),
        ("a logarithm", "ring=4"), ("an op in no table", "ring=4"),
        ("a fill over a bias", "time=2"),
    }),
)
def test_masks_that_the_model_makes(kind: str, spec: str, one_op: bool) -> None:
    def seen(length: int) -> tuple[Tensor, ...]:  # a row of -inf alone is NaN in the model
        tokens, keep = masks(length)
        return tokens, keep.index_fill(1, torch.tensor([length - 1]), 1)

    matches(Masked(MADE[kind], one_op), spec, inputs=seen if kind in INFINITE else masks)


def of_rows(length: int, heads: int = 1) -> tuple[Tensor, ...]:
    """Additive masks [B, 1 or H, S, S] in which some rows see nothing."""
    generator = torch.Generator().manual_seed(length)
    visible = torch.rand(2, heads, length, length, generator=generator) < 0.5
    visible[0, :, 1:4] = False
    visible[1, 0, -1] = False
    return ids(length), low(visible)


@pytest.mark.parametrize("one_op", [False, True])
@pytest.mark.parametrize(
    ("heads", "spec"),
    some_fast([1, HEADS], SPECS, fast=lambda heads, spec: spec == "ring=4" and heads == HEADS),
)
def test_masks_that_are_given(heads: int, spec: str, one_op: bool) -> None:
    matches(Masked(given, one_op), spec, inputs=lambda n: of_rows(n, heads))


@pytest.mark.parametrize("number", [-1e9, -1e30, torch.finfo(torch.float32).min])
def test_in_float32(number: float) -> None:
    """Scores of about one have no digits left beside these numbers."""
    module = Masked(given, one_op=True).float()
    tokens, mask = of_rows(27)
    mask = mask.float().masked_fill(mask < 0, number)
    _, example = of_rows(CAPTURED)
    parallel = compiled(module, (ids(CAPTURED), example.float()), "ring=4")
    with torch.no_grad():
        assert difference(run(parallel, (tokens, mask)).outputs, module(tokens, mask)) <= 2e-5


def test_a_number_beside_which_scores_count() -> None:
    """In float64 -1e9 leaves scores seven digits: the row's weights are its scores'."""
    def lifted(n: int) -> tuple[Tensor, ...]:
        tokens, mask = of_rows(n)
        return tokens, mask.clamp(min=-1e3)

    matches(Masked(given, one_op=True), "ring=4", inputs=lifted)


def test_bands_stay_bands() -> None:
    """Causal masks of finite numbers alone see themselves: no row is even, and blocks are left."""
    def causal(q: Tensor, mask: Tensor) -> Tensor:
        return low(earlier(mask))

    program = compiled(Masked(causal, one_op=True), masks(CAPTURED), "ring=4").program
    (attention,) = [n for n in program.graph.nodes if "ring_attention" in str(n.target)]
    kwargs: dict[str, Any] = attention.kwargs
    assert (kwargs["lower"], kwargs["upper"]) == (0, None)
    assert not any("amax" in str(n.target) for n in program.graph.nodes)
