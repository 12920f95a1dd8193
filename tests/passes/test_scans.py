"""Linear recurrences written by prefix products and sums: one state a chunk goes to other ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.ir.communication import bytes_sent
from ringcompile.ir.expr import BATCH, bind
from tests.generate.models import Rotary, cached, check_going_back, checked_session, difference, ids
from tests.support import some_fast

WIDTH, HEAD, EXACT = 8, 4, 1e-10
Pair = tuple[torch.Tensor, torch.Tensor]


class Recurrent(nn.Module):
    """A recurrence between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.enter(x).chunk(3, -1)
        return self.leave(self.mixed(q, k, v, torch.sigmoid(self.gate(x) + 2)))

    def mixed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        raise NotImplementedError


class ByProducts(Recurrent):
    """h = a h + v, with a from each token: by products of decays."""

    def mixed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        decay = gate.cumprod(1)
        return q * decay * (v / decay).cumsum(1)


class ByLogarithms(Recurrent):
    """The same by sums of logarithms."""

    def mixed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        decay = torch.log(gate).cumsum(1)
        return q * torch.exp(decay) * (v * torch.exp(-decay)).cumsum(1)


class LinearAttention(Recurrent):
    """Sums of outer products of keys and values, and of keys for the denominator."""

    def mixed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        states = (k[..., :, None] * v[..., None, :]).cumsum(1)
        return torch.einsum("bsk,bskv->bsv", q, states) / (q * k.cumsum(1)).sum(-1, keepdim=True)


class Retention(Recurrent):
    """Heads with decays of their own, the same for all tokens."""

    def mixed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (2, HEAD)) for x in (q, k, v))
        place = torch.arange(q.shape[1])[:, None, None]
        decay = torch.tensor([0.9, 0.8], dtype=q.dtype)[:, None] ** place
        states = ((k / decay)[..., :, None] * v[..., None, :]).cumsum(1)
        return torch.einsum("bshk,bshkv->bshv", q * decay, states).flatten(2)


class Weighted(Recurrent):
    """Means of the values so far, weighted by exponentials of keys, as RWKV has them."""

    def mixed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        total, value = k.logcumsumexp(1), (k + F.logsigmoid(v)).logcumsumexp(1)
        return torch.sigmoid(q) * torch.exp(value - total)


class ByScan(Recurrent):
    """h = a h + v as an associative scan, with decays down to nothing that products cannot undo."""

    def mixed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        decay = gate * (k > 0)
        return q * associative_scan(_then, (decay, v), 1, combine_mode="generic")[1]


class StateSpace(Recurrent):
    """Mamba's selective state space: HEAD states for each feature."""

    def mixed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        step, rates = F.softplus(k)[..., None], -torch.arange(1.0, HEAD + 1, dtype=k.dtype)
        entering = step * v[..., None] * q[..., None, :HEAD]
        scanned = associative_scan(
            _then, (torch.exp(step * rates), entering), 1, combine_mode="generic"
        )
        return (scanned[1] * gate[..., None, :HEAD]).sum(-1)


def _then(left: Pair, right: Pair) -> Pair:
    return left[0] * right[0], right[0] * left[1] + right[1]


# The numbers that one chunk's state has for each sequence.
CASES = {
    ByProducts: 2 * WIDTH, ByLogarithms: 2 * WIDTH, LinearAttention: WIDTH * WIDTH + WIDTH,
    Retention: 2 * HEAD * HEAD, Weighted: 2 * WIDTH, ByScan: 2 * WIDTH,
    StateSpace: 2 * WIDTH * HEAD,
}


def check(kind: type[Recurrent], spec: str, lengths: tuple[int, ...], order: str = "auto") -> int:
    """The bytes of all ranks for one sequence."""
    torch.manual_seed(0)
    model = kind().double().eval()
    program = rc.capture(model, (torch.randn(2, 12, WIDTH, dtype=torch.float64),))
    parallel = rc.transform(program, spec, order=order)
    for length in lengths:
        x = torch.randn(2, length, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(rc.run(parallel, (x,)), model(x), rtol=EXACT, atol=EXACT)
    sent = sum(bytes_sent(parallel.rank(rank)) for rank in range(parallel.world_size))
    return bind(sent, {BATCH: 1})


@pytest.mark.parametrize(
    ("kind", "order"),
    some_fast(CASES, ("contiguous", "zigzag"), fast=lambda kind, order: (kind, order) in (
        (ByProducts, "zigzag"), (LinearAttention, "contiguous"), (Weighted, "zigzag"),
        (ByScan, "zigzag"), (StateSpace, "contiguous"),
    )),
)
def test_only_a_state_of_each_chunk_travels(kind: type[Recurrent], order: str) -> None:
    chunks = 8 if order == "zigzag" else 4
    assert check(kind, "ring=4", (24, 13, 1), order) == chunks * 3 * CASES[kind] * 8


@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast(CASES, ("time=2", "ring=2,time=2", "ring=2,tp=2", "ring=2,ulysses=2"),
              fast=lambda kind, spec: (kind, spec) in (
                  (ByProducts, "ring=2,time=2"), (Weighted, "ring=2,tp=2"),
                  (StateSpace, "ring=2,time=2"), (ByScan, "ring=2,tp=2"),
    )),
)
def test_beside_other_axes(kind: type[Recurrent], spec: str) -> None:
    check(kind, spec, (17, 2))


class Generating(Rotary):
    """Embeddings, and a recurrence of them by products and logarithms."""

    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        decay = torch.sigmoid(x + 4).cumprod(1)
        return decay * (x / decay).cumsum(1) + x.logcumsumexp(1)


@pytest.mark.parametrize("spec", ["ring=2", pytest.param("tp=2", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_cache_keeps_products_and_logarithms(spec: str) -> None:
    module, parallel = cached(Generating, spec)
    tokens = ids(40)
    expected = module(tokens)
    with checked_session(parallel) as session:
        for new in (7, 1, 20):
            now = slice(session.length, session.length + new)
            assert difference(session.extend(tokens[:, now]), expected[:, now]) < EXACT
        session.rewind(5)
        assert difference(session.extend(tokens[:, 5:9]), expected[:, 5:9]) < EXACT
        session.reset()
        assert difference(session.extend(tokens[:, :3]), expected[:, :3]) < EXACT


class Recurring(Rotary):
    """A recurrence of the embeddings with gates down to 0, and attention behind it."""

    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        gates = torch.sigmoid(2 * x) * (x < 1)
        return x + associative_scan(_then, (gates, x), 1, combine_mode="generic")[1]


class Alone(Recurring):
    """The same without any attention, so that a stage of a pipeline may keep nothing."""

    def run(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer.mlp(x)
        return x


@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast((Recurring, Alone), ("ring=2,tp=2", "pp=2", "ulysses=2"),
              fast=lambda kind, spec: (kind, spec) in (
                  (Recurring, "ring=2,tp=2"), (Alone, "pp=2"),
    )),
)
def test_a_cache_keeps_the_last_states(kind: type[Rotary], spec: str) -> None:
    check_going_back(*cached(kind, spec, batch=2), again=25, too_far=17)
