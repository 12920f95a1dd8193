"""Stages of a pipeline: each has memory of its own, and the prompt's program the same layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ringcompile.passes.carry.keep import caches_of
from tests.generate.models import (
    HEADS,
    VOCABULARY,
    WIDTH,
    Rotary,
    cached,
    checked_session,
    difference,
    ids,
)

EXACT = 1e-10


class SharedByLayers(Rotary):
    """The last two layers attend over the keys and values of the first."""

    def __init__(self) -> None:
        super().__init__(layers=4)

    def run(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        kept = None
        for i, layer in enumerate(self.layers):
            at = layer.attention
            q = self.turn(at.q(layer.norm(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2))
            if i < 2:
                k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                        for t in at.kv(layer.norm(x)).chunk(2, -1))
                kept = kept or (self.turn(k), v)
                pair = (self.turn(k), v)
            y = F.scaled_dot_product_attention(q, *(pair if i < 2 else kept), is_causal=True)
            x = x + at.out(y.transpose(1, 2).flatten(2))
            x = x + layer.mlp(x)
        return x


class WithoutNumbers(nn.Module):
    """Layers that no number tells apart: such a model may be cut at any call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        for name in ("first", "second", "third"):
            setattr(self, name, nn.ModuleDict({
                n: nn.Linear(WIDTH, WIDTH, bias=False) for n in "qkvo"
            }))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for part in (self.first, self.second, self.third):
            q, k, v = (part[n](x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in "qkv")
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + part["o"](y.transpose(1, 2).flatten(2))
        return self.head(x)


class WideHead(Rotary):
    """A head that costs as much as several layers, which a prompt's program does without."""

    def __init__(self) -> None:
        super().__init__(layers=6)
        self.wide, self.head = nn.Linear(WIDTH, 400), nn.Linear(400, VOCABULARY)

    def run(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.wide(super().run(x, mask))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (SharedByLayers, "pp=2,ring=2"), (WithoutNumbers, "pp=2"), (WideHead, "pp=2,ring=2"),
        pytest.param(SharedByLayers, "pp=2", marks=pytest.mark.slow),
        pytest.param(WithoutNumbers, "pp=2,ring=2", marks=pytest.mark.slow),
        pytest.param(SharedByLayers, "pp=4", marks=pytest.mark.slow),
        pytest.param(WithoutNumbers, "pp=5", marks=pytest.mark.slow),
    ],
)
def test_turns(kind: type[nn.Module], spec: str) -> None:
    module, parallel = cached(kind, spec)
    tokens = ids(40)
    expected = module(tokens)
    with checked_session(parallel) as session:
        first = session.extend(tokens[:, :9], last=True)
        assert difference(first, expected[:, 8:9]) < EXACT
        for new in (1, 1, 20, 1):
            now = slice(session.length, session.length + new)
            assert difference(session.extend(tokens[:, now]), expected[:, now]) < EXACT


def test_a_prompt_is_cut_where_the_next_tokens_are() -> None:
    """By their own costs the two programs would begin the second stage at different layers."""
    _, parallel = cached(WideHead, "pp=2,ring=2")
    assert parallel.carried is not None
    assert parallel.prefill is not None
    assert caches_of(parallel.prefill.program) == caches_of(parallel.carried.program)
    for rank in range(4):
        kept = set(parallel.prefill.rank(rank).state) - {"new_slots"}
        assert kept <= set(parallel.carried.rank(rank).state)
        assert kept
