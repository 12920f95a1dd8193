"""Writes a region: each rank slices its own tokens out, runs the nodes on them, and pads again.

Inside, types are those of one device that has `m` tokens, and no layout splits anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from ringcompile.ir.calls import map_values, replace_operands
from ringcompile.ir.calls import operands as operands_of
from ringcompile.ir.expr import OWN, Size, product, symbol
from ringcompile.ir.layout import WHOLE, DimLayout, Layout
from ringcompile.ir.nodes import results_of, type_of
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder
from ringcompile.passes.experts.regions import Region, is_mark

aten = torch.ops.aten
_M = symbol(OWN)


@dataclass
class OwnTokens:
    """The nodes of one region in the graph that is written.

    Attributes:
        region: what is written.
        builder: of the graph.
        request: an outer value by its old node, in a wanted layout.
        share: the tokens that a rank holds, padding included.
    """

    region: Region
    builder: Builder
    request: Callable[[fx.Node, Layout], fx.Node]
    share: Size
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)
    entered: dict[fx.Node, fx.Node] = field(default_factory=dict)
    left: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def write(self, node: fx.Node) -> None:
        """The node, on this rank's own tokens."""
        operands = [self._inside(n) for n in operands_of(node)]
        if is_mark(node):
            self.made[node] = operands[0]
            return
        args, kwargs = map_values(replace_operands(node, operands), self.region.own)
        types = tuple(self._own(type_) for type_ in results_of(node))
        single = isinstance(node.meta["type"], TensorType)
        new = self.builder.call(node.target, args, types[0] if single else types, **kwargs)
        self.made[node] = new

    def leave(self, node: fx.Node) -> fx.Node:
        """A value of the region for use outside: the padding is back."""
        if node not in self.left:
            layout = self.region.leaving[node]
            self.left[node] = self._moved(
                self.made[node], type_of(node).with_layout(layout), entering=False
            )
        return self.left[node]

    def _own(self, type_: TensorType) -> TensorType:
        shape = tuple(self.region.own(size) for size in type_.shape)
        return TensorType.whole(type_.dtype, shape)

    def _inside(self, node: fx.Node) -> fx.Node:
        if node in self.made and node not in self.region.counted:
            return self.made[node]
        if node not in self.entered:
            self.entered[node] = self._enter(node)
        return self.entered[node]

    def _enter(self, node: fx.Node) -> fx.Node:
        layout = self.region.entering.get(node) or self.region.counted.get(node)
        if layout is None:  # a weight, or what is the same for all tokens
            return self.request(node, Layout.whole(len(type_of(node).shape)))
        outer = self.request(node, layout)
        return self._moved(outer, type_of(node).with_layout(layout), entering=True)

    def _moved(self, x: fx.Node, outer: TensorType, *, entering: bool) -> fx.Node:
        """Padding cut off (entering) or put back, in the one dim that is split.

        Args:
            x: the value to move.
            outer: the global type of the value outside.
            entering: the direction.
        """
        dim = next(i for i, atoms in enumerate(outer.layout.dims) if atoms)
        atoms = outer.layout.dims[dim]
        where = next(i for i, atom in enumerate(atoms) if atom.axes)
        opened = _opened(outer, dim, atoms)
        sizes = [atom.size for atom in atoms]
        own = TensorType.whole(
            outer.dtype,
            (*outer.shape[:dim], *sizes[:where], _M, *sizes[where + 1 :], *outer.shape[dim + 1 :]),
        )
        place = dim + where
        if entering:
            x = self._reshape(x, opened)
            x = self.builder.call(
                op("own_tokens"), (x,), own, dim=place, size=_M, why="this rank's own tokens"
            )
            flat = product([*sizes[:where], _M, *sizes[where + 1 :]])
            return self._reshape(
                x, TensorType.whole(outer.dtype, (*outer.shape[:dim], flat, *outer.shape[dim + 1:]))
            )
        x = self._reshape(x, own)
        x = self.builder.call(
            op("padded_tokens"), (x,), opened, dim=place, size=self.share, why="padding"
        )
        return self._reshape(x, outer)

    def _reshape(self, x: fx.Node, type_: TensorType) -> fx.Node:
        if type_of(x).shape == type_.shape:
            return x
        return self.builder.call(aten.reshape.default, (x, list(type_.shape)), type_)


def _opened(type_: TensorType, dim: int, atoms: DimLayout) -> TensorType:
    """The type with each atom of the dim as a dim of its own."""
    shape = (*type_.shape[:dim], *(a.size for a in atoms), *type_.shape[dim + 1 :])
    apart = tuple((atom,) if atom.axes else WHOLE for atom in atoms)
    dims = (*type_.layout.dims[:dim], *apart, *type_.layout.dims[dim + 1 :])
    return replace(type_, shape=shape, layout=Layout(dims))
