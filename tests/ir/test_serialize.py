"""Programs through JSON: nothing is lost, and nothing but a program comes back."""

import json
import math
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringcompile.artifact.graph import program_from_json
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.ir.expr import coordinate, symbol
from ringcompile.ir.program import Input, Program
from ringcompile.ir.serialize import op_name, portable, program_to_json, size_from_text
from ringcompile.ir.types import TensorType
from ringcompile.mesh import Mesh
from ringcompile.pass_list import rank_passes
from ringcompile.passes.base import Pipeline
from ringcompile.runtime.inprocess import run_lockstep, run_single
from tests.ir.small_program import (
    small,
    x32,
)
from tests.support import zoo_program

MODELS = ["llama-tiny", "bert-tiny", "gpt-tiny"]


def through_json(program: Program) -> Program:
    """The program, written and read; captured programs hold ops that artifacts never do."""
    ops = {op_name(n.target) for n in program.graph.nodes if n.op == "call_function"}
    text = json.dumps(program_to_json(program), allow_nan=False)
    return program_from_json(json.loads(text), ops)


@pytest.fixture(scope="module", params=MODELS)
def stages(request: pytest.FixtureRequest) -> dict[str, Program]:
    """A model behind every pass, by the passes' names; "rank" is rank 1 of 4 at the end."""
    seen = {"capture": zoo_program(request.param)}
    parallel = transform(
        seen["capture"], "ring=4", observe=lambda p, program, _: seen.update({p.name: program})
    )
    seen.update(spmd=parallel.program, rank=parallel.rank(1))
    return seen


def with_portable_lines(given: Input) -> Input:
    """An input whose limits name files as an artifact does."""
    limits = (
        replace(limit, location=replace(limit.location, file=portable(limit.location.file)))
        for limit in given.limits
    )
    return replace(given, limits=tuple(limits))


def assert_same(read: Program, written: Program) -> None:
    assert str(read.graph) == str(written.graph)
    for field in fields(Program):
        # `captured` has a file of its own.
        if field.name not in ("graph", "source", "captured", "inputs"):
            assert getattr(read, field.name) == getattr(written, field.name), field.name
    assert read.inputs == tuple(map(with_portable_lines, written.inputs))
    assert read.source is None
    for new, old in zip(read.graph.nodes, written.graph.nodes, strict=True):
        assert (new.op, new.target, new.meta.get("type"), new.meta.get("why")) == (
            old.op,
            old.target,
            old.meta.get("type"),
            old.meta.get("why"),
        )
        loc = old.meta.get("loc", SourceLocation())
        assert new.meta.get("loc", SourceLocation()) == SourceLocation(
            portable(loc.file), loc.line, loc.layer
        )


def test_every_stage_comes_back_as_it_was(stages: dict[str, Program]) -> None:
    assert {"capture", "place", "partition", "lower-ring", "rank"} <= stages.keys()
    for program in stages.values():
        read = through_json(program)
        assert_same(read, program)
        assert program_to_json(read) == program_to_json(program)


def test_what_was_read_computes_and_compiles_the_same(stages: dict[str, Program]) -> None:
    source, placed = stages["capture"].source, stages["canonicalize"]
    inputs = {spec.name: torch.ones(1, 45, dtype=spec.type.dtype) for spec in placed.inputs}
    assert torch.equal(
        run_single(through_json(placed), source, inputs), run_single(placed, source, inputs)
    )
    spmd = stages["spmd"]
    lower = [Pipeline(rank_passes(rank, Mesh.parse("ring=4"))) for rank in range(4)]
    ranks = [step.run(spmd) for step in lower]
    assert [str(step.run(through_json(spmd)).graph) for step in lower] == [
        str(rank.graph) for rank in ranks
    ]
    mesh = Mesh.parse("ring=4")
    read = run_lockstep([through_json(rank) for rank in ranks], mesh, source, inputs)
    assert torch.equal(read.outputs, run_lockstep(ranks, mesh, source, inputs).outputs)


def test_no_path_of_this_machine_is_written(stages: dict[str, Program]) -> None:
    for program in stages.values():
        files = [row[0] for row in program_to_json(program)["locations"]]
        assert any(files)
        assert not any(file.startswith("/") for file in files)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("", ""),
        ("<string>", "<string>"),
        ("models/gpt.py", "models/gpt.py"),
        (
            "/usr/lib/python3/site-packages/transformers/models/bert.py",
            "transformers/models/bert.py",
        ),
        ("/home/me/secret/project/models/gpt.py", "project/models/gpt.py"),
        ("/gpt.py", "gpt.py"),
        ("//etc/passwd", "etc/passwd"),
        ("../../etc/passwd", "etc/passwd"),
    ],
)
def test_source_paths_are_portable(file: str, expected: str) -> None:
    assert portable(file) == expected


def test_a_source_path_is_relative_to_the_working_folder(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert portable(str(tmp_path / "models" / "gpt.py")) == "models/gpt.py"


# Of these arguments most are none that the op takes.
UNCHECKED = mock.patch("ringcompile.artifact.graph.check_arguments")


def test_a_small_program_comes_back() -> None:
    assert_same(through_json(small()), small())


def test_tuple_types_and_tuples_come_back() -> None:
    program = small((1, [2, (3.0, None)], "4*n", True))
    node = next(n for n in program.graph.nodes if n.name == "y")
    pair = (x32, TensorType.whole(torch.bool, ()))
    node.meta["type"] = pair
    with UNCHECKED:
        read = through_json(program)
    found = next(n for n in read.graph.nodes if n.name == "y")
    assert found.meta["type"] == pair
    assert_same(read, program)


numbers = st.integers(1, 9) | st.sampled_from([symbol("s"), symbol("n"), coordinate("ring")])
sizes = st.recursive(
    numbers,
    lambda inner: st.builds(
        lambda f, a, b: f(sympy.sympify(a), sympy.sympify(b)),
        st.sampled_from(
            [
                lambda a, b: a + b,
                lambda a, b: a - b,
                lambda a, b: a * b,
                lambda a, b: a / 2,
                lambda a, b: sympy.floor(a / 4),
                lambda a, b: sympy.ceiling(a / 3),
                lambda a, b: sympy.Mod(a, 5),
                lambda a, b: sympy.Max(a, b),
                lambda a, b: sympy.Min(a, b),
                lambda a, b: a**2,
            ]
        ),
        inner,
        inner,
    ),
    max_leaves=3,
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats()
    | st.text(max_size=8)
    | sizes
    | st.sampled_from(
        [
            torch.float16,
            torch.bool,
            torch.complex64,
            torch.strided,
            torch.preserve_format,
            torch.device("cpu"),
            torch.device("cuda", 1),
            "inf",
            "4*n",
            math.inf,
            -math.inf,
            -0.0,
        ]
    )
)
arguments = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple):
        return (
            isinstance(b, list) == isinstance(a, list)
            and len(a) == len(b)
            and all(map(alike, a, b))
        )
    if isinstance(a, sympy.Basic) or isinstance(b, sympy.Basic):
        return a == b or sympy.expand(a - b) == 0
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b and str(a) == str(b)


@settings(max_examples=150, deadline=None)
@given(arguments)
def test_any_argument_comes_back(value: Any) -> None:
    with UNCHECKED:
        read = through_json(small(value))
    node = next(n for n in read.graph.nodes if n.name == "z")
    assert alike(value, node.args[1])


@pytest.mark.parametrize("value", [1j, {"a": 1}, slice(1), object(), symbol("s") ** -2])
def test_an_argument_without_json_is_refused_by_its_node(value: Any) -> None:
    with pytest.raises(RingCompileError) as caught:
        program_to_json(small(value))
    assert caught.value.node == "z"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "1/0",
        "s/0",
        "Mod(1,0)",
        "floor()",
        "Max()",
        "f(s)",
        "s.x",
        "s[0]",
        "lambda: s",
        "__import__('os')",
        "s if s else n",
        "'s'",
        "1e9",
        "1.5",
        "0x10",
        "2**99",
        "2**-1",
        "(((((9**8)**8)**8)**8)**8)**8",
        "((((s**2)**2)**2)**2)**2",
        "9" * 30,
        "s+" * 600 + "s",
        "(" * 300 + ")" * 300,
        "9999999999999999999*9999999999999999999",
        "s and n",
        "s == n",
        "s\n+n",
        "s\x00",
        "s # n",
        "s**(1/3)",
        "s**(-9)",
        "s**(s/2)",
        "float(s, n)",
        "log()",
        "Mod((s+n)**8, (n+m)**8+1)",
        "Mod(Mod((s+n)**4, m), (n+m+1)**4)",
        "(s+n+m+ring)**8",
        "(s+n)**8*(s+m)**8",
        "((s+1)*(n+1)*(m+1)*(ring+1)*(tp+1)*(pp+1)*(ep+1)*(dp+1)*(ulysses+1))",
        "Max(s, n, m, 2, 3)",
        "+".join(["floor(s/7)"] * 30),
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RingCompileError, match="is not a size expression"):
        size_from_text(text)
