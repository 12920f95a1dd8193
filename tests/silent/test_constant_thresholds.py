"""Counts and ranks that meet a constant, which the tokens of a short sample never reach.

Each mixture has an expert that takes a constant number of tokens, or acts on a constant share of
them, in another way of writing it. None may be taken for one that treats every token on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.errors import RingCompileError
from tests.silent.small import CAPTURED, WIDTH, Model, ids, matches, normal
from tests.support import compiled, some_fast

EXPERTS, SLOTS = 4, 32
Tensor = torch.Tensor


class Mixture(nn.Module):
    """Every token goes to one expert; `keeps` says which tokens that expert takes.

    Args:
        keeps: from the choice of each token, one-hot, [T, E], and its weight [T] to [T] of bools.
    """

    def __init__(self, keeps: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.keeps = keeps
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(normal(EXPERTS, WIDTH, WIDTH))
        self.register_buffer("table", (torch.arange(4096) < SLOTS).long())
        self.register_buffer("limit", torch.tensor(SLOTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weight, choice = self.router(flat).softmax(-1).max(-1)
        kept = self.keeps(self, F.one_hot(choice, EXPERTS), weight)
        order = choice.argsort(stable=True)
        sorted_rows = flat.index_select(0, order)
        expert = choice.index_select(0, order)
        made = torch.stack([sorted_rows @ self.up[i] for i in range(EXPERTS)], 1)
        made = F.silu(made.gather(1, expert[:, None, None].expand(-1, 1, WIDTH)).squeeze(1))
        made = made.masked_fill(~kept.index_select(0, order)[:, None], 0)
        out = torch.zeros_like(flat).index_add(0, order, made)
        return (out * weight[:, None]).reshape(x.shape)


def slot(one: Tensor) -> Tensor:
    return ((one.cumsum(0) - 1) * one).sum(-1)


def by_rank(m: Any, one: Tensor, weight: Tensor) -> Tensor:
    rank = weight.argsort(descending=True).argsort()
    return rank < 2 * SLOTS


def within_ranges(m: Any, one: Tensor, weight: Tensor) -> Tensor:
    return (slot(one)[:, None] == torch.arange(SLOTS)).any(-1)


def clamped(m: Any, one: Tensor, weight: Tensor) -> Tensor:
    return slot(one).clamp(max=SLOTS) - slot(one) + 1 > 0


def table(m: Any, one: Tensor, weight: Tensor) -> Tensor:
    return m.table[slot(one)] == 1


def triangular(m: Any, one: Tensor, weight: Tensor) -> Tensor:
    before = torch.ones(one.shape[0], one.shape[0], dtype=weight.dtype).tril()
    return ((before @ one.to(weight.dtype)) * one).sum(-1) <= SLOTS


def full_expert(m: Any, one: Tensor, weight: Tensor) -> Tensor:
    return ((one.sum(0) <= SLOTS) * one).sum(-1) > 0


def matches_limit(m: Any, one: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(m.limit - slot(one)) > 0


KEEPS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "a slot below a number": lambda m, one, weight: slot(one) < SLOTS,
    "a slot below a buffer": lambda m, one, weight: slot(one) < m.limit,
    "a slot among a range": within_ranges,
    "a clamped slot": clamped,
    "slots in blocks": lambda m, one, weight: slot(one) // SLOTS == 0,
    "what is left is above zero": matches_limit,
    "a table of slots": table,
    "a rank below a number": by_rank,
    "counted by a matmul": triangular,
    "an expert that is too full": full_expert,
    "a float count": lambda m, one, weight: (one.cumsum(0).double() * one).sum(-1) * 0.03 < 1.0,
    "smooth": lambda m, one, weight: torch.sigmoid((SLOTS - slot(one)).double() * 9).round() > 0,
}
FAST = ("a slot below a number", "a slot among a range")


def model(kind: str) -> nn.Module:
    return Model(lambda m, x, tokens: m.mixture(x), mixture=Mixture(KEEPS[kind]))


@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast(list(KEEPS), ["ring=4", "ep=2"], fast=lambda kind, spec:
              kind in FAST and spec == "ring=4"),
)
def test_every_token_counts(kind: str, spec: str) -> None:
    matches(model(kind), spec, lengths=(150,))


def test_a_declaration_that_a_sample_cannot_show_is_refused() -> None:
    mixture = Mixture(KEEPS["a slot below a number"])
    built = Model(lambda m, x, tokens: rc.tokenwise(m.mixture)(x), mixture=mixture)
    with pytest.raises(RingCompileError, match="a count or rank of tokens with a constant"):
        compiled(built, (ids(CAPTURED),), "ring=4")


def test_a_batch_is_not_dealt_out() -> None:
    with pytest.raises(RingCompileError, match="this mixes the sequences of a batch"):
        compiled(model("a slot below a number"), (ids(CAPTURED),), "dp=2")


HARMLESS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "a count above zero": lambda m, one, weight: ((one.sum(0) > 0) & (one > 0)).any(-1),
    "a count of one at least": lambda m, one, weight:
        (one.sum(0) == one.sum(0).clamp(min=1))[one.argmax(-1)],
    "a slot that is not negative": lambda m, one, weight: slot(one) >= 0,
}


@pytest.mark.parametrize("kind", some_fast(HARMLESS, fast=lambda kind: "zero" in kind))
def test_bounds_that_a_sample_reaches_keep_tokens_where_they_are(kind: str) -> None:
    built = Model(lambda m, x, tokens: m.mixture(x), mixture=Mixture(HARMLESS[kind]))
    parallel = compiled(built, (ids(CAPTURED),), "ring=4")
    assert any("experts run on each rank's own tokens" in note for note in parallel.program.notes)
