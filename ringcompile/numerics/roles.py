"""What each input of a model is for, read off the graph: an index, a mask, a bias, a number.

An input is followed forward through ops that keep its values (views, casts, a number added, a
clamp) to the ops that use it. An index into a table has as many values as the table has rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ringcompile.ir.expr import Size, of_tokens
from ringcompile.ir.nodes import results_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType

INDEX, MASK, PAIRS, POSITIONS, SMALL, NUMBERS = (
    "index", "mask", "pairs", "positions", "small", "numbers"
)
_KEEPING = frozenset({
    "aten.reshape.default", "aten.permute.default", "aten.slice.Tensor", "aten.select.int",
    "aten.expand.default", "aten.clamp.default", "aten.clamp_min.default",
    "aten.clamp_max.default", "aten.flip.default", "aten.roll.default",
    "aten.constant_pad_nd.default", "aten.cat.default", "ringcompile.redistribute.default",
    "ringcompile.tokenwise.default",
    "aten.masked_fill.Scalar", "aten.where.self", "aten.where.ScalarSelf",
    "aten.where.ScalarOther", "aten.maximum.default", "aten.minimum.default",
})
_COMPARED = frozenset({"aten.eq.Scalar", "aten.ne.Scalar"})
_ANGLES = frozenset({"aten.cos.default", "aten.sin.default", "aten.polar.default"})
_TURNING = frozenset({
    "aten.mul.Tensor", "aten.matmul.default", "aten.outer.default", "aten.einsum.default",
    "aten.cat.default", "aten.bmm.default",
})


@dataclass(frozen=True)
class Role:
    """What an input is for.

    Attributes:
        kind: "index" (rows of tables), "mask" (which tokens are real), "pairs" (which queries see
            which keys, or by how much), "positions", "small" (documents, types) or "numbers".
        rows: of an index, the rows of the smallest thing that it indexes; may depend on `s`.
        shift: what is added to an index before it is used.
        values: numbers that the input is compared with, such as the id of the padding token.
    """

    kind: str
    rows: Size | None = None
    shift: int = 0
    values: tuple[int, ...] = ()


@dataclass
class _Found:
    """What is met on the way forward from one input."""

    indexed: list[tuple[Size, int]] = field(default_factory=list)
    compared: set[int] = field(default_factory=set)
    angles: bool = False


def roles_of(program: Program) -> dict[str, Role]:
    """The role of every input, by name."""
    found: dict[str, _Found] = {spec.name: _Found() for spec in program.inputs}
    for node in program.graph.nodes:
        name = program.placeholders.get(node.name) if node.op == "placeholder" else None
        if name is not None:
            _follow(node, found[name])
    return {spec.name: _role(spec.name, spec.type, found[spec.name]) for spec in program.inputs}


def _role(name: str, type_: TensorType, found: _Found) -> Role:
    values = tuple(sorted(found.compared))
    pairs = len(type_.shape) > 2 and type_.shape[-1] == type_.shape[-2] and (
        of_tokens(type_.shape[-1])
    )
    if pairs:
        return Role(PAIRS)
    if type_.dtype == torch.bool or "mask" in name:
        return Role(MASK)
    if type_.dtype.is_floating_point or type_.dtype.is_complex:
        return Role(NUMBERS)
    if found.indexed:
        rows, shift = min(found.indexed, key=_smallness)
        return Role(POSITIONS if "position" in name else INDEX, rows, shift, values)
    if found.angles or "position" in name:
        return Role(POSITIONS)
    return Role(SMALL, values=values)


def _smallness(entry: tuple[Size, int]) -> tuple[bool, int]:
    """Numbers before lengths, then fewer rows first."""
    rows, shift = entry
    return (not isinstance(rows, int), rows - shift if isinstance(rows, int) else 0)


def _follow(start: fx.Node, found: _Found) -> None:
    """Note every use of a value, and of what still holds the same numbers."""
    queue: list[tuple[fx.Node, int, bool]] = [(start, 0, False)]
    seen = {start}
    while queue:
        node, shift, turned = queue.pop()
        for user in node.users:
            name = str(user.target)
            found.angles |= name in _ANGLES
            if not turned:
                found.indexed.extend((rows, shift) for rows in _rows(user, node))
                if name in _COMPARED and isinstance(user.args[1], int):
                    found.compared.add(user.args[1] - shift)
            onward = _onward(user, node, shift, turned)
            if onward is not None and user not in seen:
                seen.add(user)
                queue.append((user, *onward))


def _onward(user: fx.Node, node: fx.Node, shift: int, turned: bool) -> tuple[int, bool] | None:
    """How a user's value goes on from a node's: with which shift, and whether as an angle."""
    name = str(user.target)
    if user.op != "call_function" or not isinstance(user.meta.get("type"), TensorType):
        return None
    if name == "aten.to.dtype":
        return shift, turned or type_of(user).dtype.is_floating_point
    if name in ("aten.add.Scalar", "aten.sub.Scalar", "aten.add.Tensor", "aten.sub.Tensor"):
        amount = user.args[1]
        if isinstance(amount, int) and user.args[0] is node and not user.kwargs:
            return shift + (amount if ".add." in name else -amount), turned
        return None
    if turned:
        return (shift, True) if name in _TURNING or name in _KEEPING else None
    if name in _TURNING and name != "aten.cat.default":
        return (shift, True) if type_of(user).dtype.is_floating_point else None
    return (shift, False) if name in _KEEPING else None


def _rows(user: fx.Node, node: fx.Node) -> Iterator[Size]:
    """The sizes of what a node's values index in one user."""
    rule = _INDEXING.get(str(user.target))
    if rule is not None:
        yield from rule(user, node)


def _of_table(user: fx.Node, node: fx.Node) -> Iterator[Size]:
    if user.args[1] is node:
        yield results_of(user.args[0])[0].shape[0]  # type: ignore[arg-type]


def _along_dim(user: fx.Node, node: fx.Node) -> Iterator[Size]:
    if user.args[2] is node:
        yield results_of(user.args[0])[0].shape[user.args[1]]  # type: ignore[arg-type, index]


def _one_hot(user: fx.Node, node: fx.Node) -> Iterator[Size]:
    classes = user.args[1] if len(user.args) > 1 else -1
    if isinstance(classes, int) and classes > 0:
        yield classes


def _by_index(user: fx.Node, node: fx.Node) -> Iterator[Size]:
    places: Any = user.args[1]
    if type_of(node).dtype == torch.bool:
        return
    for dim, index in enumerate(places):
        if index is node:
            yield results_of(user.args[0])[0].shape[dim]  # type: ignore[arg-type]


_INDEXING: dict[str, Callable[[fx.Node, fx.Node], Iterator[Size]]] = {
    "aten.embedding.default": _of_table,
    "aten.gather.default": _along_dim,
    "aten.index_select.default": _along_dim,
    "aten.one_hot.default": _one_hot,
    "aten.index.Tensor": _by_index,
}
