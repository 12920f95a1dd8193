"""Turns of a session against the whole model on all tokens so far."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.runtime.cache import Memory
from ringcompile.runtime.executor import Executor
from tests.generate.models import (
    ALL,
    CAPACITY,
    HEADS,
    LastToken,
    Learned,
    Rotary,
    Window,
    cached,
    captured,
    checked_session,
    difference,
    given,
    ids,
    padded,
)
from tests.support import furthest, some_fast

EXACT = 1e-10
TURNS = (5, 1, 1, 33, 1, 2, 1, 30, 1, 1)  # 76 tokens: more than two blocks of 32


def memories(session: rc.Session) -> list[Memory]:
    """What each rank keeps, in lock-step."""
    return [runner.memory for runner in session.driver.runners]


@torch.no_grad()
def worst(session: rc.Session, module: nn.Module, tokens: torch.Tensor, turns: Any) -> float:
    """The largest difference over turns, from where the session is."""
    found = []
    expected = module(tokens)
    for new in turns:
        at = session.length
        logits = session.extend(tokens[:, at : at + new])
        found.append(difference(logits, expected[:, at : at + new]))
    return furthest(found)


@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast(
        ALL, ("ring=2,tp=3", "ring=2", "tp=2"),  # what masks hide is the same for all heads
        fast=lambda kind, spec: kind not in ("Counted", "Table", "Alibi") and spec == (
            "ring=2" if kind in ("Window", "Chunked", "Documents") else "ring=2,tp=3")),
)
def test_turns(kind: str, spec: str) -> None:
    """Every logit of every turn, values held against their types."""
    module, parallel = cached(ALL[kind], spec)
    with checked_session(parallel) as session:
        assert worst(session, module, ids(76), TURNS) < EXACT


@pytest.mark.parametrize(
    "spec",
    ["ulysses=3", "pp=2,ring=2", *(
        pytest.param(spec, marks=pytest.mark.slow)
        for spec in ("ring=4", "pp=2", "ring=2,ulysses=2", "pp=2,tp=2", "tp=6", "pp=2,ring=2,tp=2")
    )],
)
def test_meshes(spec: str) -> None:
    module, parallel = cached(ALL["grouped"], spec)
    with checked_session(parallel) as session:
        assert worst(session, module, ids(76), TURNS) < EXACT


def test_replicas_have_rows_of_their_own() -> None:
    module, parallel = cached(Window, "dp=2,ring=2", batch=2)
    with checked_session(parallel) as session:
        assert worst(session, module, ids(76, batch=4), TURNS) < EXACT


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8])
def test_prompts_shorter_than_the_ring(length: int) -> None:
    """Ranks that keep nothing take part, and add nothing."""
    module, parallel = cached(Learned, "ring=4")
    with checked_session(parallel) as session:
        assert worst(session, module, ids(20), (length, *(1,) * 8)) < EXACT


def test_random_turns_back_and_forth() -> None:
    (module, parallel), draw = cached(Rotary, "ring=4"), random.Random(0)
    tokens = ids(CAPACITY)
    with checked_session(parallel) as session:
        for turn in range(12):
            new = draw.randint(1, 20)
            if session.length + new > CAPACITY:
                session.rewind(draw.randint(0, session.length))
                tokens = torch.cat([tokens[:, : session.length], ids(CAPACITY, seed=turn)], 1)
            assert worst(session, module, tokens[:, :CAPACITY], (new,)) < EXACT
        session.reset()
        assert worst(session, module, ids(9, seed=5), (9,)) < EXACT


def test_unused_slots_may_hold_anything() -> None:
    """NaN in slots that hold no token must not reach a result."""
    module, parallel = cached(Window, "ring=4")
    with checked_session(parallel) as session:
        session.extend(ids(3))
        session.reset()
        for memory in memories(session):
            assert memory.kept
            for kept in memory.kept.values():
                kept.fill_(torch.nan)
        assert worst(session, module, ids(50), (3, 1, 40, 1)) < EXACT


def test_every_rank_keeps_its_share() -> None:
    with checked_session(cached(ALL["grouped"], "ring=4", cache=400)[1]) as session:
        for new in (300, *(1,) * 40):
            session.extend(ids(new))
        kept = [memory.ledger.count(memory.rank) for memory in memories(session)]
        assert sum(kept) == 340
        assert max(kept) - min(kept) <= 32
        row = 2 * 2 * (24 // HEADS) * 8  # keys and values, KV heads, head dim, bytes
        assert [memory.num_bytes for memory in memories(session)] == [
            2 * row * count for count in kept  # layers
        ]


def test_bytes_of_a_decode_step() -> None:
    """One all-gather a layer: outputs and log-sum-exps of all heads, to each of the others."""
    parallel = cached(Rotary, "ring=4")[1]
    with checked_session(parallel) as session:
        session.extend(ids(9))
        session.extend(ids(1))
        step = 2 * HEADS * (24 // HEADS + 1) * 8 * 3  # layers, heads, row, bytes, other ranks
        assert session.driver.bytes_sent == [step] * 4


def test_the_last_token_alone() -> None:
    module, parallel = cached(LastToken, "ring=2")
    with torch.no_grad(), checked_session(parallel) as session:
        for new in (5, 1, 9):
            at = session.length
            found = session.extend(ids(20)[:, at : at + new])
            assert difference(found, module(ids(20)[:, : at + new])) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("spec", ["ring=4", "tp=2", "pp=2"])
def test_last(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head, and what else is behind the last layer's exchanges, sees one token."""
    module, parallel = cached(Rotary, spec)
    heads: list[int] = []
    linear = torch.ops.aten.linear.default

    called = Executor._called

    def seen(self: Executor, step: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if step.node.target is linear and args[1].shape[0] == 40:
            heads.append(args[0].shape[1])
        return called(self, step, args, kwargs)

    monkeypatch.setattr(Executor, "_called", seen)
    with checked_session(parallel) as session:
        for new in (7, 5, 1):
            at = session.length
            found = session.extend(ids(20)[:, at : at + new], last=True)
            expected = module(ids(20)[:, : at + new])[:, -1:]
            assert difference(found, expected) < EXACT
    assert set(heads) == {1}


@torch.no_grad()
def test_rows_of_unequal_length() -> None:
    """Padding on the left is hidden from then on, and positions count without it."""
    module, program = padded()
    tokens, mask = ids(40, batch=2), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :6] = 0
    expected = module(tokens, mask)
    for spec in ("ring=2", "tp=2"):
        with checked_session(rc.transform(program, spec, cache=64)) as session:
            for new in (9, 1, 1, 20, 1):
                now = slice(session.length, session.length + new)
                found = session.extend((tokens[:, now], mask[:, now]))
                assert difference(found, expected[:, now]) < EXACT


class TwoWays(Rotary):
    def mask(self, ids: torch.Tensor) -> torch.Tensor:
        apart = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
        return apart.abs() < 5


class Mean(Rotary):
    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return x - x.mean(1, keepdim=True)


class Scaled(Rotary):
    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids) / ids.shape[1]


class Backwards(Learned):
    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids) + self.positions(torch.arange(ids.shape[1]).flip(0))


class Counts(Learned):
    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids) * (ids != 0).sum(1)[:, None, None]


class Sorted(Rotary):
    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids.sort(1).values)


class Furthest(Learned):
    """As rotary scales that depend on the total length do it."""

    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        at = torch.arange(ids.shape[1])
        return self.embed(ids) + self.positions(at) * (at.max() + 1)


class FromTheEnd(Learned):
    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids) + self.positions(torch.arange(-ids.shape[1], 0) + 100)


_NUMBER = "is used as a number"
_LATER = "reads the whole sequence|needs all tokens"


@pytest.mark.parametrize(
    ("kind", "message", "node"),
    [
        (TwoWays, "no query may see later keys", "scaled_dot_product_attention"),
        (Mean, _LATER, "mean"),
        (Scaled, _NUMBER, "div"),
        (Backwards, _LATER, "flip"),
        (Counts, _LATER, "sum"),
        (Sorted, _LATER, "sort"),
        (Furthest, _LATER, "max"),
        (FromTheEnd, _NUMBER, "arange"),
    ],
)
def test_what_later_tokens_would_change_is_refused(
    kind: type[nn.Module], message: str, node: str
) -> None:
    with pytest.raises(rc.RingCompileError, match=message) as refused:
        cached(given(kind, layers=1), "ring=2")
    assert str(refused.value.node).startswith(node)
    assert "models.py:" in str(refused.value) or "test_session.py:" in str(refused.value)


class Encoder(Rotary):
    def run(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        for layer in self.layers:
            attention = layer.attention
            q = attention.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return x


def test_an_encoder_is_refused() -> None:
    with pytest.raises(rc.RingCompileError, match="no query may see later keys"):
        cached(Encoder, "tp=2")


def test_a_table_with_fewer_positions_than_the_cache() -> None:
    with pytest.raises(rc.RingCompileError, match="the position table has only 128 rows"):
        cached(Learned, "ring=2", cache=129)


def test_an_error_on_the_way_leaves_the_tokens_before() -> None:
    module, parallel = cached(Learned, "ring=4")
    with checked_session(parallel) as session:
        session.extend(ids(30)[:, :20])
        weights = session.driver.runners[3].opened["carried"].weights
        name = next(iter(weights))
        kept, weights[name] = weights[name], weights[name][:0]
        with pytest.raises(rc.RingCompileError, match="failed"):
            session.extend(ids(30)[:, 20:])
        weights[name] = kept
        assert worst(session, module, ids(30), (10,)) < EXACT


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("halves=2", {}, "a cache cannot be combined with halves=2"),
        ("ring=2", {"cache": 0}, "a cache for 0 tokens"),
        ("ring=2", {"cache": 101}, "the model's own code allows 100 at most"),
    ],
)
def test_a_cache_that_cannot_be(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(rc.RingCompileError, match=message):
        cached(ALL["Table"], spec, **options)


def test_what_a_session_refuses_changes_nothing() -> None:
    module, parallel = cached(Learned, "ring=4")
    with checked_session(parallel) as session:
        session.extend(ids(70)[:, :50])
        for inputs, message in (
            (ids(31), "the cache is for 80 tokens: 50 are in it, and 31 more do not fit"),
            (ids(3, batch=2), "has 2 sequences, the session is for 1"),
            (ids(3)[:, :0], "pass at least one new token"),
            (ids(3)[0], "has shape .3., the program takes 2 dims"),
            (ids(3).float(), "torch.float32"),
            ((ids(3), ids(3)), "takes the inputs"),
        ):
            with pytest.raises(rc.RingCompileError, match=message):
                session.extend(inputs)
        with pytest.raises(rc.RingCompileError, match="cannot go back to 51 tokens"):
            session.rewind(51)
        assert worst(session, module, ids(70), (20,)) < EXACT
    with pytest.raises(rc.RingCompileError, match="the session is closed"):
        session.extend(ids(1))
    with pytest.raises(rc.RingCompileError, match="unknown backend 'mpi'"):
        rc.Session(parallel, backend="mpi")


def test_a_program_without_a_cache() -> None:
    parallel = rc.transform(captured(Learned)[1], "ring=4")
    with rc.Session(parallel) as session:
        assert session.run(ids(5)).shape == (1, 5, 40)
        for asked in (lambda: session.extend(ids(5)), lambda: session.capacity):
            with pytest.raises(rc.RingCompileError, match="compiled without a cache"):
                asked()


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast(
        ALL, ("ring=4", "ring=3,tp=2", "pp=2,ring=2"),
        fast=lambda kind, spec: (kind, spec) in (
            ("grouped", "ring=3,tp=2"), ("Window", "pp=2,ring=2"), ("Shared", "ring=4"),
        ),
    ),
)
def test_a_prompt_that_the_ring_divides(kind: str, spec: str) -> None:
    """Its keys stay where they were computed; what follows sees each of them once."""
    module, parallel = cached(ALL[kind], spec)
    # A prefix sum is state, which no ring leaves behind: such prompts are computed on every rank.
    assert (parallel.prefill is None) == (kind in ("Counted", "Documents"))
    tokens = ids(76)
    expected = module(tokens)
    with checked_session(parallel) as session:
        for prompt in (9, 40, 41):
            session.reset()
            found = session.extend(tokens[:, :prompt], last=True)
            assert difference(found, expected[:, prompt - 1 : prompt]) < EXACT
            assert worst(session, module, tokens, (1, 1, 20, 1)) < EXACT
            session.rewind(prompt - 3)
            assert worst(session, module, tokens, (1, 7)) < EXACT
        kept = [memory.ledger.count(memory.rank) for memory in memories(session)]
        assert max(kept) - min(kept) <= 32


def test_a_prompt_is_computed_once() -> None:
    """Transfers of the ring, as for any sequence, and then one all-gather a layer."""
    parallel = cached(Rotary, "ring=4")[1]
    assert parallel.prefill is not None
    assert not parallel.prefill.program.outputs
    with checked_session(parallel) as session:
        session.extend(ids(65), last=True)
        kept = [memory.ledger.count(memory.rank) for memory in memories(session)]
        assert kept == [17, 16, 16, 16]  # the prompt in equal parts, and the last token


def test_weights_lie_in_memory_as_one_token_reads_them_fastest() -> None:
    """Column by column where there are as many rows as columns or more; with the same entries."""
    parallel = cached(Rotary, "ring=1")[1]
    with checked_session(parallel) as session:
        session.extend(ids(5))
        opened = session.driver.runners[0].open("carried")
    program, weights, orders = opened.program, opened.weights, set()
    matrices = {node.args[1].name for node in program.graph.nodes
                if node.target is torch.ops.aten.linear.default}
    for name in matrices:
        weight, saved = weights[name], parallel.source(program.weights[name].name)
        rows, columns = weight.shape
        by_column = rows >= columns
        assert weight.stride() == ((1, rows) if by_column else (columns, 1))
        assert torch.equal(weight, saved)
        orders.add(by_column)
    assert orders == {True, False}
