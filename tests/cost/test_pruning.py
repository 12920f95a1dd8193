"""What the planner does not estimate is not the best: against a planner that estimates all."""

from __future__ import annotations

from functools import cache

import pytest

from ringcompile.compiler import transform
from ringcompile.cost import planner
from ringcompile.cost.estimate import Ask, HasRanks, Model
from ringcompile.cost.layers import cut, find_stack
from ringcompile.cost.planner import Planner
from ringcompile.cost.plans import Plan
from ringcompile.cost.specs import Variant
from ringcompile.ir.program import Program
from ringcompile.pass_list import prepare
from ringcompile.passes.sequence.split_sequence import order_of
from tests.cost.clusters import cluster, figure, link
from tests.cost.patterns import layers_of


def plans(kinds: str, length: int, num_gpus: int) -> list[Plan]:
    whole = layers_of(kinds)
    stack = find_stack(whole)
    assert stack is not None

    @cache
    def ready(stages: int) -> Program:
        assert stack is not None
        return prepare(cut(whole, stack, stages) if stack.stands_for(stages) else whole)

    def compile_(variant: Variant, length: int) -> HasRanks:
        stages = variant.mesh.size("pp")
        starts = stack.starts(stages) if stack is not None else ()
        return transform(
            ready(stages), variant.mesh, check=False, **variant.choices(length, starts)
        )

    total = sum(weight.num_bytes for weight in whole.weights.values())
    model = Model(stack, total, whole.length_range, order_of(ready(1)))
    links = {"node": link(startup=figure(5.0, "us"), bandwidth=figure(50.0, "GB/s"))}
    hardware = cluster(per_node=16, links=links).sized(num_gpus)
    return Planner(model, Ask(num_gpus, hardware, length), compile_).run()


@pytest.mark.parametrize(
    ("kinds", "length"),
    [
        ("aaaa", 256),
        pytest.param("abab", 65536, marks=pytest.mark.slow),
        pytest.param("aaaa", 65536, marks=pytest.mark.slow),
        pytest.param("bbbb", 65536, marks=pytest.mark.slow),
    ],
)
def test_what_is_left_out_is_not_the_best(
    kinds: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Causal layers, layers with a window, both."""
    found = plans(kinds, length, 8)
    assert any("takes at least" in plan.why for plan in found)
    monkeypatch.setattr(planner, "_FAR", float("inf"))
    every = plans(kinds, length, 8)
    assert not any("takes at least" in plan.why for plan in every)
    assert (found[0].variant, found[0].seconds) == (every[0].variant, every[0].seconds)
