"""Mistakes that other systems made when they split a cache, each as a small case.

The rest of them are where their subject is: ranks without slots, unused slots, short prompts and
prefixes in `test_session.py` and `test_generation.py`; prompts at a block's edge and 256 tokens in
`test_real_text.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ringcompile as rc
from tests.generate.models import (
    ALL,
    WIDTH,
    Learned,
    Rotary,
    Window,
    cached,
    checked_session,
    difference,
    ids,
)

EXACT = 1e-10
TURNS = (9, 1, 1, 40, 1, 3, 1)


class Tied(Learned):
    """The head is the table of token embeddings, which two stages of a pipeline hold then."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.head.weight = self.embed.weight


class SharedExpert(nn.Module):
    """Two of four experts for each token, and one for all, behind a gate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.gate = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 1)
        self.up = nn.Parameter(torch.empty(4, WIDTH, 2 * WIDTH))
        self.down = nn.Parameter(torch.empty(4, 2 * WIDTH, WIDTH))
        self.shared = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        share = torch.zeros_like(self.router(x)).scatter(-1, chosen, weights)
        each = torch.einsum("bsd,edf->bsef", x, self.up).relu()
        routed = torch.einsum("bsef,efd,bse->bsd", each, self.down, share)
        return routed + self.gate(x).sigmoid() * self.shared(x)


class Mixed(Rotary):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for layer in self.layers:
            layer.mlp = SharedExpert()


TRAPS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "fewer KV heads than ranks": (ALL["grouped"], ("ring=2,tp=6", "tp=6", "ring=2,tp=3")),
    "a head tied to the embedding": (Tied, ("pp=2,ring=2", "pp=2", "tp=2", "pp=2,tp=2")),
    "an expert for all tokens": (Mixed, ("dp=2,ring=2,tp=2", "ring=4", "tp=2", "pp=2,dp=2")),
    "a window that the cache is longer than": (Window, ("ring=3", "ring=2,ulysses=3")),
}
# The first spec of each is fast.
CASES = [
    pytest.param(name, spec, marks=pytest.mark.slow if place else ())
    for name, (_, specs) in TRAPS.items() for place, spec in enumerate(specs)
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "spec"), CASES)
def test_turns(name: str, spec: str) -> None:
    kind = TRAPS[name][0]
    batch = 2 if "dp" in spec else 1
    module, parallel = cached(kind, spec, batch=batch)
    tokens = ids(sum(TURNS), batch=2 * batch)
    expected = module(tokens)
    with checked_session(parallel) as session:
        for new in TURNS:
            now = slice(session.length, session.length + new)
            assert difference(session.extend(tokens[:, now]), expected[:, now]) < EXACT


def test_three_processes_come_to_the_end() -> None:
    """An exchange in which two ranks wait for each other may only stop a third."""
    parallel = cached(Rotary, "ring=3")[1]
    tokens = rc.generate(parallel, ids(7), 8, backend="gloo")
    assert torch.equal(tokens, rc.generate(parallel, ids(7), 8))
