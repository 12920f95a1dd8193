"""Queries, keys and values go from tokens to heads, and results back, each copied once at most."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.cost.rank import RankCost, cost_of
from ringcompile.models import zoo
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.queued import Queued
from tests.random_plans import captured
from tests.support import TOLERANCE, difference

slow = partial(pytest.param, marks=pytest.mark.slow)
# Ops that are there to bring bytes into another order.
COPIES = frozenset({
    "cat", "contiguous", "reshape", "pack", "all_to_all", "shift_start", "permute", "index_select",
})


class Attention(nn.Module):
    """Grouped queries whose values are as wide as keys, or not; 8 query heads, 4 KV heads."""

    def __init__(self, value_dim: int, shared: bool = False) -> None:
        super().__init__()
        self.value_dim, self.shared = value_dim, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.split([8 * 4, 4 * 4, 4 * self.value_dim], -1)
        heads = [
            y.unflatten(-1, (count, -1)).transpose(1, 2)
            for y, count in ((q * 2, 8), (k.sin(), 4), (v.cos(), 4))
        ]
        keys, values = heads[1], heads[1] if self.shared else heads[2]
        out = F.scaled_dot_product_attention(
            heads[0], keys, values, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(2)


def example(value_dim: int, length: int, batch: int = 2) -> tuple[torch.Tensor]:
    torch.manual_seed(length)
    return (torch.randn(batch, length, 48 + 4 * value_dim),)


def copies(made: ParallelProgram, length: int, batch: int = 1) -> tuple[RankCost, Counter[str]]:
    """By op, how often the last rank copies what it has into another order."""
    cost = cost_of(list(made.ranks())[-1], length, batch)
    return cost, Counter(step.op for step in cost.steps if step.op in COPIES for _ in step.kernels)


@pytest.mark.parametrize("parallel", [
    "ring=2,ulysses=2", "ulysses=4", slow("ulysses=2"), slow("ring=3,ulysses=4"),
    slow("ulysses=2,tp=2"), slow("ring=2,ulysses=2,tp=2"), slow("time=2,ring=2,ulysses=2"),
    slow("ring=2,tile=2,ulysses=2"),
])
@pytest.mark.parametrize(("value_dim", "shared"), [(4, False), (6, False), slow(4, True)])
@torch.no_grad()
def test_attention_gives_the_same_numbers(parallel: str, value_dim: int, shared: bool) -> None:
    module = Attention(value_dim, shared)
    made = transform(capture(module, example(value_dim, 16)), parallel)
    made.verify()
    for length in (29, 32):
        inputs = example(value_dim, length)
        found = run_lockstep(
            made.ranks(), made.mesh, made.source, inputs, check_types=True,
            engine=partial(Queued, seed=length),
        ).outputs
        assert difference(found, module(*inputs)) < TOLERANCE


@pytest.mark.parametrize(("model", "parallel"), [
    ("llama-tiny", "ring=2,ulysses=2"), slow("dense-4l-tiny", "ring=2,ulysses=4"),
    slow("bert-tiny", "ulysses=4"), slow("moe-4l-tiny", "ring=2,ulysses=2,ep=2"),
])
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@torch.no_grad()
def test_a_model_gives_the_same_numbers(model: str, parallel: str, order: str) -> None:
    made = transform(captured(model), parallel, order=order)
    module, inputs = zoo.build(model, sequence=29)
    found = run_lockstep(made.ranks(), made.mesh, made.source, inputs, check_types=True).outputs
    assert difference(found, module(*inputs)) < TOLERANCE


def test_keys_and_values_pass_from_the_exchange_to_the_ring_without_a_copy() -> None:
    """A copy for keys and values, one for queries, and one for results where they arrive."""
    module = Attention(4)
    made = transform(capture(module, example(4, 16, 1)), "ring=2,ulysses=2", length=32)
    cost, found = copies(made, 32)
    assert found == {"cat": 1, "contiguous": 1, "reshape": 1}
    exchanged = [step.op for step in cost.steps if step.communicates is not None]
    assert exchanged.count("all_to_all") == 3


def test_without_a_ring_one_exchange_takes_all_rows_and_one_brings_results() -> None:
    module = Attention(4)
    made = transform(capture(module, example(4, 16, 1)), "ulysses=2", length=32)
    cost, found = copies(made, 32)
    assert found == {"cat": 1, "index_select": 1, "reshape": 1}  # the second pads tokens
    exchanged = [step.op for step in cost.steps if step.communicates is not None]
    assert exchanged == ["all_to_all", "all_to_all"]


def test_exchanges_bring_tensors_that_lie_in_the_order_of_ranks() -> None:
    made = transform(captured("llama-tiny"), "ring=2,ulysses=2")
    exchanges = [n for n in made.rank(3).graph.nodes if "all_to_all" in str(n.target)]
    assert len(exchanges) == 3 * 2
    assert all(n.kwargs["split"] == n.kwargs["concat"] == 0 for n in exchanges)
    assert all(n.meta["type"].shape[0] == 2 for n in exchanges)
