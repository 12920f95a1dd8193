"""Linear attention over ranks and from call to call: a state travels and is kept, no tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.ir.communication import bytes_sent
from ringcompile.ir.expr import BATCH, bind, product
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import local_shape
from tests.generate.models import Rotary, cached, check_going_back
from tests.support import some_fast

WIDTH, HEADS, SIZE, FEATURES, EXACT = 8, 2, 3, 5, 1e-10


class Mixing(nn.Module):
    """Heads that read states, whose decays tokens choose."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read, self.enter = nn.Linear(width, HEADS * SIZE), nn.Linear(width, HEADS * SIZE)
        self.value, self.gate = nn.Linear(width, HEADS * FEATURES), nn.Linear(width, HEADS * SIZE)
        self.leave = nn.Linear(HEADS * FEATURES, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, gate = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.read, self.enter, self.value, self.gate)
        )
        # Every so often all is forgotten.
        decay = F.logsigmoid(3 * gate).masked_fill(gate > 0.9, -torch.inf)
        return self.leave(self.mixed(q, k, v, decay).transpose(1, 2).flatten(2))

    def mixed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor
    ) -> torch.Tensor:
        return rc.linear_attention(q, k, v, decay[..., 0])


class ByFeatures(Mixing):
    """Each feature of a key has a decay of its own."""

    def mixed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor
    ) -> torch.Tensor:
        return rc.linear_attention(q, k, v, decay)


class Delta(Mixing):
    """The gated delta rule."""

    def mixed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor
    ) -> torch.Tensor:
        beta = v[..., 0].sigmoid()
        return rc.linear_attention(q, F.normalize(k, dim=-1), v, decay[..., 0], beta)


class DeltaByFeatures(Mixing):
    """Both."""

    def mixed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor
    ) -> torch.Tensor:
        beta = v[..., 0].sigmoid()
        return rc.linear_attention(q, F.normalize(k, dim=-1), v, decay, beta)


# The numbers of a head that go to other ranks for each chunk: a state, and what is left of the one
# before, which by the delta rule is a matrix.
SENT = {
    Mixing: SIZE * FEATURES + 1, ByFeatures: SIZE * FEATURES + SIZE,
    Delta: SIZE * (SIZE + FEATURES), DeltaByFeatures: SIZE * (SIZE + FEATURES),
}


def check(kind: type[Mixing], spec: str, lengths: tuple[int, ...], order: str = "auto") -> int:
    """The bytes of all ranks for one sequence."""
    torch.manual_seed(0)
    model = kind(WIDTH).double().eval()
    program = rc.capture(model, (torch.randn(2, 12, WIDTH, dtype=torch.float64),))
    parallel = rc.transform(program, spec, order=order)
    for length in lengths:
        x = torch.randn(2, length, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(rc.run(parallel, (x,)), model(x), rtol=EXACT, atol=EXACT)
    sent = sum(bytes_sent(parallel.rank(rank)) for rank in range(parallel.world_size))
    return bind(sent, {BATCH: 1})


@pytest.mark.parametrize(
    ("kind", "order"),
    some_fast(SENT, ("contiguous", "zigzag"), fast=lambda kind, order: (
        (order == "zigzag") == (kind in (Mixing, Delta)))),
)
def test_a_state_and_what_is_left_of_the_one_before_travel(kind: type[Mixing], order: str) -> None:
    chunks = 8 if order == "zigzag" else 4
    assert check(kind, "ring=4", (24, 13, 1, 300), order) == chunks * 3 * HEADS * SENT[kind] * 8


@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast(SENT, ("time=2", "ring=2,time=2", "ring=2,tp=2", "ring=2,ulysses=2", "dp=2", "tp=2"),
              fast=lambda kind, spec: (kind, spec) in (
                  (Mixing, "ring=2,tp=2"), (Delta, "ring=2,time=2"),
    )),
)
def test_beside_other_axes(kind: type[Mixing], spec: str) -> None:
    check(kind, spec, (17, 2))


class Generating(Rotary):
    """Embeddings that states are mixed into, and attention behind it."""

    kind: type[Mixing] = Mixing

    def __init__(self) -> None:
        super().__init__()
        self.mixing = self.kind(self.embed.embedding_dim)

    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return x + self.mixing(x)


class GeneratingByDelta(Generating):
    """By the delta rule, feature by feature."""

    kind = DeltaByFeatures


@pytest.mark.parametrize(
    ("model", "spec"),
    some_fast((Generating, GeneratingByDelta), ("ring=2,tp=2", "pp=2", "ulysses=2"),
              fast=lambda model, spec: (model is Generating) == (spec == "ring=2,tp=2")
              and spec != "ulysses=2"),
)
def test_a_cache_keeps_states_at_the_starts_of_blocks(model: type[Generating], spec: str) -> None:
    check_going_back(*cached(model, spec, batch=2), again=70, too_far=37)


def test_what_is_kept_is_three_states_and_64_tokens() -> None:
    _, parallel = cached(Generating, "tp=2", batch=2)
    assert parallel.carried is not None
    program = parallel.carried.rank(0)
    kept = [
        type_of(node) for node in program.graph.nodes if program.state.get(node.name) == "recent"
    ]
    heads = HEADS // 2
    shapes = [local_shape(type_, program.mesh, program.sequence) for type_ in kept]
    numbers = sum(bind(product(shape), {BATCH: 1}) for shape in shapes)
    assert numbers == heads * (3 * SIZE * FEATURES + 64 * (SIZE + FEATURES + 1))


@pytest.mark.parametrize(("sizes", "text"), [
    ([(2, 7, 3), (2, 7, 4), (2, 7, 5), (2, 7)], "linear attention of q (2, 7, 3), k (2, 7, 4)"),
    ([(2, 7, 3), (2, 7, 3), (2, 6, 5), (2, 7)], "v (2, 6, 5), decay (2, 7)"),
    ([(7, 3), (7, 3), (5,), (7,)], "v (5,), decay (7,)"),
    ([(7, 3), (7, 3), (7, 5), (7, 4)], "decay (7, 4)"),
    ([(7, 3), (7, 3), (7, 5), (7,), (6,)], "decay (7,), beta (6,)"),
    ([(2, 7, 3), (2, 7, 3), (3, 7, 5), (7,)], "v (3, 7, 5), decay (7,) do not broadcast"),
])
def test_sizes_that_do_not_belong_together_are_refused(sizes: list[Any], text: str) -> None:
    with pytest.raises(rc.RingCompileError) as refused:
        rc.linear_attention(*map(torch.ones, sizes))
    assert text in str(refused.value)


def test_heads_and_sequences_broadcast() -> None:
    q, k, v = (torch.randn(*outer, 7, 3) for outer in ((2, 4), (1, 1), (4,)))
    decay = -torch.rand(4, 1).expand(4, 7)
    found = rc.linear_attention(q, k, v, decay)
    each = rc.linear_attention(q[1, 2], k[0, 0], v[2], decay[2])
    torch.testing.assert_close(found[1, 2], each)
