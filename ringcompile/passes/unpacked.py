"""Values that are unpacked from weights alone, and why a share of one may need all of them.

A packed weight is cut where every op that unpacks it passes the cut on: between groups, between
bytes. Where one does not, each rank unpacks all of the weight and keeps its part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import prod

import torch
from torch import fx

from ringcompile.axes import size_of
from ringcompile.ir.calls import Call
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.rules import find_rule

aten = torch.ops.aten


@dataclass
class Unpacked:
    """Which values cheap ops make of weights alone: views, bytes with scales and zero points.

    Attributes:
        is_weight: whether a placeholder is a weight.
    """

    is_weight: Callable[[fx.Node], bool]
    _known: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)

    def weights(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The weights that a value is made of; () if something else is in it too."""
        if node not in self._known:
            self._known[node] = self._weights(node)
        return self._known[node]

    def _weights(self, node: fx.Node) -> tuple[fx.Node, ...]:
        if node.op == "placeholder":
            return (node,) if self.is_weight(node) else ()
        rule = find_rule(node.target)
        if rule is None or not rule.cheap:
            return ()
        found = [self.weights(n) for n in Call(node).operands if not _is_constant(n)]
        return tuple(dict.fromkeys(chain(*found))) if all(found) else ()


def _is_constant(node: fx.Node) -> bool:
    """Whether a value is made of nothing: numbers, positions."""
    return node.op == "call_function" and all(map(_is_constant, node.all_input_nodes))


def why_unpacked_whole(node: fx.Node) -> str:
    """What the op that made an unpacked value keeps together.

    Args:
        node: the value that is cut, because what it is made of cannot be.
    """
    call = Call(node)
    shapes = [list(type_of(operand).shape) for operand in call.operands]
    made = list(type_of(node).shape)
    if node.target in (aten.reshape.default, aten.view.dtype):
        return f"{shapes[0]} seen as {made} would be split inside a quantization group or a byte"
    name = str(node.target).split(".")[1]
    return f"{name} of {', '.join(map(str, shapes))} needs the whole dim that would be split"


def fitting_size(node: fx.Node, wanted: Layout, axis: str, axis_sizes: Mapping[str, int]) -> int:
    """The next size of an axis over which a value could be unpacked from shares; 1 if none is.

    Args:
        node: the unpacked value.
        wanted: its layout, in which the axis splits a dim.
        axis: the name of the axis.
        axis_sizes: of the mesh.

    Returns:
        the largest smaller size, or if there is none, the smallest larger one.
    """
    size = axis_sizes[axis]
    most = max(int(atom.size) for dim in wanted.dims for atom in dim if atom.axes)
    sizes = (*range(size - 1, 1, -1), *range(size + 1, most + 1))
    return next((n for n in sizes if _fits(node, wanted, {**axis_sizes, axis: n})), 1)


def _fits(node: fx.Node, wanted: Layout, axis_sizes: dict[str, int]) -> bool:
    """Whether all that a value is made of can be cut for it."""
    atoms = [atom for dim in wanted.dims for atom in dim if atom.axes]
    ways = [prod(size_of(axis_sizes, axis) for axis in atom.axes) for atom in atoms]
    if any(atom.size % way for atom, way in zip(atoms, ways, strict=True)):
        return False
    if node.op == "placeholder" or wanted.is_whole:
        return True
    rule = find_rule(node.target)
    wants = None if rule is None else rule.backward(Call(node), wanted, axis_sizes)
    return wants is not None and all(
        _fits(operand, want, axis_sizes)
        for operand, want in zip(Call(node).operands, wants, strict=True)
    )
