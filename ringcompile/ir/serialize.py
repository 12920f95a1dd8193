"""Programs as JSON and back; reading builds data only, and only ops that the reader allows.

What JSON has no word for is an object with one key, so that a text is never taken for it:
`{"node": "linear_3"}`, `{"expr": "4*n"}`, `{"tuple": [...]}`, `{"dtype": "float16"}`,
`{"float": "-inf"}`. Types and source lines repeat from node to node: each stands once in a table,
and nodes hold its index.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import sympy
import torch
from torch import fx

from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.ir.expr import (
    LOCAL,
    OTHER_LENGTHS,
    SEQUENCE,
    Size,
    equal,
    is_symbolic,
    parse,
    simplify,
    to_text,
)
from ringcompile.ir.layout import Atom, Layout
from ringcompile.ir.program import Input, Program, Structure, Weight, error_at
from ringcompile.ir.types import SequenceSplit, TensorType, ValueType
from ringcompile.ir.verifier import verify_program
from ringcompile.mesh import Mesh

T = TypeVar("T")

_CONSTANTS: dict[str, dict[str, Any]] = {
    "dtype": {k: v for k, v in vars(torch).items() if isinstance(v, torch.dtype)},
    "layout": {"strided": torch.strided},
    "memory_format": {k: v for k, v in vars(torch).items() if isinstance(v, torch.memory_format)},
}
_DEVICE = re.compile(r"(cpu|cuda|meta)(:\d{1,4})?")
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_PYTHON_OPS: dict[str, Callable[..., Any]] = {"operator.getitem": operator.getitem}
_NAMESPACES = ("aten", "ringcompile")
_LENGTHS = frozenset({SEQUENCE, LOCAL, *OTHER_LENGTHS})
_ORDERS = ("contiguous", "zigzag")
_MAX_INT = 2**63
# Short, and no long numbers or towers of powers: reading an expression must not take for ever.
_EXPRESSION = re.compile(r"(?!.*\d[A-Za-z_])(?!.*\d{20})(?!(.*\*\*){4})[\w+\-*/(), ]{1,1000}", re.A)
_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


def expect(value: Any, kind: type[T], what: str) -> T:
    """`value`, if it is JSON of that kind (true is no number); RingCompileError if not."""
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    shown = repr(value) if isinstance(value, int | float | str) else type(value).__name__
    raise RingCompileError(f"{what} is {shown[:60]}, not {_KINDS[kind]}")


def member(data: dict[str, Any], key: str, kind: type[T]) -> T:
    """A member of a JSON object, of that kind; RingCompileError if it is missing or another."""
    if key not in data:
        raise RingCompileError(f"'{key}' is missing")
    return expect(data[key], kind, f"'{key}'")


def texts(data: dict[str, Any], key: str) -> tuple[str, ...]:
    """A member that is a list of texts."""
    return tuple(expect(text, str, f"an entry of '{key}'") for text in member(data, key, list))


def numbers(data: dict[str, Any], key: str) -> dict[str, int]:
    """A member that is an object of counts."""
    return {k: _count(v, f"'{k}' of '{key}'") for k, v in member(data, key, dict).items()}


def _count(value: Any, what: str) -> int:
    number = expect(value, int, what)
    if not 0 <= number < _MAX_INT:
        raise RingCompileError(f"{what} is out of range")
    return number


def dtype_to_json(dtype: torch.dtype) -> str:
    """The name of a dtype, `float16`."""
    return str(dtype).removeprefix("torch.")


def dtype_from_json(value: Any) -> torch.dtype:
    """The dtype of that name; RingCompileError if there is none."""
    return _constant("dtype", value)


def _constant(kind: str, name: Any) -> Any:
    known = _CONSTANTS[kind]
    if expect(name, str, f"a {kind}") not in known:
        raise RingCompileError(f"'{name[:40]}' is not a {kind}")
    return known[name]


def weight_to_json(weight: Weight) -> dict[str, Any]:
    """Dtype and shape of a weight; the name is the caller's to keep."""
    return {"dtype": dtype_to_json(weight.dtype), "shape": list(weight.shape)}


def weight_from_json(name: str, data: Any) -> Weight:
    """Reads back what `weight_to_json` wrote."""
    data = expect(data, dict, f"weight '{name}'")
    shape = tuple(_count(size, f"a size of '{name}'") for size in member(data, "shape", list))
    return Weight(name, dtype_from_json(data.get("dtype")), shape)


def length_range_from_json(data: dict[str, Any]) -> tuple[int, int | None]:
    """The member `length_range`: the smallest length, and the largest or null."""
    limits = member(data, "length_range", list)
    if len(limits) != 2:
        raise RingCompileError("'length_range' is not a pair")
    low, high = limits
    return _count(low, "the smallest length"), (
        None if high is None else _count(high, "the largest length")
    )


def portable(file: str) -> str:
    """A source path without this machine's folders: below site-packages, or the working folder."""
    path = PurePosixPath(file)
    parts = path.parts
    for packages in ("site-packages", "dist-packages"):
        if packages in parts:
            return "/".join(parts[len(parts) - parts[::-1].index(packages) :])
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    if path.is_absolute() or ".." in parts:
        return "/".join([part for part in parts[1:] if part != ".."][-3:])
    return file


def op_name(target: Any) -> str:
    """The name by which a program's file calls an op, `aten.linear.default`."""
    named = (name for name, function in _PYTHON_OPS.items() if function is target)
    return next(named, str(target))


# Writing


class _Table:
    """Distinct values in the order of their first use."""

    def __init__(self, write: Callable[[Any], Any]) -> None:
        self.write = write
        self.rows: list[Any] = []
        self._index: dict[Hashable, int] = {}

    def index(self, value: Hashable) -> int:
        if value not in self._index:
            self._index[value] = len(self.rows)
            self.rows.append(self.write(value))
        return self._index[value]


def program_to_json(program: Program) -> dict[str, Any]:
    """Everything of a program but its `source`, as what `json.dumps(allow_nan=False)` takes.

    Raises:
        RingCompileError: an argument of a kind that no program should hold, by its node.
    """
    types, locations = _Table(_type_to_json), _Table(_location_to_json)
    nodes = [_node_to_json(node, types, locations) for node in program.graph.nodes]
    return {
        "name": program.name,
        "passes": list(program.passes),
        "notes": list(program.notes),
        "mesh": None if program.mesh is None else str(program.mesh),
        "sequence": None if program.sequence is None else dict(vars(program.sequence)),
        "coordinates": program.coordinates,
        "length_range": list(program.length_range),
        "lengths": dict(program.lengths),
        "inputs": [{"name": i.name, "type": _type_to_json(i.type)} for i in program.inputs],
        "placeholders": dict(program.placeholders),
        "weights": {
            placeholder: {"name": weight.name, **weight_to_json(weight)}
            for placeholder, weight in program.weights.items()
        },
        "output_structure": _structure_to_json(program.output_structure),
        "types": types.rows,
        "locations": locations.rows,
        "nodes": nodes,
    }


def _node_to_json(node: fx.Node, types: _Table, locations: _Table) -> dict[str, Any]:
    call = node.op == "call_function"
    data: dict[str, Any] = {"name": node.name, "op": op_name(node.target) if call else node.op}
    try:
        if node.op == "placeholder" and node.target != node.name:
            data["target"] = node.target
        if node.op == "output":
            data["args"] = [_argument_to_json(value) for value in node.args[0]]  # type: ignore[union-attr]
        if call:
            data["args"] = [_argument_to_json(value) for value in node.args]
            data["kwargs"] = {key: _argument_to_json(v) for key, v in node.kwargs.items()}
        if "type" in node.meta:
            data["type"] = types.index(node.meta["type"])
    except RingCompileError as error:
        raise error_at(node, error.message) from None
    if "loc" in node.meta:
        data["loc"] = locations.index(node.meta["loc"])
    if "why" in node.meta:
        data["why"] = node.meta["why"]
    return data


def _argument_to_json(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case fx.Node():
            return {"node": value.name}
        case list():
            return [_argument_to_json(v) for v in value]
        case tuple():
            return {"tuple": [_argument_to_json(v) for v in value]}
        case sympy.Expr():
            return _size_to_json(value)
        case torch.device():
            return {"device": str(value)}
        case torch.dtype() | torch.layout() | torch.memory_format():
            name = str(value).removeprefix("torch.")
            kind = type(value).__name__
            if name in _CONSTANTS[kind]:
                return {kind: name}
    raise RingCompileError(f"an argument {str(value)[:60]} ({type(value).__name__}) has no JSON")


def _size_to_json(value: Size) -> Any:
    value = simplify(value)
    if isinstance(value, int):
        return value
    text = to_text(value)
    if not equal(_parse(text), value):
        raise RingCompileError(f"the size {text} cannot be read back")
    return {"expr": text}


def _type_to_json(value: ValueType) -> Any:
    if isinstance(value, tuple):
        return [_type_to_json(v) for v in value]
    data: dict[str, Any] = {
        "dtype": dtype_to_json(value.dtype),
        "shape": [_size_to_json(size) for size in value.shape],
    }
    if not value.layout.is_whole:
        data["layout"] = [
            [{"size": _size_to_json(atom.size), "axes": list(atom.axes)} for atom in dim]
            for dim in value.layout.dims
        ]
    return data


def _location_to_json(location: SourceLocation) -> list[Any]:
    return [portable(location.file), location.line, location.layer]


def _structure_to_json(structure: Structure) -> dict[str, Any]:
    data: dict[str, Any] = {"kind": structure.kind}
    if structure.keys:
        data["keys"] = list(structure.keys)
    if structure.children:
        data["children"] = [_structure_to_json(child) for child in structure.children]
    return data
