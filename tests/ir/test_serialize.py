"""Programs through JSON: nothing is lost, and nothing but a program comes back."""

import copy
import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from ringcompile.artifact.graph import program_from_json
from ringcompile.artifact.ops import allowed_ops
from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.ir.expr import coordinate, symbol
from ringcompile.ir.layout import Atom, Layout
from ringcompile.ir.program import Input, Program, Structure, Weight
from ringcompile.ir.serialize import op_name, portable, program_to_json, size_from_text
from ringcompile.ir.types import SequenceSplit, TensorType
from ringcompile.mesh import Mesh
from ringcompile.models import zoo
from ringcompile.pass_list import rank_passes
from ringcompile.passes.base import Pipeline
from ringcompile.runtime.inprocess import run_lockstep, run_single

MODELS = ["llama-tiny", "bert-tiny", "gpt-tiny"]
x32 = TensorType.whole(torch.float32, (2, symbol("s")))


def through_json(program: Program) -> Program:
    """The program, written and read; captured programs hold ops that artifacts never do."""
    ops = {op_name(n.target) for n in program.graph.nodes if n.op == "call_function"}
    text = json.dumps(program_to_json(program), allow_nan=False)
    return program_from_json(json.loads(text), ops)


@pytest.fixture(scope="module", params=MODELS)
def stages(request: pytest.FixtureRequest) -> dict[str, Program]:
    """A model behind every pass, by the passes' names; "rank" is rank 1 of 4 at the end."""
    module, args = zoo.build(request.param)
    seen = {"capture": capture(module.eval(), args)}
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


# A program in which everything occurs, small enough to damage in every place.


def small(value: Any = 1.5) -> Program:
    ring, s, n = coordinate("ring"), symbol("s"), symbol("n")
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    y = graph.create_node("call_function", torch.ops.aten.add.Tensor, (x, w), {}, "y")
    z = graph.create_node("call_function", torch.ops.aten.mul.Tensor, (y, value), {}, "z")
    p = graph.create_node(
        "call_function",
        torch.ops.ringcompile.positions.default,
        ([ring, 7 - ring],),
        {"chunk": n / 2, "limit": s},
        "p",
    )
    graph.output((z, p))
    split = Layout(((), (Atom(s, ("ring",)),)))
    for node in (x, w, y, z):
        node.meta.update(type=x32.with_layout(split), loc=SourceLocation("gpt.py", 3, "layers.0"))
    p.meta.update(type=TensorType.whole(torch.int64, (s,)), why="positions")
    return Program(
        graph=graph,
        inputs=(Input("ids", x32),),
        placeholders={"x": "ids"},
        weights={"w": Weight("layer.w", torch.float32, (2, 1))},
        output_structure=Structure("dict", ("a", "b"), (Structure("tensor"),) * 2),
        length_range=(2, 512),
        mesh=Mesh.parse("ring=4"),
        sequence=SequenceSplit((("ring", 4),), "zigzag"),
        passes=("capture", "place"),
        notes=("a note",),
        lengths={"s": 8},
    )


def test_a_small_program_comes_back() -> None:
    assert_same(through_json(small()), small())


def test_tuple_types_and_tuples_come_back() -> None:
    program = small((1, [2, (3.0, None)], "4*n", True))
    node = next(n for n in program.graph.nodes if n.name == "y")
    pair = (x32, TensorType.whole(torch.bool, ()))
    node.meta["type"] = pair
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
    node = next(n for n in through_json(small(value)).graph.nodes if n.name == "z")
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


OPS = [
    "os.system",
    "torch.os.system",
    "aten.set_.source_Storage",
    "aten.from_file.default",
    "builtins.eval",
    "operator.attrgetter",
    "aten.add",
    "aten.__class__.default",
    "aten.add.overloads",
    "prims.add.default",
    "ringcompile.attention.out",
    "call_module",
    "get_attr",
    "",
]


@pytest.mark.parametrize("op", OPS)
def test_an_op_that_is_not_allowed_is_refused(op: str) -> None:
    data = program_to_json(small())
    data["nodes"][3]["op"] = op
    with pytest.raises(RingCompileError, match="is not an op that a program may hold"):
        program_from_json(data, allowed_ops())


@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith(("aten.set_", "aten.from"))])
def test_not_even_a_wrong_allowlist_reaches_beyond_the_ops(op: str) -> None:
    data = program_to_json(small())
    data["nodes"][3].update(op=op, args=[])
    with pytest.raises(RingCompileError, match=r"is not the name of an op|has no op"):
        program_from_json(data, {*allowed_ops(), op})


X = {"node": "x"}


@pytest.mark.parametrize("args", [[], [X], [X, "shape"], [X, []]])
def test_getitem_picks_a_result_by_its_index_and_does_nothing_else(args: list[Any]) -> None:
    data = program_to_json(small())
    data["nodes"][3].update(op="operator.getitem", args=args, kwargs={})
    with pytest.raises(RingCompileError, match="one of several results"):
        program_from_json(data, allowed_ops())


def test_every_allowed_op_is_one_of_torchs() -> None:
    for op in allowed_ops() - {"operator.getitem"}:
        namespace, name, overload = op.split(".")
        assert namespace in ("aten", "ringcompile")
        schema = getattr(getattr(getattr(torch.ops, namespace), name), overload)._schema
        # Only the state of a growing sequence is written in place.
        assert schema.is_mutable == (name in ("store", "running_sum", "recent"))


def edited(path: str, value: Any) -> dict[str, Any]:
    """The small program's JSON with one place changed; `path` is keys and indices."""
    data: Any = program_to_json(small())
    *outer, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    place = data
    for key in outer:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("nodes", None, "'nodes' is missing"),
        ("nodes", {}, "'nodes' is dict, not a list"),
        ("nodes", [], "the graph has no output"),
        ("nodes/0/name", 3, "'name' is 3, not a text"),
        ("nodes/1/name", "x", "its name is taken"),
        ("nodes/1/name", "w w", "not a name that a node can have"),
        ("nodes/1/name", "print", "not a name that a node can have"),
        ("nodes/1/name", "w_" + "9" * 5000, "too long"),
        ("nodes/2/args/0", {"node": "z"}, "reads %z, which no earlier node is called"),
        ("nodes/2/args/0", {"node": "y"}, "reads %y, which no earlier node is called"),
        ("nodes/2/args/0", {"nodes": "x"}, "'x' is not a nodes"),
        ("nodes/2/args/0", {"node": "x", "expr": "n"}, "is not an argument"),
        ("nodes/2/args/0", 2**70, "is not an argument"),
        ("nodes/2/args/0", math.inf, "is not an argument"),
        ("nodes/2/args", [{"node": "x"}], "the arguments do not fit aten::add.Tensor"),
        ("nodes/2/args", [1] * 9, "the arguments do not fit aten::add.Tensor"),
        ("nodes/2/kwargs/self", 1, "the arguments do not fit aten::add.Tensor"),
        ("nodes/2/kwargs/no", 1, "the arguments do not fit aten::add.Tensor"),
        ("nodes/2/type", 99, "'type' 99 is not in its table"),
        ("nodes/2/loc", -1, "'loc' -1 is not in its table"),
        ("nodes/4/kwargs/chunk", {"expr": "tp"}, "'tp' is neither a length nor a coordinate"),
        ("nodes/4/kwargs/chunk", {"expr": "nan"}, "'nan' is not a size expression"),
        ("nodes/4/kwargs/chunk", {"expr": "n**(n**8)"}, "is not a size expression"),
        ("nodes/5/args/0", 1, "inputs and outputs must be single tensors"),
        ("nodes/5/args", [], "the outputs do not fit their structure"),
        ("types/0/dtype", "pickle", "'pickle' is not a dtype"),
        ("types/0/shape/0", -1, "a size is out of range"),
        ("types/0/shape/0", True, "a size is True, not a whole number"),
        ("types/0/layout/1/0/axes", ["tp"], "a tensor is split over"),
        ("types/0/layout", [], "does not fit the shape"),
        ("locations/0", ["a"], "a location is not"),
        ("mesh", "ring=x", "cannot read 'ring=x'"),
        ("mesh", "ring=" + "9" * 5000, "too long"),
        ("mesh", "ring=2", "'sequence' does not fit the mesh"),
        ("sequence/order", "random", "'sequence' does not fit the mesh"),
        ("coordinates", {"ring": 4}, "'ring' is neither a length nor a coordinate"),
        ("placeholders/x", "other", "do not fit the placeholders"),
        ("placeholders", {}, "do not fit together"),
        ("weights/w/shape", [-1, 1], "out of range"),
        ("output_structure/kind", "set", "is not a structure"),
        ("output_structure/keys", ["a", "a"], "is not a structure"),
        ("length_range", [2], "is not a pair"),
        ("lengths/s", "8", "not a whole number"),
    ],
)
def test_malformed_programs_are_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(RingCompileError) as caught:
        program_from_json(edited(path, value), allowed_ops())
    assert message in str(caught.value)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = data.items() if isinstance(data, dict) else enumerate(data)
    found = [(*path, key) for key, _ in entries] if isinstance(data, dict | list) else []
    for *_, key in list(found):
        if isinstance(data[key], dict | list):
            found += places(data[key], (*path, key))
    return found


PRISTINE = program_to_json(small())
junk = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        3,
        2**80,
        1.5,
        "",
        "x",
        "ring",
        "zigzag",
        "output",
        "placeholder",
        [],
        {},
        [[]],
        [None],
        {"node": "x"},
        {"expr": "s"},
        {"tuple": [[]]},
        {"dtype": "int64"},
        [0, 0, 0],
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(places(PRISTINE)), junk), min_size=1, max_size=2))
def test_any_damage_is_refused_or_leaves_a_program(
    changes: list[tuple[tuple[Any, ...], Any]],
) -> None:
    data = copy.deepcopy(PRISTINE)
    for (*outer, last), value in changes:
        place: Any = data
        try:
            for key in outer:
                place = place[key]
            place[last] = value
        except (KeyError, IndexError, TypeError):
            continue  # the first change took this place away
    try:
        read = program_from_json(data, allowed_ops())
    except RingCompileError:
        return
    assert program_to_json(read)["nodes"]


def test_deep_nesting_is_refused() -> None:
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    with pytest.raises(RingCompileError):
        program_from_json(edited("nodes/2/args", [value]), allowed_ops())
    while isinstance(value, list):  # the interpreter's own clean-up of such a list is recursive
        value = value.pop()
