"""Reading a program back from JSON: data only, and only ops that the reader allows.

The file may be anything. Whatever is missing, malformed, out of range or inconsistent is a
RingCompileError; no name in it is looked up that is not in the list of allowed ops.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from ringcompile.artifact.fields import (
    constant,
    count,
    dtype_from_json,
    entry,
    expect,
    member,
    mesh_from_json,
    numbers,
    range_from_json,
    structure_from_json,
    texts,
    values_from_json,
    weight_from_json,
)
from ringcompile.artifact.ops import check_arguments, resolve
from ringcompile.axes import TIME, base_axis
from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.ir.calls import append
from ringcompile.ir.expr import (
    LENGTHS,
    PART_AXIS,
    SHARES,
    SIZE_NAMES,
    Size,
    depends_on_data,
    is_symbolic,
    symbols_in,
)
from ringcompile.ir.fused import MARK, Member
from ringcompile.ir.layout import Atom, Layout
from ringcompile.ir.program import IdLimit, Input, Program, Structure, Weight
from ringcompile.ir.serialize import CONSTANTS, MAX_INT, portable, size_from_text
from ringcompile.ir.state import STATE_KINDS
from ringcompile.ir.types import SequenceSplit, TensorType, ValueType
from ringcompile.ir.verifier import verify_program
from ringcompile.mesh import Mesh
from ringcompile.options import ORDERS

_DEVICE = re.compile(r"(cpu|cuda|meta)(:\d{1,3})?")
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def program_from_json(data: Any, allowed: Container[str]) -> Program:
    """A program, without `source`, from what `program_to_json` gave.

    Args:
        data: parsed JSON, which need not be ours.
        allowed: the ops that the program may hold, by name; no other name is ever looked up.

    Raises:
        RingCompileError: anything missing, malformed, out of range or inconsistent.
    """
    try:
        return _read_program(expect(data, dict, "the program"), allowed)
    except RecursionError:
        raise RingCompileError("the program is nested too deeply") from None


def _read_program(data: dict[str, Any], allowed: Container[str]) -> Program:
    mesh = None if data.get("mesh") is None else mesh_from_json(member(data, "mesh", str))
    reader = _Reader(mesh, allowed, specialized=data.get("coordinates") is not None)
    reader.read(data)
    program = Program(
        graph=reader.graph,
        inputs=tuple(map(reader.input, member(data, "inputs", list))),
        placeholders={
            key: expect(name, str, f"the input of '{key}'")
            for key, name in member(data, "placeholders", dict).items()
        },
        weights={k: _weight(k, v) for k, v in member(data, "weights", dict).items()},
        output_structure=structure_from_json(data.get("output_structure")),
        length_range=range_from_json(data, "length_range"),
        other_ranges=_other_ranges(data),
        name=member(data, "name", str),
        mesh=mesh,
        sequence=None if data.get("sequence") is None else _sequence(data, reader),
        coordinates=numbers(data, "coordinates") if reader.specialized else None,
        passes=texts(data, "passes"),
        notes=texts(data, "notes"),
        lengths=numbers(data, "lengths"),
        state={key: _state(kind) for key, kind in member(data, "state", dict).items()},
        batch_range=range_from_json(data, "batch_range"),
        returns=tuple(map(reader.tensor_type, member(data, "returns", list))),
        microbatches=_microbatches(data.get("microbatches")),
    )
    _check(program)
    return program


def _microbatches(value: Any) -> int | None:
    return None if value is None else count(value, "'microbatches'")


def _weight(placeholder: str, data: Any) -> Weight:
    data = expect(data, dict, f"the weight of '{placeholder}'")
    return weight_from_json(member(data, "name", str), data)


def _state(kind: Any) -> str:
    if expect(kind, str, "a kind of state") not in STATE_KINDS:
        raise RingCompileError(f"'{kind[:40]}' is not a kind of state")
    return str(kind)


def _other_ranges(data: dict[str, Any]) -> dict[str, tuple[int, int | None]]:
    """The ranges of further lengths, if there are any."""
    found = member(data, "other_ranges", dict) if "other_ranges" in data else {}
    for name in found:
        if name not in LENGTHS[1:]:
            raise RingCompileError(f"'{name[:40]}' is not a further length")
    return {name: range_from_json(found, name) for name in found}


def _sequence(data: dict[str, Any], reader: _Reader) -> SequenceSplit:
    """How the lengths of a program are divided, each with a symbol of its own for a share."""
    fields = member(data, "sequence", dict)
    rest = member(fields, "others", list) if "others" in fields else []
    splits = [_split(expect(x, dict, "a further length"), reader) for x in (fields, *rest)]
    main, *others = splits
    if len(splits) > len(SHARES) or len({split.length for split in splits}) < len(splits):
        raise RingCompileError("'sequence' has too many lengths, or one of them twice")
    shares = list(SHARES.values())[1:]
    return replace(main, others=tuple(
        replace(other, share=share) for other, share in zip(others, shares, strict=False)
    ))


def _split(fields: dict[str, Any], reader: _Reader) -> SequenceSplit:
    mesh = reader.mesh
    names, order = texts(fields, "axes"), member(fields, "order", str)
    ranks, axis = member(fields, "num_ranks", int), ",".join(names)
    fits = mesh is not None and (not names or mesh.has(axis)) and mesh.size(axis) == ranks
    if mesh is None or not fits or len(set(names)) < len(names) or order not in ORDERS:
        raise RingCompileError(f"'sequence' does not fit the mesh {mesh}")
    length = reader.size(fields.get("length"))
    if is_symbolic(length) and not symbols_in(length) <= {*LENGTHS}:
        raise RingCompileError(f"the sequence cannot have the length {length}")
    pieces = count(fields.get("pieces", 1), "'pieces'")
    if pieces not in (1, mesh.size(TIME)) or (pieces > 1 and TIME in names):
        raise RingCompileError(f"'sequence' has {pieces} pieces in time, but the mesh is {mesh}")
    axes = tuple((name, mesh.size(name)) for name in names)
    least = count(fields.get("least", 1), "'least'")
    return SequenceSplit(axes, order, length, pieces=pieces, least=least)


def _num_tensors(structure: Structure) -> int:
    return (structure.kind == "tensor") + sum(map(_num_tensors, structure.children))


def _check(program: Program) -> None:
    """What the parts must agree on."""
    placeholders = {node.name for node in program.graph.nodes if node.op == "placeholder"}
    taken, kept = program.placeholders.keys(), program.state.keys()
    both = {name for name, kind in program.state.items() if kind == "history"}
    if placeholders != program.weights.keys() ^ (taken | kept) or both != taken & kept:
        raise RingCompileError("placeholders, inputs, state and weights do not fit together")
    names = [spec.name for spec in program.inputs]
    if len(set(names)) < len(names) or not set(program.placeholders.values()) <= set(names):
        raise RingCompileError(f"the inputs {names} do not fit the placeholders")
    passes_on = program.mesh is not None and program.coordinates is not None and (
        program.coordinates.get("pp", 0) < program.mesh.size("pp") - 1
    )
    if len(program.outputs) != (0 if passes_on else _num_tensors(program.output_structure)):
        raise RingCompileError("the outputs do not fit their structure")
    if program.coordinates is not None:
        sizes = dict(program.mesh.across) if program.mesh is not None else {}
        if program.coordinates.keys() != sizes.keys() or any(
            program.coordinates[axis] >= size for axis, size in sizes.items()
        ):
            raise RingCompileError(f"'coordinates' do not lie on the mesh {program.mesh}")
    try:
        verify_program(program)
    except (AssertionError, RuntimeError) as error:
        raise RingCompileError(f"the graph is not valid: {error}") from None


@dataclass
class _Reader:
    """Rebuilds the graph of one program."""

    mesh: Mesh | None
    allowed: Container[str]
    specialized: bool
    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    types: list[ValueType] = field(default_factory=list)
    locations: list[SourceLocation] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        self.axes = frozenset(self.mesh.names if self.mesh is not None else ())
        self.symbols = SIZE_NAMES if self.specialized else SIZE_NAMES | self.axes

    def read(self, data: dict[str, Any]) -> None:
        self.types = [self.type(row) for row in member(data, "types", list)]
        self.locations = [self._location(row) for row in member(data, "locations", list)]
        for row in member(data, "nodes", list):
            name = member(expect(row, dict, "a node"), "name", str)
            try:
                self._node(name, row)
            except RingCompileError as error:
                raise RingCompileError(error.message, hint=error.hint, node=name[:80]) from None
        if not self.finished:
            raise RingCompileError("the graph has no output")

    def _node(self, name: str, row: dict[str, Any]) -> None:
        op = member(row, "op", str)
        if name in self.nodes or self.finished or len(name) > 1000:
            raise RingCompileError("its name is taken or too long, or it stands behind the output")
        meta = self._meta(row)
        if op == "placeholder":
            target = member(row, "target", str) if "target" in row else name
            node = self.graph.create_node(op, target, name=name)
        elif op == "output":
            outputs = tuple(map(self.argument, member(row, "args", list)))
            node = self.graph.create_node(op, op, (outputs,), name=name)
            self.finished = True
        else:
            node = self._call(name, op, row)
        if node.name != name:
            raise RingCompileError("this is not a name that a node can have")
        node.meta.update(meta)
        for value in outputs if op == "output" else [node] if op == "placeholder" else ():
            if not isinstance(value, fx.Node) or not isinstance(value.meta.get("type"), TensorType):
                raise RingCompileError("inputs and outputs must be single tensors")
        self.nodes[name] = node

    def _call(self, name: str, op: str, row: dict[str, Any]) -> fx.Node:
        if op not in self.allowed:
            raise RingCompileError(
                f"'{op[:80]}' is not an op that a program may hold",
                hint="only torch's functions of tensors and ringcompile's own ops are allowed",
            )
        target = resolve(op)
        args = tuple(map(self.argument, member(row, "args", list)))
        kwargs = {key: self.argument(v) for key, v in member(row, "kwargs", dict).items()}
        check_arguments(target, args, kwargs)
        return append(self.graph, "call_function", target, args, kwargs, name)

    def _meta(self, row: dict[str, Any]) -> dict[str, Any]:
        meta: dict[str, Any] = {}
        if "type" in row:
            meta["type"] = entry(self.types, row, "type")
        if "loc" in row:
            meta["loc"] = entry(self.locations, row, "loc")
        if "stage" in row:
            meta["stage"] = count(row["stage"], "a stage")
        if MARK in row:
            meta[MARK] = Member(*_member_of_group(member(row, MARK, list)))
        for key in ("why", "mask_kind"):
            if key in row:
                meta[key] = member(row, key, str)
        return meta

    def argument(self, value: Any) -> Any:
        """An argument of a call."""
        match value:
            case dict() if len(value) == 1:
                ((kind, content),) = value.items()
                return self._tagged(kind, content)
            case None | bool() | str():
                return value
            case int() if abs(value) < MAX_INT:
                return value
            case float() if math.isfinite(value):
                return value
            case list():
                return [self.argument(v) for v in value]
        raise RingCompileError(f"{str(value)[:60]} is not an argument")

    def _tagged(self, kind: str, content: Any) -> Any:
        if kind == "tuple":
            return tuple(map(self.argument, expect(content, list, "a tuple")))
        text = expect(content, str, f"a {kind[:40]}")
        if kind == "node":
            if text not in self.nodes:
                raise RingCompileError(f"reads %{text[:80]}, which no earlier node is called")
            return self.nodes[text]
        if kind == "expr":
            return self.size({"expr": text})
        if kind in CONSTANTS:
            return constant(kind, text)
        if kind == "float" and text in _FLOATS:
            return _FLOATS[text]
        if kind == "device" and _DEVICE.fullmatch(text):
            return torch.device(text)
        raise RingCompileError(f"'{text[:40]}' is not a {kind[:40]}")

    def size(self, value: Any, of_type: bool = False) -> Size:
        """A size, offset or coordinate, of this program's symbols only; in a type, also `u0`."""
        if not isinstance(value, dict):
            return count(value, "a size")
        size, names, backed = _named_size(member(value, "expr", str))
        if unknown := (backed if of_type else names) - self.symbols:
            raise RingCompileError(f"'{min(unknown)}' is neither a length nor a coordinate here")
        return size

    def type(self, value: Any) -> ValueType:
        if isinstance(value, list):
            return tuple(self.tensor_type(v) for v in value)
        return self.tensor_type(value)

    def tensor_type(self, value: Any) -> TensorType:
        data = expect(value, dict, "a type")
        shape = tuple(self.size(size, of_type=True) for size in member(data, "shape", list))
        whole = TensorType.whole(dtype_from_json(data.get("dtype")), shape)
        dims = whole.layout.dims
        if "layout" in data:
            dims = tuple(
                tuple(map(self._atom, expect(dim, list, "a dim of a layout")))
                for dim in member(data, "layout", list)
            )
        layout = Layout(dims, texts(data, "partial") if "partial" in data else ())
        if len(dims) != len(shape) or layout.has_conflict:
            raise RingCompileError(f"the layout {layout} does not fit the shape of {whole}")
        if not self.axes.issuperset(layout.partial):
            raise RingCompileError(f"{layout} is summed over axes that {self.mesh} does not have")
        return replace(whole, layout=layout)

    def _atom(self, value: Any) -> Atom:
        data = expect(value, dict, "a part of a layout")
        axes = texts(data, "axes")
        if axes != (PART_AXIS,) and not self.axes.issuperset(map(base_axis, axes)):
            raise RingCompileError(f"a tensor is split over {axes}, the mesh is {self.mesh}")
        sequence, features = (data.get(name) is True for name in ("sequence", "features"))
        if sequence and features:
            raise RingCompileError(f"a tensor is split over {axes} as a sequence and as features")
        return Atom(self.size(data.get("size")), axes, sequence, features)

    def input(self, value: Any) -> Input:
        data = expect(value, dict, "an input")
        limits = member(data, "limits", list) if "limits" in data else []
        return Input(
            member(data, "name", str), self.tensor_type(data.get("type")),
            tuple(map(self._limit, limits)), values_from_json(data.get("values")),
        )

    def _limit(self, value: Any) -> IdLimit:
        data = expect(value, dict, "a limit of ids")
        low, high = member(data, "low", int), member(data, "high", int)
        if not max(abs(low), abs(high)) < MAX_INT:
            raise RingCompileError("a limit of ids is out of range")
        return IdLimit(low, high, self._location(data.get("location")))

    @staticmethod
    def _location(value: Any) -> SourceLocation:
        row = expect(value, list, "a location")
        if len(row) != 3:
            raise RingCompileError("a location is not [file, line, layer]")
        file, line, layer = row
        return SourceLocation(
            portable(expect(file, str, "a file")),
            count(line, "a line"),
            expect(layer, str, "a layer"),
        )


@lru_cache(maxsize=65536)  # sympy goes through an expression at every look for its symbols
def _named_size(text: str) -> tuple[Size, frozenset[str], frozenset[str]]:
    """A size, the names of its symbols, and the names of those that do not depend on data."""
    size = size_from_text(text)
    found = set() if isinstance(size, int) else size.free_symbols
    names = frozenset(symbol.name for symbol in found)
    return size, names, frozenset(s.name for s in found if not depends_on_data(s))


def _member_of_group(value: list[Any]) -> tuple[int, int]:
    """A node's place in its fused group, and the size of that."""
    if len(value) != 2:
        raise RingCompileError(f"'{MARK}' is not a place in a group and the group's size")
    return count(value[0], "a place in a group"), count(value[1], "a group's size")
