"""What a model compares, sorts or chooses by comes from one matmul, not from two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.silent.small import CAPTURED, WIDTH, Model, ids, matches
from tests.support import compiled, some_fast

SPECS = ["tp=2", "tp=4", "ring=2,tp=2", "ulysses=2,tp=2"]


def largest(m: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    h = m.up(x)
    return m.down(torch.where(h == h.amax(-1, keepdim=True), h, 0.0))


def within_the_top_four(m: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    h = m.up(x)
    return m.down(h * (h >= h.topk(4).values[..., -1:]))


def above_the_kth_smallest(m: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    h = m.up(x)
    return m.down(h * (h > h.sort(-1).values[..., 20:21]).to(h.dtype))


def argmax_and_gather(m: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    h = F.gelu(m.up(x))
    best = h.gather(-1, h.argmax(-1, keepdim=True))
    return m.down(torch.where(h == best, 1.0, 0.1 * h))


def nothing_below_the_largest(m: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    h = m.up(x)
    return m.down(((h - h.max(-1, keepdim=True).values) == 0).to(h.dtype))


def above_a_quantile(m: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    h = m.up(x).abs()
    ordered = h.sort(-1).values
    bound = ordered[..., 10:11] * 0.5 + ordered[..., 10:11] * 0.5
    return m.down(torch.where(h < bound, 0.0, h))


def sign_of_the_distance(m: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    h = m.up(x)
    return m.down(torch.sign(h - h.median(-1, keepdim=True).values))


def rounded_ratio(m: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    h = m.up(x).abs()
    return m.down(torch.floor(h / h.amax(-1, keepdim=True)))


def gate_and_value_in_one(m: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    gate, value = m.fused(x).chunk(2, -1)
    return m.down(value * (gate >= gate.topk(3).values[..., -1:]))


def slices_that_overlap(m: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    h = m.fused(x)
    first, upper = h[..., : 2 * WIDTH], h[..., WIDTH:]
    return m.down(first * (first >= upper[..., :WIDTH].amax(-1, keepdim=True)))


def by_weights(m: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    h = x @ m.up.weight.T
    bound = torch.topk(h, 2, dim=-1)[0][..., 1:]
    return m.down(h.masked_fill(h < bound, 0))


KINDS: dict[str, Callable[..., torch.Tensor]] = {
    kind.__name__: kind
    for kind in (
        largest, within_the_top_four, above_the_kth_smallest, argmax_and_gather,
        nothing_below_the_largest, above_a_quantile, sign_of_the_distance, rounded_ratio,
        gate_and_value_in_one, slices_that_overlap, by_weights,
    )
}
FAST = ("largest", "within_the_top_four", "gate_and_value_in_one", "slices_that_overlap")


def model(kind: str) -> nn.Module:
    return Model(KINDS[kind], fused=nn.Linear(WIDTH, 4 * WIDTH))


@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast(list(KINDS), SPECS, fast=lambda kind, spec: spec == "tp=4" and kind in FAST),
)
def test_what_is_compared(kind: str, spec: str) -> None:
    matches(model(kind), spec)


def test_it_is_said_which_value_stays_in_one_layout() -> None:
    parallel = compiled(model("largest"), (ids(CAPTURED),), "tp=2")
    assert [note.split(": ", 1)[1] for note in parallel.program.notes] == [
        "%linear_3 is computed in one layout only: the model compares its entries with each other"
    ]


def test_what_is_only_scaled_is_still_split() -> None:
    parallel = compiled(
        Model(lambda m, x, tokens: m.down(F.gelu(m.up(x)))), (ids(CAPTURED),), "tp=2"
    )
    assert parallel.program.notes == ()


def by_position(m: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A table of positions that a matmul makes: whole for its largest entries, split beside x."""
    place = torch.arange(tokens.shape[1])[:, None] * torch.linspace(0.1, 1, WIDTH).double()
    table = m.down(torch.relu(m.up(torch.cos(place))))
    return x * (table == table.amax(0)) + table


@pytest.mark.parametrize(
    "spec", ["ring=4", *(pytest.param(x, marks=pytest.mark.slow) for x in ("ulysses=2", "time=2"))]
)
def test_a_table_that_is_compared_along_the_sequence(spec: str) -> None:
    matches(Model(by_position), spec)
