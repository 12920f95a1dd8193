"""What is read from JSON and is no program is refused, whatever was changed in it."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringcompile.artifact.graph import program_from_json
from ringcompile.artifact.ops import allowed_ops
from ringcompile.errors import RingCompileError
from ringcompile.ir.serialize import program_to_json
from tests.ir.small_program import (
    small,
)

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
        assert schema.is_mutable == (
            name in ("store", "running_sum", "running_recurrence", "running_linear_attention",
                     "recent")
        )


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
        ("nodes/2/args", [X, None], "the argument 'other' does not fit aten::add.Tensor"),
        ("nodes/2/args", [X, "y"], "the argument 'other' does not fit aten::add.Tensor"),
        ("nodes/2/args", [X, [X]], "the argument 'other' does not fit aten::add.Tensor"),
        ("nodes/2/kwargs/alpha", [1], "the argument 'alpha' does not fit aten::add.Tensor"),
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
