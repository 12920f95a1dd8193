"""Programs as JSON, for files and dumps; `artifact/graph.py` reads them back.

What JSON has no word for is an object with one key, so that a text is never taken for it:
`{"node": "linear_3"}`, `{"expr": "4*n"}`, `{"tuple": [...]}`, `{"dtype": "float16"}`,
`{"float": "-inf"}`. Types and source lines repeat from node to node: each stands once in a table,
and nodes hold its index.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
from collections.abc import Callable, Hashable
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import sympy
import torch
from torch import fx

from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.ir.expr import Size, equal, parse, simplify, to_text
from ringcompile.ir.expression_bounds import is_bounded
from ringcompile.ir.fused import MARK
from ringcompile.ir.layout import Atom
from ringcompile.ir.nodes import error_at
from ringcompile.ir.program import IdLimit, Program, Structure, Weight
from ringcompile.ir.stretched import Section, section_of, sections_of
from ringcompile.ir.templates import Said, Templates
from ringcompile.ir.types import SequenceSplit, ValueType

# The values that stand as {kind: name}.
CONSTANTS: dict[str, dict[str, Any]] = {
    "dtype": {k: v for k, v in vars(torch).items() if isinstance(v, torch.dtype)},
    "layout": {"strided": torch.strided},
    "memory_format": {k: v for k, v in vars(torch).items() if isinstance(v, torch.memory_format)},
}
# Functions that are no torch op; `str` of the others is their name.
PYTHON_OPS: dict[str, Callable[..., Any]] = {"operator.getitem": operator.getitem}
MAX_INT = 2**63
# The text of a JSON value.
encode = json.JSONEncoder(allow_nan=False).encode
# Short, and no long numbers: reading an expression must not take for ever (see `is_bounded`).
_EXPRESSION = re.compile(r"(?!.*\d[A-Za-z_])(?!.*\d{20})[\w+\-*/(), ]{1,1000}", re.ASCII)


def dtype_to_json(dtype: torch.dtype) -> str:
    """The name of a dtype, `float16`."""
    return str(dtype).removeprefix("torch.")


def weight_to_json(weight: Weight) -> dict[str, Any]:
    """Dtype and shape of a weight; the name is the caller's to keep."""
    return {"dtype": dtype_to_json(weight.dtype), "shape": list(weight.shape)}


def portable(file: str) -> str:
    """A source path without this machine's folders: below site-packages, or the working folder."""
    return _portable(file, os.getcwd())


@lru_cache(maxsize=4096)
def _portable(file: str, working_folder: str) -> str:
    path = PurePosixPath(file)
    parts = path.parts
    for packages in ("site-packages", "dist-packages"):
        if packages in parts:
            return "/".join(parts[len(parts) - parts[::-1].index(packages) :])
    if path.is_absolute() and path.is_relative_to(working_folder):
        return str(path.relative_to(working_folder))
    if path.is_absolute() or ".." in parts:
        return "/".join([part for part in parts if part not in (path.anchor, "..")][-3:])
    return file


@lru_cache(maxsize=4096)
def op_name(target: Any) -> str:
    """The name by which a program's file calls an op, `aten.linear.default`."""
    named = (name for name, function in PYTHON_OPS.items() if function is target)
    return next(named, str(target))


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
    rows = _NodeRows()
    return _members(program, rows, rows.of(section_of(program.graph)))


def program_to_text(program: Program) -> dict[str, Any]:
    """As `program_to_json`, with nodes that are texts already: blocks alike are written once.

    Raises:
        RingCompileError: an argument of a kind that no program should hold, by its node.
    """
    rows = _NodeRows()
    nodes = [line for section in sections_of(program.graph) for line in rows.lines(section)]
    return _members(program, rows, nodes)


def _members(program: Program, rows: _NodeRows, nodes: list[Any]) -> dict[str, Any]:
    return {
        "name": program.name,
        "passes": list(program.passes),
        "notes": list(program.notes),
        "mesh": None if program.mesh is None else str(program.mesh),
        "sequence": None if program.sequence is None else _sequence_to_json(program.sequence),
        "coordinates": program.coordinates,
        "length_range": list(program.length_range),
        **({"other_ranges": {name: list(range_) for name, range_ in program.other_ranges.items()}}
           if program.other_ranges else {}),
        "lengths": dict(program.lengths),
        "batch_range": list(program.batch_range),
        "returns": [_type_to_json(type_) for type_ in program.returns],
        "microbatches": program.microbatches,
        "inputs": inputs_to_json(program),
        "placeholders": dict(program.placeholders),
        "state": dict(program.state),
        "weights": {
            placeholder: {"name": weight.name, **weight_to_json(weight)}
            for placeholder, weight in program.weights.items()
        },
        "output_structure": _structure_to_json(program.output_structure),
        "types": rows.types.rows,
        "locations": rows.locations.rows,
        "nodes": nodes,
    }


def _sequence_to_json(sequence: SequenceSplit) -> dict[str, Any]:
    return {
        "axes": list(sequence.names),
        "num_ranks": sequence.num_ranks,
        "order": sequence.order,
        **({"pieces": sequence.pieces} if sequence.pieces > 1 else {}),
        **({"least": sequence.least} if sequence.least > 1 else {}),
        "length": _size_to_json(sequence.length),
        **({"others": list(map(_sequence_to_json, sequence.others))} if sequence.others else {}),
    }


def inputs_to_json(program: Program) -> list[dict[str, Any]]:
    """What the caller passes: names, global types, and the ids that tables have rows for."""
    return [
        {
            "name": spec.name, "type": _type_to_json(spec.type),
            **({"limits": list(map(_limit_to_json, spec.limits))} if spec.limits else {}),
            **({} if spec.values is None else {"values": list(spec.values)}),
        }
        for spec in program.inputs
    ]


def _limit_to_json(limit: IdLimit) -> dict[str, Any]:
    return {"low": limit.low, "high": limit.high, "location": _location_to_json(limit.location)}


class JsonText(str):
    """A value that is written as JSON already."""


class _NodeRows:
    """The nodes of a program, and the types and source lines that they name by number."""

    def __init__(self) -> None:
        self.types, self.locations = _Table(_type_to_json), _Table(_location_to_json)
        self._templates = Templates(lambda node, said: encode(self._row(node, said)))

    def of(self, section: Section) -> list[dict[str, Any]]:
        """The nodes of a section, as objects."""
        said = self._said(section)
        return [self._row(node, said) for node in section.nodes]

    def lines(self, section: Section) -> list[JsonText]:
        """The same as text."""
        said, names = self._said(section), section.names
        texts: dict[int, str] = {}  # by what stands in the gap, which templates hold

        def fill(gap: Any) -> str:
            if isinstance(gap, fx.Node):
                return f'"{names[gap]}"'
            if id(gap) not in texts:
                texts[id(gap)] = encode(said(gap))
            return texts[id(gap)]

        return list(map(JsonText, self._templates.texts(section, said, fill)))

    def _said(self, section: Section) -> Said:
        def said(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return section.names[value]
            if isinstance(value, str):
                return section.text(value)
            return self.locations.index(section.location(value))

        return said

    def _row(self, node: fx.Node, said: Said) -> dict[str, Any]:
        call = node.op == "call_function"
        data: dict[str, Any] = {"name": said(node), "op": op_name(node.target) if call else node.op}
        try:
            if node.op == "placeholder" and node.target != node.name:
                data["target"] = node.target
            if node.op == "output":
                data["args"] = [_argument_to_json(value, said) for value in node.args[0]]  # type: ignore[union-attr]
            if call:
                data["args"] = [_argument_to_json(value, said) for value in node.args]
                data["kwargs"] = {k: _argument_to_json(v, said) for k, v in node.kwargs.items()}
            if "type" in node.meta:
                data["type"] = self.types.index(node.meta["type"])
        except RingCompileError as error:
            raise error_at(node, error.message) from None
        if "loc" in node.meta:
            data["loc"] = said(node.meta["loc"])
        for key in ("why", "mask_kind", "stage"):
            if key in node.meta:
                data[key] = node.meta[key]
        if MARK in node.meta:
            data[MARK] = [node.meta[MARK].index, node.meta[MARK].size]
        return data


def _argument_to_json(value: Any, said: Said) -> Any:
    match value:
        case fx.Node():
            return {"node": said(value)}
        case str():
            return said(value)
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case list() | tuple():
            items = [_argument_to_json(v, said) for v in value]
            return items if isinstance(value, list) else {"tuple": items}
        case sympy.Expr():
            return _size_to_json(value)
        case torch.device():
            return {"device": str(value)}
        case torch.dtype() | torch.layout() | torch.memory_format():
            name = str(value).removeprefix("torch.")
            kind = type(value).__name__
            if name in CONSTANTS[kind]:
                return {kind: name}
    raise RingCompileError(f"an argument {str(value)[:60]} ({type(value).__name__}) has no JSON")


def _size_to_json(value: Size) -> Any:
    value = simplify(value)
    return value if isinstance(value, int) else {"expr": _expression_text(value)}


@lru_cache(maxsize=65536)
def _expression_text(value: sympy.Expr) -> str:
    """The text of an expression, which is sure to be read back as the same one."""
    text = to_text(value)
    if not equal(size_from_text(text), value):
        raise RingCompileError(f"the size {text} cannot be read back")
    return text


@lru_cache(maxsize=65536)
def size_from_text(text: str) -> Size:
    """A size expression of a file, which may be anything.

    Raises:
        RingCompileError: it is none, or too large, or its numbers do not fit 64 bits.
    """
    if not _EXPRESSION.fullmatch(text) or not is_bounded(text):
        raise RingCompileError(f"'{text[:80]}' is not a size expression")
    try:
        value = parse(text)
        # A division by zero gives infinities or nan: they have no place among 64-bit numbers.
        whole = sympy.sympify(value)
        numbers = whole.atoms(sympy.Number)
        fits = not whole.has(sympy.zoo) and all(abs(number) < MAX_INT for number in numbers)
    except Exception:  # sympy raises many kinds for what has no value
        fits = False
    if not fits:
        raise RingCompileError(f"'{text[:80]}' is not a size expression")
    return value


def _type_to_json(value: ValueType) -> Any:
    if isinstance(value, tuple):
        return [_type_to_json(v) for v in value]
    data: dict[str, Any] = {
        "dtype": dtype_to_json(value.dtype),
        "shape": [_size_to_json(size) for size in value.shape],
    }
    if not value.layout.is_whole:
        data["layout"] = [list(map(_atom_to_json, dim)) for dim in value.layout.dims]
    if value.layout.partial:
        data["partial"] = list(value.layout.partial)
    return data


def _atom_to_json(atom: Atom) -> dict[str, Any]:
    said = {name: True for name in ("sequence", "features") if getattr(atom, name)}
    return {"size": _size_to_json(atom.size), "axes": list(atom.axes), **said}


def _location_to_json(location: SourceLocation) -> list[Any]:
    return [portable(location.file), location.line, location.layer]


def _structure_to_json(structure: Structure) -> dict[str, Any]:
    data: dict[str, Any] = {"kind": structure.kind}
    if structure.keys:
        data["keys"] = list(structure.keys)
    if structure.children:
        data["children"] = [_structure_to_json(child) for child in structure.children]
    if structure.kind == "constant":
        data["value"] = structure.value
    return data
