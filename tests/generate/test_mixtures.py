"""Mixtures of experts in plain PyTorch, token by token: routing is each token's own affair."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.models.config import TransformerConfig
from ringcompile.models.moe import MoE
from tests.generate.models import (
    CAPACITY,
    VOCABULARY,
    WIDTH,
    Rotary,
    cached,
    captured,
    checked_session,
    difference,
    given,
    ids,
)

EXACT, EXPERTS, TURNS = 1e-10, 4, (1, 1, 20, 1, 5)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH))

    def chosen(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(self.router(x).softmax(-1).topk(2, -1))

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x @ self.up[e]) @ self.down[e]


class Dense(Mixture):
    """Every expert on every token, weighed by 0 unless it is one of the best two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, index = self.chosen(x)
        gates = torch.zeros(*x.shape[:2], EXPERTS, dtype=x.dtype).scatter(-1, index, weight)
        hidden = F.gelu(torch.einsum("bsd,edf->besf", x, self.up))
        return torch.einsum("besf,efd,bse->bsd", hidden, self.down, gates)


class Gathered(Mixture):
    """The weights of each token's own experts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, index = self.chosen(x)
        hidden = F.gelu(torch.einsum("bsd,bskdf->bskf", x, self.up[index]))
        return torch.einsum("bskf,bskfd,bsk->bsd", hidden, self.down[index], weight)


class Loop(Mixture):
    """Expert by expert."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, index = self.chosen(x)
        return sum(
            (weight * (index == e)).sum(-1, keepdim=True) * self.expert(e, x)
            for e in range(EXPERTS)
        )


class Sorted(Mixture):
    """Tokens sorted by their experts: no layout fits, but a token's result is its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        weight, index = self.chosen(tokens)
        order = index.flatten().argsort(stable=True)
        rows, expert = order // 2, index.flatten()[order]
        hidden = F.gelu(torch.bmm(tokens[rows][:, None], self.up[expert]))
        out = torch.bmm(hidden, self.down[expert])[:, 0] * weight.flatten()[order][:, None]
        return torch.zeros_like(tokens).index_add(0, rows, out).view_as(x)


class FirstFew(Mixture):
    """An expert takes the first four tokens of a sequence that choose it: a prefix sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, index = self.router(x).softmax(-1).max(-1)
        hot = F.one_hot(index, EXPERTS)
        kept = (hot.cumsum(1) * hot).sum(-1) <= 4
        return sum(
            (((index == e) & kept) * weight)[..., None] * self.expert(e, x)
            for e in range(EXPERTS)
        )


class HalfOfAll(Mixture):
    """An expert takes half of all tokens of the batch: how many there are matters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, index = self.router(x).softmax(-1).max(-1)
        hot = F.one_hot(index, EXPERTS)
        kept = (hot.cumsum(1) * hot).sum(-1) <= x.shape[1] // 2
        return sum(
            (((index == e) & kept) * weight)[..., None] * self.expert(e, x)
            for e in range(EXPERTS)
        )


class Routed(Rotary):
    def __init__(self, mixture: type[Mixture]) -> None:
        super().__init__()
        self.mixture = mixture()

    def run(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, self.turn, mask)
            x = x + self.mixture(x)
        return x


class Behind(Rotary):
    """One layer, and behind it a mixture with slots: no key depends on which tokens are dropped."""

    def __init__(self, factor: int | None) -> None:
        super().__init__(layers=1)
        self.mixture = MoE(TransformerConfig(
            vocab_size=VOCABULARY, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=WIDTH // 2,
            hidden_size=WIDTH, mlp_hidden=32, num_experts=EXPERTS, top_k=2,
            capacity_factor=factor and Fraction(factor),
        ))

    def run(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = super().run(x, mask)
        return x + self.mixture(x)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mixture", "spec"),
    [*(FAST := ((Gathered, "ring=2,tp=2"), (FirstFew, "ring=4"))), *(
        pytest.param(mixture, spec, marks=pytest.mark.slow)
        for mixture in (Dense, Gathered, Loop, FirstFew, Sorted)
        for spec in ("ring=4", "ring=2,tp=2", "pp=2", "ulysses=2")
        if (mixture, spec) not in FAST
    )],
)
def test_turns(mixture: type[Mixture], spec: str) -> None:
    module, parallel = cached(given(Routed, mixture), spec)
    tokens = ids(60)
    expected = module(tokens)
    with checked_session(parallel) as session:
        first = session.extend(tokens[:, :9], last=True)
        assert difference(first, expected[:, 8:9]) < EXACT
        for new in TURNS:
            now = slice(session.length, session.length + new)
            assert difference(session.extend(tokens[:, now]), expected[:, now]) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("spec", [pytest.param("ring=2", marks=pytest.mark.slow), "ep=2"])
def test_a_capacity_may_count_the_tokens_of_a_call(spec: str) -> None:
    """A prompt drops what the model drops of it as a whole sequence; one token is never dropped."""
    (module, program), (free, _) = (captured(given(Behind, factor)) for factor in (1, None))
    parallel = rc.transform(program, spec, cache=CAPACITY, capacity="local")
    assert any("capacity is counted over these" in note for note in parallel.notes)
    assert parallel.with_cache().program.notes == (
        "mixture: experts run on the new tokens of each call; capacity is counted over these",
    )
    tokens = ids(34)
    expected = module(tokens[:, :30])
    assert difference(free(tokens[:, :30]), expected) > 1e-2
    with checked_session(parallel) as session:
        assert difference(session.extend(tokens[:, :30]), expected) < EXACT
        for end in range(31, 35):
            found = session.extend(tokens[:, end - 1 : end])
            assert difference(found, free(tokens[:, :end])[:, -1:]) < EXACT


def test_a_capacity_over_several_sequences_is_refused() -> None:
    with pytest.raises(rc.RingCompileError) as refused:
        cached(given(Behind, 1), "ring=2")
    assert str(refused.value).endswith(
        "error: a prefix sum runs over the tokens of several sequences\n"
        "    arrival = ((one_hot.cumsum(dim=0) - 1) * one_hot).sum(dim=-1)\n"
        "  node: %cumsum\n  layer: mixture\n"
        "  hint: sum along the tokens of each sequence; if it is a capacity of experts, "
        "--capacity local counts the new tokens of each call"
    )


def test_a_capacity_that_counts_all_tokens_is_refused() -> None:
    with pytest.raises(rc.RingCompileError, match="is used as a number") as refused:
        cached(given(Routed, HalfOfAll), "ring=2")
    assert "test_mixtures.py:" in str(refused.value)
