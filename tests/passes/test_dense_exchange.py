"""Collectives along any dims give what those along dim 0 give, and nothing is copied in them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch

from ringcompile.compiler import transform
from ringcompile.cost.rank import cost_of
from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import ALL_TO_ALL, GATHER, REDUCE_SCATTER
from ringcompile.models import zoo
from ringcompile.ops.sequence import in_order
from ringcompile.runtime.collectives import asked
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.queued import Queued
from tests.random_plans import captured
from tests.support import TOLERANCE, difference

slow = partial(pytest.param, marks=pytest.mark.slow)


def collectives(made: Any) -> list[Any]:
    wanted = (GATHER, REDUCE_SCATTER, ALL_TO_ALL)
    return [n for rank in made.ranks() for n in rank.graph.nodes if str(n.target) in wanted]


@pytest.mark.parametrize(("model", "parallel", "options"), [
    ("llama-tiny", "ring=4", {"ring": "gather", "order": "zigzag"}),
    ("gpt-tiny", "ring=2,tp=2", {"tp_sequence": True}),
    ("moe-4l-tiny", "ep=2", {}),
    slow("llama-tiny", "ring=3", {"ring": "gather", "order": "contiguous"}),
    slow("moe-4l-tiny", "ring=2,ep=2", {}),
    slow("llama-tiny", "time=2,ring=2,ulysses=2", {"ring": "gather"}),
    slow("llama-tiny", "time=2,ring=2,tp=2", {"ring": "gather", "tp_sequence": True}),
    slow("dense-4l-tiny", "tp=4", {"tp_sequence": True}),
    slow("mixtral-tiny", "ring=2,tp=2,ep=2", {"tp_sequence": True}),
])
@torch.no_grad()
def test_a_model_gives_the_same_numbers(
    model: str, parallel: str, options: dict[str, Any]
) -> None:
    made = transform(captured(model), parallel, **options)
    made.verify()
    asked = collectives(made)
    assert asked
    for node in asked:
        assert not any(node.kwargs.get(name) for name in ("dim", "split", "concat", "limit"))
    module, inputs = zoo.build(model, sequence=29)
    found = run_lockstep(
        made.ranks(), made.mesh, made.source, inputs, check_types=True,
        engine=partial(Queued, seed=7),
    ).outputs
    assert difference(found, module(*inputs)) < TOLERANCE


@pytest.mark.parametrize(("parallel", "options", "copied"), [
    ("ring=4", {"ring": "gather", "order": "contiguous"}, {}),
    ("ring=4", {"ring": "gather", "order": "zigzag"}, {"in_order": 2 * 4}),
    ("tp=4", {"tp_sequence": True}, {}),
])
def test_one_sequence_is_not_copied_for_collectives(
    parallel: str, options: dict[str, Any], copied: dict[str, int]
) -> None:
    made = transform(captured("dense-4l-tiny"), parallel, length=64, **options)
    steps = cost_of(made.rank(1), 64, 1).steps
    found = Counter(
        step.op for step in steps
        if step.kernels and (step.communicates or step.op in ("contiguous", "in_order", "reshape"))
    )
    assert found == copied


@pytest.mark.parametrize("chunks", [[0], [2, 0, 1], [0, 7, 1, 6, 2, 5, 3, 4]])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_chunks_are_put_in_order(chunks: list[int], length: int) -> None:
    each = [torch.full((length, 2), index) for index in chunks]
    found = in_order(torch.cat(each), chunks)
    wanted = torch.arange(len(chunks)).repeat_interleave(length)
    assert torch.equal(found, wanted[:, None].expand(-1, 2))


@pytest.mark.parametrize(("kind", "how"), [
    ("reduce_scatter", {"dim": 1}), ("all_to_all", {"split": 1, "concat": 0}),
])
def test_what_cannot_be_cut_evenly_is_refused(kind: str, how: dict[str, int]) -> None:
    with pytest.raises(RingCompileError) as caught:
        asked("y", kind, [torch.zeros(4, 3)], {"axis": "tp", **how}, 2)
    said = f"{kind} in %y cannot cut dim 1 of [4, 3] into 2 equal parts"
    assert caught.value.message == said


@pytest.mark.parametrize(("kind", "how"), [
    ("reduce_scatter", {"dim": 0}), ("all_to_all", {"split": 0, "concat": 0}),
    ("gather", {"dim": 0, "limit": None}), ("all_reduce", {}),
])
def test_along_dim_0_the_tensor_itself_is_sent(kind: str, how: dict[str, Any]) -> None:
    x = torch.zeros(4, 3)
    assert asked("y", kind, [x], {"axis": "tp", **how}, 2).tensor.data_ptr() == x.data_ptr()
