"""What the writers of a program with a cache have in common: the graph, types and state.

Along time a value is either split, and then the program has it for the new tokens of a call (`s`),
or whole, and then it has an entry for every position that there may be (the capacity).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ringcompile.axes import KEEP_TOKENS, TIME
from ringcompile.ir.expr import (
    LOCAL,
    OWN,
    SEQUENCE,
    Size,
    is_symbolic,
    product,
    simplify,
    symbol,
)
from ringcompile.ir.layout import Atom, DimLayout, Layout, normalise
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.mesh import Mesh
from ringcompile.ops.slots import slots_of
from ringcompile.passes.base import Builder
from ringcompile.passes.carry.decode_features import Spread

aten = torch.ops.aten
NEW = symbol(SEQUENCE)


class Carrying:
    """A program with a cache while it is written.

    Attributes:
        program: placed along `time`.
        mesh: the parallel plan that the program with a cache is for.
        capacity: the tokens that a sequence may have in all.
        axes: those that the tokens of a cache lie along.
        ranks: how many ranks share a sequence.
        slots: how many tokens a rank may keep.
        helix: whether features lie along these axes too, behind attention.
        spread: how they do; see `decode_features`.
        builder: writes the graph.
        state: the kinds of what is kept, or told for a call, by placeholder.
    """

    def __init__(
        self, program: Program, mesh: Mesh, capacity: int, helix: bool = False
    ) -> None:
        assert program.sequence is not None
        self.program, self.mesh, self.capacity, self.helix = program, mesh, capacity, helix
        self.length = program.sequence.length
        self.axes = tuple(axis for axis in KEEP_TOKENS if mesh.size(axis) > 1)
        self.ranks = mesh.size(",".join(self.axes)) if self.axes else 1
        self.slots = slots_of(capacity, self.ranks)
        self.spread = Spread(mesh.size("tp"), self.axes, self.ranks)
        self.builder = Builder()
        self.state: dict[str, str] = {}
        self._kept: dict[str, fx.Node] = {}

    # -- types: a share of time is the new tokens, all of time is the capacity ---------------------

    def size(self, size: Size) -> Size:
        """A size of a value that is not split along time."""
        if not is_symbolic(size):
            return size
        known = {NEW: self.capacity, symbol(LOCAL): NEW, symbol(OWN): NEW}
        return simplify(size.xreplace({s: known[s] for s in size.free_symbols if s in known}))

    def type(self, type_: Any) -> Any:
        """The type, or types, of a value of the program placed along time."""
        if isinstance(type_, tuple):
            return tuple(map(self.type, type_))
        shape, dims = [], []
        for size, dim in zip(type_.shape, type_.layout.dims, strict=True):
            atoms = [self._atom(atom) for atom in dim] or [Atom(self.size(size))]
            shape.append(product(atom.size for atom in atoms))
            dims.append(normalise(atoms))
        partial = self.axes_of(type_.layout.partial)
        return TensorType(type_.dtype, tuple(shape), Layout(tuple(dims), partial))

    def axes_of(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """The axes of the parallel plan that stand for those of the placed program."""
        return self.spread.axes_of(axes) if self.helix else axes

    def _atom(self, atom: Atom) -> Atom:
        if TIME not in atom.axes:
            axes = self.axes_of(atom.axes)
            return Atom(self.size(atom.size), axes, atom.sequence, features=self.helix)
        return Atom(NEW, tuple(axis for axis in atom.axes if axis != TIME))

    # -- state -------------------------------------------------------------------------------------

    def keep(self, name: str, kind: str, type_: TensorType) -> fx.Node:
        """A placeholder for what a rank keeps, or is told, for every call; made once."""
        if name not in self._kept:
            self._kept[name] = self.builder.placeholder(name, type_)
            self.state[self._kept[name].name] = kind
        return self._kept[name]

    def of_call(self, kind: str, size: Size) -> fx.Node:
        """Positions, slots or places of this call, int64 [size]."""
        name = "used_places" if kind == "places" else f"new_{kind}"
        return self.keep(name, kind, TensorType.whole(torch.int64, (size,)))

    @property
    def positions(self) -> fx.Node:
        """The positions of the new tokens."""
        return self.of_call("positions", NEW)

    def reshaped(
        self, x: fx.Node, shape: tuple[Size, ...], dims: tuple[DimLayout, ...]
    ) -> fx.Node:
        """A value with the same entries in another shape."""
        type_ = TensorType(type_of(x).dtype, shape, Layout(dims))
        return self.builder.call(aten.reshape.default, (x, list(shape)), type_)


