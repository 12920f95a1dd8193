"""Blocks are computed into the running state: what is fused, what is not, and that numbers stay."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import pytest
import torch
from torch import fx, nn

from ringcompile.compiler import transform
from ringcompile.ir.call_text import op_name
from ringcompile.ir.calls import Call
from ringcompile.ir.program import Program
from ringcompile.ir.verifier import verify_program
from ringcompile.mesh import Mesh
from ringcompile.models import zoo
from ringcompile.parallel_program import ParallelProgram
from ringcompile.pass_list import rank_passes
from ringcompile.passes.base import Pipeline
from ringcompile.passes.rank.fuse_merge import FuseMerge
from ringcompile.runtime.inprocess import run_lockstep
from tests.support import difference, zoo_program

DTYPES = ("float32", "bfloat16")


@lru_cache
def made(dtype: str, order: str) -> tuple[nn.Module, ParallelProgram]:
    module, _ = zoo.build("dense-4l-tiny", dtype=dtype)
    own = None if dtype == "float32" else dtype
    program = zoo_program("dense-4l-tiny", sequence=24, dtype=own)
    return module, transform(program, "ring=3", order=order)


def unfused(parallel: ParallelProgram, rank: int) -> Program:
    steps = [step for step in rank_passes(rank, parallel.mesh) if step.name != "fuse-merge"]
    return Pipeline(steps).run(parallel.program)


def ours(program: Program) -> Counter[str]:
    names = {"block_attention", "attend_merge", "merge", "finish"}
    calls = (op_name(node) for node in program.graph.nodes if node.op == "call_function")
    return Counter(name for name in calls if name in names)


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_merge_is_fused(dtype: str, order: str) -> None:
    _, parallel = made(dtype, order)
    for rank in range(3):
        before, after = ours(unfused(parallel, rank)), ours(parallel.rank(rank))
        assert after["merge"] == 0
        assert after["attend_merge"] == before["merge"]
        assert after["block_attention"] == before["block_attention"] - before["merge"]


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_stay(dtype: str, order: str) -> None:
    module, parallel = made(dtype, order)
    _, inputs = zoo.build("dense-4l-tiny", sequence=37, seed=3, dtype=dtype)
    mesh, source = Mesh.parse("ring=3"), parallel.source
    ranks = [[unfused(parallel, rank) for rank in range(3)], parallel.ranks()]
    outputs = [
        run_lockstep(programs, mesh, source, inputs, check_types=True).outputs for programs in ranks
    ]
    with torch.no_grad():
        expected = module(*inputs)
    # float32 adds the same in another order; a bfloat16 block was rounded before it was merged.
    assert difference(outputs[0], outputs[1]) < (2e-6 if dtype == "float32" else 3e-2)
    assert difference(outputs[1], expected) < (2e-6 if dtype == "float32" else 3e-2)


def test_the_first_block_is_an_accumulator_where_the_model_s_dtype_is_not() -> None:
    for dtype in DTYPES:
        _, parallel = made(dtype, "contiguous")
        program = parallel.rank(2)
        first = [n for n in program.graph.nodes if op_name(n) == "block_attention"]
        for node in first:
            out, lse = node.meta["type"]
            assert out.dtype == lse.dtype == torch.float32
            assert Call(node)["wide"] == (dtype == "bfloat16")


def test_a_single_block_stays_as_narrow_as_the_model() -> None:
    _, parallel = made("bfloat16", "contiguous")
    node = next(n for n in parallel.rank(0).graph.nodes if op_name(n) == "block_attention")
    assert node.meta["type"][0].dtype == torch.bfloat16
    assert not Call(node)["wide"]


def test_a_block_that_something_else_reads_is_not_fused() -> None:
    _, parallel = made("float32", "contiguous")
    program = unfused(parallel, 2)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, copied))
    block = next(n for n in graph.nodes if op_name(n) == "merge").args[1]
    last = next(n for n in graph.nodes if n.op == "output")
    last.args = ((*last.args[0], block),)
    watched = program.with_graph(graph)
    fused = FuseMerge().run(watched)
    assert ours(fused)["merge"] == 1
    verify_program(fused)


def test_the_state_is_used_up() -> None:
    _, parallel = made("float32", "contiguous")
    program = parallel.rank(2)
    other = next(n for n in program.graph.nodes if op_name(n) == "finish")
    state = other.args[0].args[0]
    before = other.args
    try:
        other.args = (state, *before[1:])
        with pytest.raises(AssertionError, match=r"uses up %.*, which others read"):
            verify_program(program)
    finally:
        other.args = before
