"""A program for a whole batch as one for any part of it, a replica's or a microbatch's.

Data parallelism and microbatches compute some sequences of a batch as a batch by themselves, of
`k` sequences from number `k0` on. `batch_layouts` says which dim of each value the sequences are
in; here those dims become `k`. What is a number, not a shape, stays what it was: `x / x.shape[0]`
still divides by the true batch `b`, and `arange(b)` still begins with the part's first number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from ringcompile.axes import HALVES
from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call, map_values, target_name, with_argument
from ringcompile.ir.expr import (
    BATCH,
    FIRST,
    PART,
    Size,
    bind_to,
    coordinate,
    divide,
    product,
    simplify,
    symbol,
)
from ringcompile.ir.layout import Atom
from ringcompile.ir.nodes import layout_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import find_rule
from ringcompile.ir.types import TensorType
from ringcompile.mesh import Mesh
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.batch_layouts import BatchLayouts
from ringcompile.passes.experts.regions import Region
from ringcompile.passes.experts.token_wise import TokenWise
from ringcompile.passes.requests import REDISTRIBUTE
from ringcompile.passes.sequence.place import Place

aten = torch.ops.aten
_B, _K, _FIRST = symbol(BATCH), symbol(PART), symbol(FIRST)


@dataclass(frozen=True)
class DealBatch(Pass):
    """Make the program that of a part of the batch: of a replica, a microbatch or a half.

    If the model mixes the sequences of a batch, a pipeline takes the batch as one microbatch.

    With `halves` the program becomes that of one half, of a part or of the whole batch; which one
    is the coordinate `halves`, and `unroll` writes both.

    x: f32[b, s, 8]                        ->  x: f32[k, s, 8]
    y = expand(w, [b, s, 8])                   y = expand(w, [k, s, 8])
    n = arange(0, b)                           n = arange(k0, k0 + k)
    z = div(x, b)                              z = div(x, b)

    Attributes:
        mesh: the parallel plan; only with `dp`, `pp` or `halves` are batches dealt.
        checked: as for `Place`.
        capacity: "exact" where a capacity of experts counts the tokens of the whole batch, so that
            a batch is not dealt out; "local" where each part may count its own.
    """

    name: ClassVar[str] = "deal-batch"
    mesh: Mesh
    checked: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    capacity: str = "exact"

    def run(self, program: Program) -> Program:
        """The program for a part, with a note where a capacity is counted by each part.

        Raises:
            RingCompileError: with `dp` or `halves`, at the op that mixes sequences, or where the
                batch is fixed.
        """
        must = self.mesh.size("dp") * self.mesh.size(HALVES) > 1
        if program.batch != _B:
            if not must:
                return program
            raise RingCompileError(
                f"{self.mesh}: the batch is fixed at {program.batch}, and cannot be dealt out",
                hint="; ".join(program.notes) or None,
            )
        by_rows = TokenWise(program, self.checked).holds_by_rows
        regions = list(filter(by_rows, routing(program, self.checked)))
        counted = [region for region in regions if region.has_capacity]
        apart = [region for region in regions if region not in counted]
        local = self.capacity == "local"
        try:
            dealt = deal_out(program, regions if local else apart, *self._part())
        except RingCompileError as error:
            found = error if local else _counted_whole(error, counted, self._without)
            if must:
                raise RingCompileError(
                    found.message, hint=found.hint or self._without,
                    location=error.location, node=error.node,
                ) from None
            where = f"{error.location.short}: " if error.location else ""
            note = f"{where}{found.message}: a pipeline takes every batch as one microbatch"
            return program.with_graph(program.graph, notes=(*program.notes, note))
        if self.mesh.size(HALVES) > 1:  # what the caller passes are whole batches, not halves
            dealt = dealt.with_graph(dealt.graph, inputs=program.inputs)
        part = "microbatch" if self._is_dealt else "half"
        notes = [
            f"{region.name}: with {self.mesh}, the capacity of experts is counted for each "
            f"{part} alone" for region in counted if local
        ]
        return dealt.with_graph(dealt.graph, notes=(*program.notes, *dict.fromkeys(notes)))

    @property
    def _without(self) -> str:
        """What to do where the batch cannot be dealt out."""
        halves = self.mesh.size(HALVES) > 1
        return f"leave out {HALVES} (--overlap {HALVES})" if halves else "leave dp out"

    @property
    def _is_dealt(self) -> bool:
        """Whether parts of a batch run as batches by themselves."""
        return self.mesh.size("dp") * self.mesh.size("pp") > 1

    def _part(self) -> tuple[Size, Size]:
        """How many sequences the program is for, and the number of the first of them."""
        count, first = (_K, _FIRST) if self._is_dealt else (_B, sympy.Integer(0))
        halves = self.mesh.size(HALVES)
        each = count / halves
        which = coordinate(HALVES) if halves > 1 else sympy.Integer(0)
        return simplify(each), simplify(first + which * each)


def _counted_whole(
    error: RingCompileError, regions: Sequence[Region], without: str
) -> RingCompileError:
    """What to say of an op that mixes sequences: in a mixture, that they share a capacity."""
    if not any(node.name == error.node for region in regions for node in region.nodes):
        return error
    return RingCompileError(
        "experts take a limited number of tokens of the whole batch here",
        hint=f"{without}; or --capacity local counts the tokens of each part alone, which "
        "changes results",
    )


def routing(program: Program, checked: dict[Any, Any]) -> list[Region]:
    """The regions that route tokens to experts."""
    return Place(Mesh((("ring", 2),)), capacity="local", checked=checked).routing(program)


def deal_out(
    program: Program, regions: Sequence[Region], count: Size = _K, first: Size = _FIRST
) -> Program:
    """The program for a part of the batch.

    Args:
        program: for any batch, prepared.
        regions: whose ops are known to be token-wise.
        count: the sequences of the part.
        first: the number of the first of them.

    Raises:
        RingCompileError: at the first op that mixes the sequences of a batch.
    """
    inside = {node for region in regions for node in region.nodes}
    placed = BatchLayouts(program, inside).run()
    return _Dealer(placed, count, first).run()


class _Dealer:
    """Makes every value that is split along the batch that of one part."""

    def __init__(self, program: Program, count: Size, first: Size) -> None:
        self.program, self.count, self.first = program, count, first
        self.builder = Builder()

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            self.builder.at(node)
            self.builder.env[node] = self._written(node)
        layouts = {n.name: type_of(n) for n in self.program.graph.nodes if n.op == "placeholder"}
        given = {name: layouts[node] for node, name in reversed(self.program.placeholders.items())}
        return self.program.with_graph(
            self.builder.graph,
            inputs=tuple(
                replace(x, type=given.get(x.name, x.type)) for x in self.program.inputs
            ),
            returns=tuple(type_of(node) for node in self.program.outputs),
        )

    def _written(self, node: fx.Node) -> fx.Node:
        if node.op == "output":
            return self.builder.copy(node)
        if node.target is REDISTRIBUTE:
            return self._part(node)
        if target_name(node.target) == "aten.arange.start_step" and not layout_of(node).is_whole:
            return self._numbers(node)
        new = self.builder.copy(node)
        value = node.meta["type"]
        local = self._all_of_part if node.meta.get("of_part") else self._local
        new.meta["type"] = (
            local(value) if isinstance(value, TensorType) else tuple(map(local, value))
        )
        if node.meta.get("of_part"):
            own = lambda size: bind_to(size, {_B: self.count})  # noqa: E731
            new.args, new.kwargs = map_values((new.args, dict(new.kwargs)), own)
            new.args = tuple(new.args)
            return new
        rule = find_rule(node.target)
        if rule is not None and rule.shape_argument is not None:
            shape = list(type_of(new).shape)
            new.args, new.kwargs = with_argument(
                node, new.args, dict(new.kwargs), rule.shape_argument, shape
            )
        return new

    def _local(self, type_: TensorType) -> TensorType:
        """The type of a part's value."""
        shape = tuple(
            product(map(self._size, dim)) if dim else size
            for size, dim in zip(type_.shape, type_.layout.dims, strict=True)
        )
        return TensorType.whole(type_.dtype, shape)

    def _all_of_part(self, type_: TensorType) -> TensorType:
        """The type of a value inside a region, whose every size is counted by the part alone."""
        sizes = (bind_to(size, {_B: self.count}) for size in type_.shape)
        return TensorType.whole(type_.dtype, tuple(sizes))

    def _size(self, atom: Atom) -> Size:
        return bind_to(atom.size, {_B: self.count}) if atom.axes else atom.size

    def _numbers(self, node: fx.Node) -> fx.Node:
        """A range of which a part has a piece: it begins where the part does."""
        call, type_ = Call(node), type_of(node)
        (atom, *others) = type_.layout.dims[0]
        if others or not atom.axes:
            whole = self.builder.copy(node)
            whole.meta["type"] = TensorType.whole(type_.dtype, type_.shape)
            return self._cut(whole, type_)
        each = divide(atom.size, _B)
        assert each is not None
        first = 0 if node.meta.get("of_part") else self.first
        ends = [
            simplify(call["start"] + call["step"] * place * each)
            for place in (first, first + self.count)
        ]
        new = self.builder.copy(node)
        new.args, new.kwargs = new.args, dict(new.kwargs)
        for name, value in zip(("start", "end"), ends, strict=True):
            new.args, new.kwargs = with_argument(new, new.args, dict(new.kwargs), name, value)
        new.meta["type"] = self._local(type_)
        return new

    def _part(self, node: fx.Node) -> fx.Node:
        """A part's piece of what is the same for the whole batch."""
        return self._cut(self.builder.env[Call(node).operands[0]], type_of(node))

    def _cut(self, x: fx.Node, wanted: TensorType) -> fx.Node:
        sizes: list[Size] = []
        place, each = 0, simplify(1)
        for size, dim in zip(wanted.shape, wanted.layout.dims, strict=True):
            for atom in dim or (Atom(size),):
                if atom.axes:
                    place, each = len(sizes), divide(atom.size, _B) or 1
                sizes.append(atom.size)
        opened = TensorType.whole(wanted.dtype, tuple(sizes))
        x = self._reshaped(x, opened)
        cut = replace(
            opened, shape=(*sizes[:place], simplify(self.count * each), *sizes[place + 1 :])
        )
        x = self.builder.call(
            aten.slice.Tensor,
            (x, place, simplify(self.first * each), simplify((self.first + self.count) * each)),
            cut, why="the sequences of this part",
        )
        return self._reshaped(x, self._local(wanted))

    def _reshaped(self, x: fx.Node, type_: TensorType) -> fx.Node:
        if type_of(x).shape == type_.shape:
            return x
        return self.builder.call(aten.reshape.default, (x, list(type_.shape)), type_)

