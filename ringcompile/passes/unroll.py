"""One rank works through the sequence in time: what axis `time` splits becomes a run of chunks.

Up to here a program for `time=4` is like one for `ring=4`, with the coordinate `time` in it. Here
it is written out once for every value of it, one behind the other, in one program of one rank: keys
and values of other chunks are not sent for, they are other nodes of the same graph. With causal
attention a chunk needs nothing of later ones, so a pipeline stage sends its chunk on and takes up
the next while the next stage works on the first (Li et al., "TeraPipe", 2021).

What does not depend on `time` (a rotary table, a whole mask) is computed once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from ringcompile.axes import TIME
from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call, map_values
from ringcompile.ir.communication import COLLECTIVES, GATHER, SHIFT, WAIT, short_name
from ringcompile.ir.expr import OWN, Size, bind, coordinate, is_symbolic, product, simplify, symbol
from ringcompile.ir.layout import WHOLE, Atom, DimLayout, Layout, normalise
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType, ValueType, accumulator_type, local_size, state_type
from ringcompile.ops.blocks import Band
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass, refuse
from ringcompile.passes.cleanup import CleanUp

aten = torch.ops.aten
_TIMED = frozenset({coordinate(TIME), symbol(OWN)})


@dataclass(frozen=True)
class Unroll(Pass):
    """Write a program out for every chunk of time.

    p = positions([time], chunk=n)          ->  p_0 = positions([0], ...); p_1 = positions([1], ...)
    y = linear(x, w)                        ->  y_0 = linear(x_0, w);      y_1 = linear(x_1, w)
    o = ring_attention(q, k, v, axis=time)  ->  o_1: q_1 over k_1, v_1, then over k_0, v_0
    t = shift_start(y, axis=pp, to=1)       ->  a transfer for each chunk
    """

    name: ClassVar[str] = "unroll"

    def run(self, program: Program) -> Program:
        """The program of the same rank without `time`; one that does not have it stays as it is.

        Raises:
            RingCompileError: an op communicates along `time` in a way that is not known.
        """
        if program.mesh is None or program.mesh.size(TIME) == 1:
            return program
        return CleanUp().run(_Unroller(program, program.mesh.size(TIME)).run())


class _Unroller:
    def __init__(self, program: Program, count: int) -> None:
        assert program.sequence is not None
        self.program, self.sequence, self.count = program, program.sequence, count
        self.builder = Builder()
        self.calls = [node for node in program.graph.nodes if node.op == "call_function"]
        self.varying = _varying(program)
        # For each chunk what stands for a node of it, and what is the same for all.
        self.env: list[dict[fx.Node, fx.Node]] = [{} for _ in range(count)]
        self.shared: dict[fx.Node, fx.Node] = {}
        self.unsent: dict[fx.Node, Callable[[], fx.Node]] = {}
        starts = [node for node in self.calls if str(node.target) == SHIFT]
        self.sends = [node for node in starts if node.kwargs["source"] is None]
        self.receives = [node for node in starts if node.kwargs["source"] is not None]

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.shared[node] = self.builder.placeholder(node.name, self._outside(node))
        waiting = [
            deque(node for node in self._ordered() if node in self.varying or chunk == 0)
            for chunk in range(self.count)
        ]
        while any(waiting):
            before = sum(map(len, waiting))
            for chunk, rest in enumerate(waiting):
                while rest and self._is_ready(rest[0], chunk):
                    self._emit(rest.popleft(), chunk)
            assert sum(map(len, waiting)) < before, f"%{waiting[0][0].name} is never ready"
        for finish in self.unsent.values():
            finish()
        self.builder.output(tuple(map(self._whole, self.program.outputs)))
        return self.program.with_graph(self.builder.graph)

    def _ordered(self) -> list[fx.Node]:
        """The calls, and inputs of which a chunk takes a part, each before what reads it."""
        cut = [node for node in self.varying if node.op == "placeholder"]
        return [*cut, *self.calls]

    def _is_ready(self, node: fx.Node, chunk: int) -> bool:
        """Whether what the node reads of other chunks is there."""
        if _over_time(node):
            return all(node.args[0] in env for env in self.env)
        if node.target is op("ring_attention"):
            others = self._seen(node, chunk)
            if not all(Call(node)[name] in self.env[i] for i in others for name in ("k", "v")):
                return False
        if node in self.sends and chunk and not all(
            self._is_there(send, chunk - 1) for send in self.sends
        ):
            return False  # the next stage takes chunks in order
        return all(self._is_there(operand, chunk) for operand in node.all_input_nodes)

    def _is_there(self, node: fx.Node, chunk: int) -> bool:
        return node in self.shared or node in self.env[chunk]

    def _emit(self, node: fx.Node, chunk: int) -> None:
        self.builder.at(node)
        try:
            if node.op == "placeholder":
                self.env[chunk][node] = self._part(node, chunk)
            elif _over_time(node):
                self.shared[node] = self._gather(node)
            elif node.target is op("ring_attention"):
                self.env[chunk][node] = self._attention(node, chunk)
            elif str(node.target) in (SHIFT, WAIT):
                self._transfer(node, chunk)
            else:
                self._copy(node, chunk)
        except RingCompileError as error:
            raise refuse(node, error) from None

    def _value(self, node: fx.Node, chunk: int) -> fx.Node:
        return self.env[chunk][node] if node in self.env[chunk] else self.shared[node]

    def _copy(self, node: fx.Node, chunk: int, **changed: Any) -> fx.Node:
        """The node for one chunk; `changed` are keyword arguments that take other values."""
        args, kwargs = map_values(
            (node.args, {**node.kwargs, **changed}), lambda value: self._argument(value, chunk)
        )
        varies = node in self.varying
        new = self.builder.call(
            node.target, args, self._inside(node.meta["type"], chunk),
            name=self._name(node, chunk) if varies else node.name,
            why=node.meta.get("why") or (f"chunk {chunk}" if varies else None), **kwargs,
        )
        new.meta.update({k: node.meta[k] for k in ("stage", "mask_kind") if k in node.meta})
        (self.env[chunk] if varies else self.shared)[node] = new
        return new

    def _argument(self, value: Any, chunk: int) -> Any:
        if isinstance(value, fx.Node):
            return self._value(value, chunk)
        return self._at(value, chunk) if is_symbolic(value) else value

    def _at(self, size: Size, chunk: int) -> Size:
        """An expression at one chunk of time."""
        if not is_symbolic(size):
            return size
        length, place = self.sequence.length, self.sequence.chunk
        own = sympy.Min(sympy.Max(length - chunk * place, 0), place)
        return simplify(
            size.xreplace({coordinate(TIME): sympy.Integer(chunk), symbol(OWN): own})
        )

    @staticmethod
    def _name(node: fx.Node, chunk: int) -> str:
        return f"{node.name}_t{chunk}"

    # -- transfers between stages -----------------------------------------------------------------

    def _transfer(self, node: fx.Node, chunk: int) -> None:
        """A chunk on its way between stages.

        What comes is asked for one chunk ahead, all values of a chunk in the order in which they
        are sent. That a chunk was sent is waited for when the next one is sent: until then the rank
        computes.
        """
        if node in self.sends:
            if node in self.unsent:
                self.unsent.pop(node)()
            self._start(node, chunk)
        elif node in self.receives:
            self._ask(chunk)
        elif node.users:
            self._ask(chunk + 1)
            self._copy(node, chunk)
        else:
            (started,) = node.all_input_nodes
            self.unsent[started] = partial(self._copy, node, chunk)

    def _ask(self, chunk: int) -> None:
        """For all that comes for a chunk, unless that is done."""
        if chunk < self.count:
            for start in self.receives:
                if not self._is_there(start, chunk):
                    self._start(start, chunk)

    def _start(self, node: fx.Node, chunk: int) -> None:
        named = f"{node.kwargs['of']}_t{chunk}" if node in self.varying else node.kwargs["of"]
        self._copy(node, chunk, of=named)

    # -- what all chunks have, and other chunks' parts -------------------------------------------

    def _gather(self, node: fx.Node) -> fx.Node:
        """What a collective along `time` brings: the chunks of its operand are all here."""
        if str(node.target) != GATHER:
            raise RingCompileError(
                f"{short_name(node)} along {TIME} is not known",
                hint=f"split the sequence over ring instead of {TIME}",
            )
        dim, limit = node.kwargs["dim"], node.kwargs["limit"]
        assert isinstance(dim, int)
        joined = self._joined([env[node.args[0]] for env in self.env], dim)  # type: ignore[index]
        if limit is None:
            return joined
        return self.builder.call(
            aten.slice.Tensor, (joined, dim, 0, limit), self._inside(type_of(node), 0),
            why="without padding",
        )

    def _joined(self, parts: Sequence[fx.Node], dim: int) -> fx.Node:
        if len(parts) == 1:
            return parts[0]
        first = type_of(parts[0])
        size = simplify(sum(type_of(part).shape[dim] for part in parts))
        shape = (*first.shape[:dim], size, *first.shape[dim + 1 :])
        return self.builder.call(
            aten.cat.default, (list(parts), dim), TensorType(first.dtype, shape, first.layout)
        )

    # -- attention --------------------------------------------------------------------------------

    def _seen(self, node: fx.Node, chunk: int) -> list[int]:
        """The other chunks whose keys a chunk's queries see, in order."""
        return [other for other in range(self.count)
                if other != chunk and self._relation(node, chunk, other) != "empty"]

    def _relation(self, node: fx.Node, queries: int, keys: int) -> str:
        call, length = Call(node), bind(self.sequence.chunk, self.program.lengths)
        band = Band(call["lower"], call["upper"])
        return band.chunk_relation(queries, keys, length if isinstance(length, int) else None)

    def _attention(self, node: fx.Node, chunk: int) -> fx.Node:
        """A chunk's queries over its own keys, then over those of others, merged."""
        call, others = Call(node), self._seen(node, chunk)
        type_ = self._inside(type_of(node), chunk)
        state = self._block(node, chunk, [chunk])
        whole = [i for i in others if self._relation(node, chunk, i) == "full"]
        for keys in [*([whole] if whole else []), *([i] for i in others if i not in whole)]:
            block = self._block(node, chunk, keys)
            state = self.builder.call(op("merge"), (state, block), accumulator_type(type_), start=0)
        sink = self._value(call["sink"], chunk) if call["sink"] is not None else None
        return self.builder.call(
            op("finish"), (state, sink), type_, name=self._name(node, chunk), dtype=type_.dtype
        )

    def _block(self, node: fx.Node, chunk: int, keys: list[int]) -> fx.Node:
        call = Call(node)
        q = self.env[chunk][call["q"]]
        kv = [self._joined([self.env[i][call[name]] for i in keys], 2) for name in ("k", "v")]
        key_mask, mask = (
            self._value(call[name], chunk) if call[name] is not None else None
            for name in ("key_mask", "mask")
        )
        out = type_of(q)
        shape = (*out.shape[:3], type_of(kv[1]).shape[3])
        return self.builder.call(
            op("block_attention"), (q, kv, key_mask, mask),
            state_type(TensorType(out.dtype, shape, out.layout)),
            why=f"chunk {chunk} over {', '.join(map(str, keys))}",
            head_dim=type_of(kv[0]).shape[3], queries=[chunk], keys=keys,
            chunk=self.sequence.chunk, limit=self.sequence.length,
            **{name: call[name] for name in ("scale", "softcap", "lower", "upper")},
        )

    # -- types, inputs, outputs -------------------------------------------------------------------

    def _outside(self, node: fx.Node) -> TensorType:
        """The type of an input, whole along the sequence."""
        return type_of(node).with_layout(type_of(node).layout.without(TIME))

    def _inside(self, type_: Any, chunk: int) -> Any:
        """The type of what one chunk has of a value, by itself."""
        if isinstance(type_, tuple):
            return tuple(self._inside(one, chunk) for one in type_)
        shape, dims = [], []
        for size, dim in zip(type_.shape, type_.layout.dims, strict=True):
            atoms = [self._atom(atom, chunk) for atom in dim] or [Atom(self._at(size, chunk))]
            shape.append(product(atom.size for atom in atoms))
            dims.append(normalise(atoms))
        partial = tuple(axis for axis in type_.layout.partial if axis != TIME)
        return TensorType(type_.dtype, tuple(shape), Layout(tuple(dims), partial))

    def _atom(self, atom: Atom, chunk: int) -> Atom:
        if TIME not in atom.axes:
            return Atom(self._at(atom.size, chunk), atom.axes, atom.sequence)
        size = local_size(atom, self.program.mesh, self.sequence)
        assert size is not None, f"{atom} cannot be cut evenly"
        return Atom(size)

    def _part(self, node: fx.Node, chunk: int) -> fx.Node:
        """What a chunk takes of an input."""
        (dim,) = (i for i, atoms in enumerate(type_of(node).layout.dims) if atoms)
        where = self.builder.call(
            op("positions"), ([chunk],), TensorType.whole(torch.int64, (self.sequence.chunk,)),
            chunk=self.sequence.chunk, limit=self.sequence.length,
            why=f"positions of chunk {chunk}",
        )
        return self.builder.call(
            aten.index_select.default, (self.shared[node], dim, where),
            self._inside(type_of(node), chunk), name=self._name(node, chunk), why=f"chunk {chunk}",
        )

    def _whole(self, node: fx.Node) -> fx.Node:
        """An output, of all chunks."""
        if node in self.shared:
            return self.shared[node]
        type_ = type_of(node)
        parts = [env[node] for env in self.env]
        dims: list[list[Atom]] = [
            list(dim or (Atom(size),))
            for size, dim in zip(type_.shape, type_.layout.dims, strict=True)
        ]
        flat = [atom for dim in dims for atom in dim]
        (place,) = (i for i, atom in enumerate(flat) if TIME in atom.axes)
        opened = [self._reshaped(part, flat, self._atom(flat[place], 0).size, place)
                  for part in parts]
        joined = self._joined(opened, place)
        type_ = self._of_atoms(type_.dtype, flat, flat[place].size, place)
        kept = self.builder.call(
            aten.slice.Tensor, (joined, place, 0, flat[place].size), type_, why="without padding"
        )
        whole = self._outside(node)
        if len(flat) == len(dims):
            return kept
        return self.builder.call(aten.reshape.default, (kept, self._local(whole)), whole)

    def _reshaped(self, part: fx.Node, flat: list[Atom], size: Size, place: int) -> fx.Node:
        """A chunk of an output with a dim for each atom."""
        if len(flat) == len(type_of(part).shape):
            return part
        type_ = self._of_atoms(type_of(part).dtype, flat, size, place)
        return self.builder.call(aten.reshape.default, (part, self._local(type_)), type_)

    def _of_atoms(
        self, dtype: torch.dtype, flat: list[Atom], size: Size, place: int
    ) -> TensorType:
        dims: list[DimLayout] = [
            (atom,) if atom.axes and i != place else WHOLE for i, atom in enumerate(flat)
        ]
        shape = tuple(size if i == place else atom.size for i, atom in enumerate(flat))
        return TensorType(dtype, shape, Layout(tuple(dims)))

    def _local(self, type_: TensorType) -> list[Size]:
        sizes = (
            [local_size(atom, self.program.mesh, None) for atom in dim] or [size]
            for size, dim in zip(type_.shape, type_.layout.dims, strict=True)
        )
        return [product(pieces) for pieces in sizes]


def _over_time(node: fx.Node) -> bool:
    return str(node.target) in COLLECTIVES and node.kwargs["axis"] == TIME


def _varying(program: Program) -> dict[fx.Node, None]:
    """What is another value for every chunk, in order."""
    varying: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        if _over_time(node):
            continue  # all get the same
        reads = node.op == "call_function" and any(n in varying for n in node.all_input_nodes)
        if reads or _holds_time(node) or _is_timed(node.meta.get("type", ())):
            varying[node] = None
    return varying


def _holds_time(node: fx.Node) -> bool:
    found: set[Any] = set()

    def note(value: Any) -> Any:
        if is_symbolic(value):
            found.update(value.free_symbols)
        return value

    map_values((node.args, dict(node.kwargs)), note)
    return not found.isdisjoint(_TIMED)


def _is_timed(type_: ValueType) -> bool:
    """Whether a type is split over `time`, or as long as a chunk without its padding."""
    if isinstance(type_, tuple):
        return any(map(_is_timed, type_))
    if TIME in (*type_.layout.axes, *type_.layout.partial):
        return True
    return any(is_symbolic(size) and symbol(OWN) in size.free_symbols for size in type_.shape)
