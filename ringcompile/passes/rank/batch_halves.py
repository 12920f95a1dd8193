"""The axis `halves`: parts of a batch that know nothing of each other, so that they can overlap.

While one half waits for keys and values, the other can go through its matmuls. The halves share the
weights, and what does not depend on the batch is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from ringcompile.axes import HALVES
from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import symbols_in
from ringcompile.ir.expr import BATCH, PART, Size, coordinate, divide, is_symbolic, simplify, symbol
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import results_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder

aten = torch.ops.aten
_WHICH = coordinate(HALVES)
_SEQUENCES = frozenset({symbol(BATCH), symbol(PART)})


@dataclass
class BatchHalves:
    """How values of a program for one half of a batch lie in it.

    Attributes:
        program: of one rank; `halves` is a symbol in it.
        builder: of the program without `halves`.
    """

    program: Program
    builder: Builder
    axis: ClassVar[str] = HALVES
    suffix: ClassVar[str] = "half"

    def __post_init__(self) -> None:
        assert self.program.mesh is not None
        self.count = self.program.mesh.size(HALVES)
        self.sizes: dict[Size, Size] = {
            simplify(whole / self.count): whole for whole in _SEQUENCES
        }

    def changes(self) -> dict[str, Any]:
        """What else of a program is another one without `halves`."""
        low, high = self.program.batch_range
        mesh = self.program.mesh
        assert mesh is not None
        dealt = mesh.size("dp") * mesh.size("pp") > 1
        return {
            "batch_range": (max(low, self.count), high),
            "returns": self.program.returns if dealt else (),
        }

    def varies(self, node: fx.Node) -> bool:
        """Whether a node by itself, whatever it reads, is another one for each half.

        A value with sequences among its dims is, so that both ends of a transfer agree.
        """
        if node.op == "placeholder":
            return node.name in self.program.placeholders and self._dim(node) is not None
        return _WHICH in symbols_in(node) or ("type" in node.meta and any(
            is_symbolic(size) and not _SEQUENCES.isdisjoint(size.free_symbols)
            for type_ in results_of(node) for size in type_.shape
        ))

    def joins(self, node: fx.Node) -> bool:
        """Whether a node makes one value of all halves: none does."""
        return False

    def others(self, node: fx.Node, piece: int) -> Iterator[tuple[fx.Node, int]]:
        """What a node of a half reads of the other one: nothing."""
        return iter(())

    def at(self, size: Size, piece: int) -> Size:
        """An expression for one half."""
        if not is_symbolic(size):
            return size
        return simplify(size.xreplace({_WHICH: sympy.Integer(piece)}))

    def inside(self, type_: TensorType, piece: int) -> TensorType:
        """The type of what one half has of a value."""
        return type_

    def outside(self, type_: TensorType) -> TensorType:
        """The type of an input of the whole batch."""
        return replace(type_, shape=tuple(self.sizes.get(size, size) for size in type_.shape))

    def part(self, whole: fx.Node, node: fx.Node, piece: int, name: str) -> fx.Node:
        """What a half takes of an input."""
        dim = self._dim(node)
        assert dim is not None
        size: Any = type_of(node).shape[dim]
        ends = [simplify(size * place) for place in (piece, piece + 1)]
        return self.builder.call(
            aten.slice.Tensor, (whole, dim, *ends), type_of(node), name=name,
            why="half of the batch",
        )

    def _dim(self, node: fx.Node) -> int | None:
        """The dim of an input that is the sequences of a half."""
        shape = type_of(node).shape
        return next((dim for dim, size in enumerate(shape) if size in self.sizes), None)

    def whole(self, parts: Sequence[fx.Node], node: fx.Node) -> fx.Node:
        """An output of both halves along its batch dim; what has none is the same for both."""
        given = self.program.returns[self.program.outputs.index(node)]
        dims = [dim for dim, atoms in enumerate(given.layout.dims) if atoms]
        if not dims:
            return parts[0]
        if divide(given.layout.dims[dims[0]][0].size, symbol(BATCH)) is None:
            raise RingCompileError(
                f"the sequences of the output {TensorType.whole(given.dtype, given.shape)} are not "
                "side by side, so that halves cannot be joined",
                hint=f"leave out {HALVES} (--overlap {HALVES})",
            )
        return self.builder.call(
            aten.cat.default, (list(parts), dims[0]), self._grown(type_of(node), dims[0]),
            why="both halves",
        )

    def _grown(self, type_: TensorType, dim: int) -> TensorType:
        """The type of both halves of a value, of which the sequences come first in a dim."""
        size: Any = type_.shape[dim]
        shape = (*type_.shape[:dim], simplify(size * self.count), *type_.shape[dim + 1 :])
        atoms = type_.layout.dims[dim]
        if atoms:
            first: Any = atoms[0].size
            atoms = (replace(atoms[0], size=simplify(first * self.count)), *atoms[1:])
        dims = (*type_.layout.dims[:dim], atoms, *type_.layout.dims[dim + 1 :])
        return TensorType(type_.dtype, shape, Layout(dims, type_.layout.partial))

    def write(
        self, node: fx.Node, piece: int, value: Callable[[fx.Node, int], fx.Node], name: str
    ) -> fx.Node | None:
        """None: every node is copied as it is."""
        return None
