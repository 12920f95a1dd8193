"""Small causal models without any cache code: kinds of positions, masks and attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram

WIDTH, HEADS, VOCABULARY, CAPACITY = 24, 6, 40, 80


def ids(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + length)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


class Attention(nn.Module):
    """Self-attention with as many KV heads as asked for; `how` adds to the call."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH * groups // HEADS)

    def forward(self, x: torch.Tensor, turn: Any, mask: torch.Tensor | None) -> torch.Tensor:
        q = turn(self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2))
        k, v = (t.unflatten(-1, (self.groups, -1)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        k, v = (t.repeat_interleave(HEADS // self.groups, 1) for t in (turn(k), v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(groups)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor, turn: Any, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attention(self.norm(x), turn, mask)
        return x + self.mlp(x)


class Decoder(nn.Module):
    """Token embeddings, blocks, a head; subclasses say what positions and masks are."""

    def __init__(self, groups: int = HEADS, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(128, WIDTH)
        self.layers = nn.ModuleList(Block(groups) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids)

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def mask(self, ids: torch.Tensor) -> torch.Tensor | None:
        return None

    def run(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, self.turn, mask)
        return x

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.run(self.entered(ids), self.mask(ids)))


class Learned(Decoder):
    """Learned positions, looked up by number."""

    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids) + self.positions(torch.arange(ids.shape[1]))


class Table(Decoder):
    """A slice of a position table that is a buffer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("table", torch.randn(1, 100, WIDTH, generator=_seeded()))

    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids) + self.table[:, : ids.shape[1]]


class Rotary(Decoder):
    """Rotary positions."""

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        rates = 10.0 ** -(torch.arange(half, dtype=x.dtype) / half)
        angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), rates)
        a, b = x[..., :half], x[..., half:]
        return torch.cat(
            [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1
        )


class Window(Rotary):
    """Causal, seven keys back."""

    def mask(self, ids: torch.Tensor) -> torch.Tensor:
        apart = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
        return (apart >= 0) & (apart < 7)


class Alibi(Decoder):
    """A bias that grows with the distance, another one for every head."""

    def mask(self, ids: torch.Tensor) -> torch.Tensor:
        apart = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
        slopes = 0.5 ** torch.arange(1, HEADS + 1, dtype=self.head.weight.dtype)
        bias = -slopes[:, None, None] * apart.abs()
        return bias.masked_fill(apart < 0, -torch.inf)


class Chunked(Rotary):
    """Causal within chunks of ten tokens."""

    def mask(self, ids: torch.Tensor) -> torch.Tensor:
        at = torch.arange(ids.shape[1])
        same = at[:, None] // 10 == at // 10
        return same & (at[:, None] >= at)


class Documents(Rotary):
    """Token 0 begins a document; queries see their own only."""

    def mask(self, ids: torch.Tensor) -> torch.Tensor:
        document = (ids == 0).cumsum(1)
        at = torch.arange(ids.shape[1])
        return ((document[:, :, None] == document[:, None]) & (at[:, None] >= at))[:, None]


class Counted(Decoder):
    """Positions by counting, and the running mean of all tokens before."""

    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.positions(torch.ones_like(ids).cumsum(1) - 1)
        count = torch.arange(1, ids.shape[1] + 1, dtype=x.dtype)
        return x + x.cumsum(1) / count[:, None]


class Shared(Rotary):
    """Two attentions of a layer over the same values, two others over the same keys."""

    def run(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        for layer in self.layers:
            at = layer.attention
            q = at.q(layer.norm(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                    for t in at.kv(layer.norm(x)).chunk(2, -1))
            pairs = ((k, v), (self.turn(k), v), (k, -v), (k.flip(-1), -v))
            y = sum(F.scaled_dot_product_attention(q, *pair, is_causal=True) for pair in pairs)
            x = x + at.out(y.transpose(1, 2).flatten(2))
        return x


class LastToken(Rotary):
    """Logits of the last token alone."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.run(self.entered(ids), None)[:, -1])


class LastAsSlice(Rotary):
    """The same with the dim of tokens kept."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.run(self.entered(ids), None)[:, -1:])


class Padded(Rotary):
    """Keys hidden by a mask that the caller passes, positions counted by it."""

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        at = torch.arange(ids.shape[1])
        mask = (at[:, None] >= at) & (attention_mask[:, None, None] != 0)
        x = self.embed(ids) + self.positions(self.positions_of(attention_mask))
        return self.head(self.run(x, mask))

    def positions_of(self, attention_mask: torch.Tensor) -> torch.Tensor:
        return (attention_mask.cumsum(1) - 1).clamp(min=0)


ALL: dict[str, Callable[[], Decoder]] = {
    **{kind.__name__: kind for kind in (
        Learned, Table, Rotary, Window, Alibi, Chunked, Documents, Counted, Shared,
    )},
    "grouped": lambda: Rotary(groups=2),
    "one KV head": lambda: Alibi(groups=1),
}


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def with_gain(module: nn.Module) -> nn.Module:
    """The module in float64, with weights that keep values at a size of about one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.6 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.2
            parameter.normal_(0, scale)
    return module.double().eval()


@cache
def given(kind: Callable[..., nn.Module], *parts: Any, **options: Any) -> Callable[[], nn.Module]:
    """A kind of model, made of some parts: the same object for the same ones, captured once."""
    return partial(kind, *parts, **options)


@lru_cache
def padded(kind: Callable[[], nn.Module] = Padded) -> tuple[nn.Module, Program]:
    """The same as `captured`, of a model that takes a mask of keys beside its tokens."""
    module = with_gain(kind())
    return module, rc.capture(module, (ids(12, 2), torch.ones(2, 12, dtype=torch.int64)))


@lru_cache
def captured(kind: Callable[[], nn.Module], batch: int = 1) -> tuple[nn.Module, Program]:
    """The module in float64 with gain, and what was captured of it on tokens."""
    module = with_gain(kind())
    return module, rc.capture(module, (ids(12, batch),))


@lru_cache
def cached(
    kind: Callable[[], nn.Module], spec: str, batch: int = 1, cache: int = CAPACITY
) -> tuple[nn.Module, ParallelProgram]:
    """The module, and what it is compiled to with a cache."""
    module, program = captured(kind, batch)
    return module, rc.transform(program, spec, cache=cache)


def checked_session(parallel: ParallelProgram) -> rc.Session:
    """A session in lock-step that holds every value against its type."""
    assert parallel.carried is not None
    parallel.carried.verify()
    return rc.Session(parallel, check_types=True)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of the largest expected value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def check_going_back(
    module: nn.Module, parallel: ParallelProgram, again: int, too_far: int
) -> None:
    """Turns of a session that keeps states of 32 tokens: it goes back by as many, and no further.

    Args:
        module: the model, in float64.
        parallel: what it is compiled to, for two sequences.
        again: up to which token it goes on from token 18, of 50.
        too_far: a length that it then cannot go back to.
    """
    tokens = ids(80, batch=2)
    expected = module(tokens)
    with checked_session(parallel) as session:

        def extend(end: int) -> None:
            now = slice(session.length, end)
            assert difference(session.extend(tokens[:, now]), expected[:, now]) < 1e-10

        for end in (1, 7, 8, 48, 50):
            extend(end)
        session.rewind(18)
        extend(again)
        with pytest.raises(rc.RingCompileError, match="only the last 32 tokens is kept"):
            session.rewind(too_far)
        session.reset()
        extend(3)
