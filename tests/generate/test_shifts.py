"""Convolutions and shifts along the sequence: their last inputs are carried from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.runtime.tasks import CARRIED
from tests.generate.models import (
    CAPACITY,
    VOCABULARY,
    WIDTH,
    Rotary,
    cached,
    checked_session,
    difference,
    given,
    ids,
)
from tests.support import some_fast

EXACT, TURNS = 1e-10, (1, 1, 20, 1, 2, 1, 33, 1)


class Mixed(Rotary):
    """Embeddings that `mixed` adds something to, made from the tokens before."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3)
        self.dilated = nn.Conv1d(WIDTH, WIDTH, 3, dilation=2)
        self.first = nn.Parameter(torch.randn(1, 2, WIDTH))

    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return x + self.mixed(x)


class Convolution(Mixed):
    """As Hugging Face and Mamba write it: padded on both sides, what is too much cut off."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)


class Dilated(Mixed):
    """Padded on the left alone."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return self.dilated(F.pad(x.transpose(1, 2), (4, 0))).transpose(1, 2)


class TokenShift(Mixed):
    """As RWKV mixes each token with the one before."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return 0.7 * F.pad(x, (0, 0, 1, -1)) + 0.3 * x


class ByCat(Mixed):
    """Learned entries in front, of two tokens."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        front = self.first.expand(x.shape[0], -1, -1)
        return torch.cat([front, x[:, :-2]], 1) * x


class Twice(Mixed):
    """A convolution of a convolution's output: what is padded between is 0, not made from 0."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x.transpose(1, 2))[..., : x.shape[1]]
        z = self.dilated(F.pad(y.sigmoid(), (4, 0), value=0.5))
        return z.transpose(1, 2)


class Windows(Mixed):
    """The mean and the maximum of the last five tokens, by windows."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        windows = F.pad(x, (0, 0, 4, 0), value=-0.5).unfold(1, 5, 1)
        return windows.mean(-1) + windows.amax(-1)


class Sums(Mixed):
    """A sum of shifted copies, each of another age."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return sum(F.pad(x, (0, 0, i, 0))[:, : x.shape[1]] * 0.5**i for i in range(4))


class Differences(Mixed):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.diff(x, dim=1, prepend=self.first[:, :1].expand(x.shape[0], -1, -1))


class Products(Mixed):
    """Neighbours multiplied: a slice of the tokens meets another slice of them."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        pairs = x[:, 1:] * x[:, :-1]
        return F.pad(pairs, (0, 0, 1, 0), value=1.0)


class Picture(Mixed):
    """A convolution over tokens and features."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.plane = nn.Conv2d(1, 1, 3)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return self.plane(F.pad(x[:, None], (1, 1, 2, 0)))[:, 0]


class EveryLayer(Mixed):
    """A convolution in each layer."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def run(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        for layer in self.layers:
            x = x + self.conv(layer.norm(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
            x = layer(x, self.turn, mask)
        return x


class Ngrams(Mixed):
    """Ids of the tokens before are looked up as well."""

    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        before = F.pad(ids, (1, 0), value=7)[:, :-1]
        return self.embed(ids) + self.embed((before * 3 + ids) % VOCABULARY)


class PairsOfIds(Mixed):
    """Two slices of the ids are looked up, and a first entry is put in front of the pairs."""

    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        pairs = self.embed(ids[:, 1:]) * self.embed(ids[:, :-1])
        return self.embed(ids) + F.pad(pairs, (0, 0, 1, 0), value=1.0)


class AfterEnd(Mixed):
    """Documents end with token 0: the next one begins behind it."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def mask(self, ids: torch.Tensor) -> torch.Tensor:
        document = F.pad((ids == 0).long(), (1, -1)).cumsum(1)
        at = torch.arange(ids.shape[1])
        return ((document[:, :, None] == document[:, None]) & (at[:, None] >= at))[:, None]


class Changes(AfterEnd):
    """A document begins where an id is smaller than the one before."""

    def mask(self, ids: torch.Tensor) -> torch.Tensor:
        document = (torch.diff(ids, prepend=ids[:, :1]) < 0).cumsum(1)
        at = torch.arange(ids.shape[1])
        return ((document[:, :, None] == document[:, None]) & (at[:, None] >= at))[:, None]


class BeforeEnd(AfterEnd):
    """Whether a document ends is seen by the token before: it is not known yet."""

    def mask(self, ids: torch.Tensor) -> torch.Tensor:
        document = F.pad((ids == 0).long(), (-1, 1)).cumsum(1)
        at = torch.arange(ids.shape[1])
        return ((document[:, :, None] == document[:, None]) & (at[:, None] >= at))[:, None]


CAUSAL: tuple[Callable[[], nn.Module], ...] = (
    Convolution, Dilated, TokenShift, ByCat, Twice, Windows, Sums, Differences, Products, Picture,
    EveryLayer, Ngrams, PairsOfIds, AfterEnd, Changes,
)


@torch.no_grad()
def turns(kind: Callable[[], nn.Module], spec: str) -> None:
    module, parallel = cached(kind, spec)
    tokens = ids(CAPACITY)
    expected = module(tokens)
    with checked_session(parallel) as session:
        for prompt in (1, 9, 3):
            session.reset()
            found = session.extend(tokens[:, :prompt], last=True)
            assert difference(found, expected[:, prompt - 1 : prompt]) < EXACT
            for new in TURNS:
                now = slice(session.length, session.length + new)
                assert difference(session.extend(tokens[:, now]), expected[:, now]) < EXACT
            session.rewind(session.length - 20)
            for new in (9, CAPACITY - session.length - 9):  # up to the last place of the cache
                now = slice(session.length, session.length + new)
                assert difference(session.extend(tokens[:, now]), expected[:, now]) < EXACT


@pytest.mark.parametrize(
    "kind", some_fast(CAUSAL, fast=lambda kind: kind in (Convolution, ByCat, Twice, Changes))
)
def test_turns(kind: type[nn.Module]) -> None:
    turns(given(kind, layers=1), "ring=2")


def test_where_the_table_of_tokens_is_split() -> None:
    """What is shifted is a sum over the ranks of `tp`."""
    turns(ByCat, "tp=2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("spec", ["ring=4", "ring=2,tp=2", "pp=2", "ulysses=2", "tp=3"])
def test_meshes(kind: type[nn.Module], spec: str) -> None:
    turns(kind, spec)


def test_what_is_kept_is_as_long_as_what_is_looked_back_at() -> None:
    _, parallel = cached(EveryLayer, "ring=2", cache=100)
    assert parallel.carried is not None
    program = parallel.carried.program
    kept = {name for name, kind in program.state.items() if kind == "recent"}
    types = [str(n.meta["type"]) for n in program.graph.nodes if n.name in kept]
    # Of the second layer 3 tokens before, and a block to go back by; the first is made of ids.
    assert types == ["f64[b, 24, 35]"]


class Centred(Mixed):
    """Padded on both sides: each token sees the next one."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2))[..., 2:-1].transpose(1, 2)


class Ahead(Mixed):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, -1, 1))


class CutAndFilled(Mixed):
    """The last token counts as 0, until it is not the last any more."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :-1], (0, 0, 0, 1))


class Rolled(Mixed):
    """The first token sees the last."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, 1)


class Averaged(Mixed):
    """A mean over all tokens behind a shift."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 1, -1)).mean(1, keepdim=True) + x


class Strided(Mixed):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        y = F.conv1d(x.transpose(1, 2), self.conv.weight, groups=WIDTH, stride=2, padding=3)
        return y[..., :1].transpose(1, 2) + x


@pytest.mark.parametrize("kind", some_fast(
    (Centred, Ahead, CutAndFilled, Rolled, Averaged, Strided, BeforeEnd),
    fast=lambda kind: kind in (Centred, CutAndFilled, BeforeEnd),
))
def test_what_later_tokens_would_change_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(rc.RingCompileError, match="with a cache, this ") as refused:
        cached(given(kind, layers=1), "ring=2")
    reasons = ("needs all tokens", "cannot be shown to use only", "reads the whole sequence")
    assert any(reason in str(refused.value) for reason in reasons)
    assert "test_shifts.py:" in str(refused.value)


@torch.no_grad()
def test_going_back_further_than_is_kept_is_refused() -> None:
    module, parallel = cached(EveryLayer, "ring=2")
    tokens = ids(76)
    expected = module(tokens)
    with checked_session(parallel) as session:
        session.extend(tokens[:, :60])
        message = "cannot go back from 60 tokens to 27: the state of only the last"
        with pytest.raises(rc.RingCompileError, match=message):
            session.rewind(27)
        session.rewind(28)
        assert difference(session.extend(tokens[:, 28:40]), expected[:, 28:40]) < EXACT
        with pytest.raises(rc.RingCompileError, match="cannot go back from 60 tokens to 20"):
            session.rewind(20)
        session.reset()
        assert difference(session.extend(tokens[:, :9]), expected[:, :9]) < EXACT


@torch.no_grad()
def test_a_call_that_fails_may_have_written_over_what_was_kept() -> None:
    module, parallel = cached(EveryLayer, "ring=2")
    tokens = ids(76)
    expected = module(tokens)
    with checked_session(parallel) as session:
        session.extend(tokens[:, :20])
        for new, lost in ((20, False), (40, True)):
            weights = session.driver.runners[1].open(CARRIED).weights
            name = next(name for name in weights if "head" in name)
            whole, weights[name] = weights[name], weights[name][:0]
            with pytest.raises(rc.RingCompileError, match="failed"):
                session.extend(tokens[:, 20 : 20 + new])
            weights[name] = whole
            if lost:
                with pytest.raises(rc.RingCompileError, match="a failed call has overwritten"):
                    session.extend(tokens[:, 20:21])
        session.reset()
        assert difference(session.extend(tokens[:, :9]), expected[:, :9]) < EXACT
