"""The formats of `ringcompile dump`."""

import ast
import builtins
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.dump import formats, render
from ringcompile.dump.json_ import json_document
from ringcompile.dump.python_view import _size, python_view
from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import bind, coordinate, symbol
from ringcompile.ir.nodes import location_of
from ringcompile.ir.printer import print_program
from ringcompile.ir.program import Program
from ringcompile.models.transformer import Transformer, TransformerConfig
from ringcompile.parallel_program import ParallelProgram
from tests.support import zoo_program

ROOT = Path(__file__).parents[2]
CONFIG = TransformerConfig(
    vocab_size=11,
    num_layers=1,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_hidden=16,
)


def decoder() -> ParallelProgram:
    program = capture(Transformer(CONFIG), (torch.arange(6)[None],), name="decoder")
    return transform(program, "ring=2", order="zigzag")


@pytest.fixture(scope="module")
def made() -> ParallelProgram:
    return decoder()


def programs(made: ParallelProgram) -> list[Program]:
    return [made.program, *made.ranks()]


def num_calls(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


# -- the table ------------------------------------------------------------------------------------


def test_formats(made: ParallelProgram) -> None:
    assert formats() == ("text", "json", "python", "dot", "graphml")
    program = made.rank(0)
    assert render(program, "text") == print_program(program)
    assert json.loads(render(program, "json")) == json_document(program)
    assert render(program, "python") + "\n" == python_view(program)


def test_an_unknown_format_is_refused(made: ParallelProgram) -> None:
    with pytest.raises(RingCompileError) as caught:
        render(made.rank(0), "yaml")
    assert str(caught.value) == (
        "error: unknown format 'yaml'\n  hint: formats are: text, json, python, dot, graphml"
    )


@pytest.mark.parametrize("name", ["text", "json", "python"])
def test_dumps_are_the_same_every_time_and_everywhere(made: ParallelProgram, name: str) -> None:
    for one, other in zip(programs(made), programs(decoder()), strict=True):
        dump = render(one, name)
        assert dump == render(other, name)
        assert not dump.endswith("\n")
        assert str(ROOT) not in dump
        assert "0x" not in dump


# -- JSON -----------------------------------------------------------------------------------------


def test_json_nodes_are_complete(made: ParallelProgram) -> None:
    for program in programs(made):
        document = json.loads(render(program, "json"))
        assert "types" not in document
        assert "locations" not in document
        for data, node in zip(document["nodes"], program.graph.nodes, strict=True):
            assert data["name"] == node.name
            assert set(data["operands"]) == {operand.name for operand in node.all_input_nodes}
            if node.op != "call_function":
                continue
            assert data["op"] == str(node.target)
            assert data["layer"] == location_of(node).layer
            assert data["loc"]["file"].endswith("transformer.py")
            assert not data["loc"]["file"].startswith("/")
            assert data.get("why") == node.meta.get("why")
            if isinstance(node.meta["type"], tuple):
                assert len(data["type"]) == len(node.meta["type"])
            else:
                assert ("layout" in data["type"]) == (not node.meta["type"].layout.is_whole)


def test_json_has_a_line_for_each_node_and_weight(made: ParallelProgram) -> None:
    program = made.rank(0)
    lines = render(program, "json").splitlines()
    assert sum(line.startswith('  {"name": ') for line in lines) == (
        len(list(program.graph.nodes)) + len(program.inputs)
    )
    assert sum(line.startswith(('  "p_', '  "b_')) for line in lines) == (
        len(program.weights)
    )


# -- Python ---------------------------------------------------------------------------------------


def test_golden_python(made: ParallelProgram, golden: Callable[[str, str], None]) -> None:
    text = python_view(made.rank(1))
    golden("python/decoder-ring2-zigzag-rank1.txt", text)
    assert text.startswith("# model decoder   mesh ring=2   order zigzag   rank 1 of 2 (ring=1)\n")
    assert "# constructed by  capture, canonicalize, " in text
    assert "ringcompile never imports or executes this file" in text


def bound_and_read(function: ast.FunctionDef) -> tuple[list[str], set[str]]:
    """Names that the statements bind, in order; names read before they are bound."""
    known = {arg.arg for arg in function.args.args} | {"torch", "aten", "ours", "ceil", "floor"}
    bound: list[str] = []
    early: set[str] = set()
    for statement in function.body[1:]:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        early |= {n.id for n in names if isinstance(n.ctx, ast.Load)} - known - set(dir(builtins))
        bound += [n.id for n in names if isinstance(n.ctx, ast.Store)]
        known |= set(bound)
    return bound, early


def check_view(program: Program) -> None:
    text = python_view(program)
    compile(text, "view.py", "exec", dont_inherit=True)
    function = ast.parse(text).body[-1]
    assert isinstance(function, ast.FunctionDef)
    assert [arg.arg for arg in function.args.args] == ["inputs", "weights", "comm"]
    assert isinstance(function.body[-1], ast.Return)
    bound, early = bound_and_read(function)
    assert early == set()
    assert len(bound) == len(set(bound))
    assert not set(bound) & {*dir(builtins), "inputs", "weights", "comm", "torch", "aten", "ours"}
    sizes = [name for name in bound if name in {"s", "n", "b", "ring"}]
    assert len(bound) - len(sizes) == num_calls(program) + len(program.placeholders)
    read = {n.slice.value for n in ast.walk(function)
            if isinstance(n, ast.Subscript) and getattr(n.value, "id", "") == "weights"}
    assert read == {weight.name for weight in program.weights.values()}


def test_views_are_python_with_a_statement_for_each_node(made: ParallelProgram) -> None:
    for program in programs(made):
        check_view(program)


@pytest.mark.parametrize("name", ["llama-tiny", "bert-tiny", "dense-4l-tiny"])
def test_views_of_the_zoo(name: str) -> None:
    program = zoo_program(name, name)
    found = transform(program, "ring=4", length=40)
    for each in (program, found.program, found.rank(3)):
        check_view(each)


def test_transfers_in_the_view(made: ParallelProgram) -> None:
    text = python_view(made.rank(0))
    starts = re.findall(r'shift_start = comm.shift_start\(\s*\w+,\s*axis="ring",\s*to=1,', text)
    assert len(starts) == 1
    assert text.count("comm.wait(shift_start)") == 1
    assert text.count("ours.block_attention(") == text.count("ours.attend_merge(") == 1


@pytest.mark.parametrize("length", [6, 7, 9, 64])
def test_the_view_computes_a_rank_s_share(made: ParallelProgram, length: int) -> None:
    line = re.search(r"\n    n = (.*?)  #", python_view(made.rank(0)))
    assert line is not None
    sequence = made.program.sequence
    assert sequence is not None
    n = eval(line.group(1), {"s": length})
    assert n == sequence.local_length(length)


S, N, RING = symbol("s"), symbol("n"), coordinate("ring")


@pytest.mark.parametrize(
    "size",
    [N / 2, 3 * N / 2 + 1, 7 - RING, 4 * N * S, sympy.floor(S / 2), sympy.ceiling(S / 3) + N,
     sympy.Mod(S, 4), sympy.Max(S, N), sympy.Min(S, 2 * N)],
    ids=str,
)
def test_sizes_as_python(size: Any) -> None:
    from math import ceil, floor  # the names that a view imports

    values = {"s": 11, "n": 6, "ring": 2}
    assert eval(_size(size), {**values, "ceil": ceil, "floor": floor}) == bind(size, values)
