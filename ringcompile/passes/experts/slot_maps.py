"""Buffers of slots, followed by the number of the row in each slot instead of by its features.

A model puts rows into a buffer of zeros, looks at parts of it, and reads rows of it again. The same
ops on a buffer without the features, which holds the numbers of the rows, tell which row is where:
nothing has to be known of how a model counts slots, which tokens it drops, or how it writes the
address of a slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, equal, product
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import results_of, type_of
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder

aten = torch.ops.aten


@dataclass(frozen=True)
class Put:
    """Rows that are put into a buffer of zeros.

    Attributes:
        rows: [..., D].
        at: an index for each dim of the buffer but the last, each [...].
        shape: of the buffer, without D.
        seen: the views of the buffer that lead to what enters the experts, in order.
    """

    rows: fx.Node
    at: tuple[fx.Node, ...]
    shape: tuple[Size, ...]
    seen: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Read:
    """Rows that are read from the experts' results.

    Attributes:
        node: gives them.
        at: an index for each dim of what is read from but the last.
        seen: the views of the results that lead there, in order.
    """

    node: fx.Node
    at: tuple[fx.Node, ...]
    seen: tuple[fx.Node, ...]


def is_whole(node: fx.Node) -> bool:
    """Whether every rank has all of a value, and no term of a sum."""
    return all(type_.layout == Layout.whole(len(type_.shape)) for type_ in results_of(node))


# -- rows that are put into slots -----------------------------------------------------------------


def put_into(buffer: fx.Node) -> Put | None:
    """Which rows a buffer [E, C, D] holds; None if it is made in an unknown way."""
    seen: list[fx.Node] = []
    node = buffer
    while _sees_rows(node):
        seen.insert(0, node)
        node = node.all_input_nodes[0]
    find = _PUTS.get(node.target)
    found = find(Call(node)) if find is not None and is_whole(node) else None
    if found is None:
        return None
    base, rows, at = found
    shape, lead = type_of(node).shape[:-1], type_of(rows).shape[:-1]
    whole_rows = len(at) == len(shape) and all(
        type_of(x).shape in (lead, (*lead, 1)) for x in at
    )
    if not whole_rows or not _is_zeros(base) or not all(map(is_whole, (rows, *at))):
        return None
    return Put(rows, at, shape, tuple(seen))


def _sees_rows(node: fx.Node) -> bool:
    """Whether a node is a view of the rows of another buffer, features as they are."""
    if node.target not in (aten.slice.Tensor, aten.reshape.default) or not is_whole(node):
        return False
    call, shape = Call(node), type_of(node).shape
    source = type_of(call["self"]).shape
    rows_only = node.target is aten.reshape.default or call["dim"] % len(shape) < len(shape) - 1
    return rows_only and len(shape) > 1 and source[-1:] == shape[-1:] and is_whole(call["self"])


_Found = tuple[fx.Node, fx.Node, tuple[fx.Node, ...]]


def _index_put(call: Call) -> _Found | None:
    if call["accumulate"] or None in call["indices"]:
        return None
    return call["self"], call["values"], tuple(call["indices"])


def _index_copy(call: Call) -> _Found | None:
    return (call["self"], call["source"], (call["index"],)) if call["dim"] == 0 else None


def _scatter(call: Call) -> _Found | None:
    index = _of_rows(call["index"])
    if index is None or call["dim"] != 0 or type_of(call["src"]).shape != type_of(
            call["index"]).shape:
        return None
    return call["self"], call["src"], (index,)


_PUTS: dict[Any, Callable[[Call], _Found | None]] = {
    aten.index_put.default: _index_put,
    aten.index_copy.default: _index_copy,
    aten.scatter.src: _scatter,
}


def _of_rows(index: fx.Node) -> fx.Node | None:
    """[N] or [N, 1] of an index [N, D] that is the same for all features of a row."""
    if index.target is not aten.expand.default:
        return None
    source = Call(index)["self"]
    shape = type_of(source).shape
    return source if len(shape) == 2 and equal(shape[1], 1) else None


def _is_zeros(node: fx.Node) -> bool:
    return node.target is aten.full.default and Call(node)["fill_value"] == 0


# -- rows that are read from slots ----------------------------------------------------------------


def reads_of(results: fx.Node) -> list[Read] | None:
    """All that is read of experts' results [E, C, D]; None if something reads other than rows."""
    found: list[Read] = []
    work: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(results, ())]
    while work:
        node, seen = work.pop()
        for user in node.users:
            if _sees_rows(user) or _adds_zeros(user, node):
                work.append((user, (*seen, user)))
                continue
            read = _READS.get(user.target)
            at = read(Call(user), node) if read is not None and is_whole(user) else None
            if at is None or len(at) != len(type_of(node).shape) - 1 or not all(map(is_whole, at)):
                return None
            found.append(Read(user, at, seen))
    return found


def _adds_zeros(user: fx.Node, rows: fx.Node) -> bool:
    """Whether rows of zeros are put behind or before others, where what was dropped is read."""
    if user.target is not aten.cat.default or not is_whole(user):
        return False
    call, rank = Call(user), len(type_of(user).shape)
    others = [x for x in call["tensors"] if x is not rows]
    along_rows = call["dim"] % rank < rank - 1
    return along_rows and len(others) < len(call["tensors"]) and all(map(_is_zeros, others))


def _index(call: Call, rows: fx.Node) -> tuple[fx.Node, ...] | None:
    return None if None in call["indices"] or rows in call["indices"] else tuple(call["indices"])


def _index_select(call: Call, rows: fx.Node) -> tuple[fx.Node, ...] | None:
    return (call["index"],) if call["dim"] == 0 else None


def _gather(call: Call, rows: fx.Node) -> tuple[fx.Node, ...] | None:
    index = _of_rows(call["index"])
    same = type_of(call["index"]).shape[1:] == type_of(rows).shape[1:]
    return (index,) if index is not None and call["dim"] == 0 and same else None


_READS: dict[Any, Callable[[Call, fx.Node], tuple[fx.Node, ...] | None]] = {
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
}


# -- the same on numbers of rows ------------------------------------------------------------------


@dataclass
class Numbers:
    """Writes what is done with rows for their numbers.

    Attributes:
        builder: of the new graph.
        none: the number that stands for a row of zeros.
    """

    builder: Builder
    none: Size

    def put(self, put: Put) -> fx.Node:
        """The number of the row in each slot of what enters the experts, [E, C]."""
        call = self.builder.call
        lead = type_of(put.rows).shape[:-1]
        count = product(lead)
        numbers = call(aten.arange.start_step, (0, count, 1), _whole((count,)), dtype=torch.int64)
        if len(lead) > 1:
            numbers = call(aten.reshape.default, (numbers, list(lead)), _whole(lead))
        at = [self._like(self.builder.env[x], lead) for x in put.at]
        made = call(
            aten.index_put.default, (self.full(put.shape), at, numbers), _whole(put.shape),
            why="which row is in which slot",
        )
        return self.seen(made, put.seen)

    def seen(self, numbers: fx.Node, views: tuple[fx.Node, ...]) -> fx.Node:
        """What views of rows do, done to their numbers."""
        for node in views:
            shape = type_of(node).shape[:-1]
            call = Call(node)
            args: tuple[Any, ...]
            if node.target is aten.cat.default:
                parts = [
                    self.full(type_of(x).shape[:-1]) if _is_zeros(x) else numbers
                    for x in call["tensors"]
                ]
                args = (parts, call["dim"] % len(type_of(node).shape))
            elif node.target is aten.slice.Tensor:
                dim = call["dim"] % len(type_of(node).shape)
                args = (numbers, dim, call["start"], call["end"], call["step"])
            else:
                args = (numbers, list(shape))
            numbers = self.builder.call(node.target, args, _whole(shape))
        return numbers

    def read(self, numbers: fx.Node, read: Read) -> fx.Node:
        """The numbers of the rows that are read, [...]."""
        lead = type_of(read.node).shape[:-1]
        at = [self._like(self.builder.env[x], lead) for x in read.at]
        return self.builder.call(
            aten.index.Tensor, (self.seen(numbers, read.seen), at), _whole(lead),
            why="which row is read",
        )

    def full(self, shape: tuple[Size, ...]) -> fx.Node:
        """No row anywhere."""
        return self.builder.call(
            aten.full.default, (list(shape), self.none), _whole(shape), dtype=torch.int64
        )

    def _like(self, index: fx.Node, lead: tuple[Size, ...]) -> fx.Node:
        """[N] of an index [N, 1]."""
        type_ = type_of(index)
        if len(type_.shape) <= len(lead):
            return index
        made = TensorType.whole(type_.dtype, lead)
        return self.builder.call(aten.reshape.default, (index, list(lead)), made)


def _whole(shape: tuple[Size, ...]) -> TensorType:
    return TensorType.whole(torch.int64, shape)
