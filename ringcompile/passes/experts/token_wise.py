"""Whether a region may run on some of the tokens alone: run whole and in parts, and compared.

It is a proof only if the sample reaches every bound in the region: see thresholds.py.

All data is random, so that a token which another one changes shows; where slots are counted, there
are too few for all tokens, so that some are dropped. Weights are random as well, and large ones
have rank one: then a product with them costs next to nothing, and no model is too large to check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ringcompile.ir.calls import map_values, target_name
from ringcompile.ir.expr import BATCH, FIRST, OWN, PART, SEQUENCE, bind, is_symbolic
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import error_at, type_of
from ringcompile.ir.program import Program, Weight
from ringcompile.ir.types import TensorType
from ringcompile.ops.bodies import body_of
from ringcompile.ops.experts import expert_linear
from ringcompile.passes.batch_layouts import rows_of
from ringcompile.passes.experts.regions import Region, grows
from ringcompile.passes.experts.thresholds import Thresholds
from ringcompile.passes.unpacked import Unpacked

_LENGTH = 14
# The sequences that a program is for: of a whole batch, or of a part that is dealt out of one.
_BATCHES = {BATCH: 2, PART: 2, FIRST: 0}
# Which tokens run alone: neighbours, and some from all over, as in a zigzag order.
_PARTS = ([*range(6)], [*range(6, 14)], [0, 1, 2, 9, 10], [3, 4, 13], [7])
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_LOW_PRECISION = 5e-2
_LARGE = 2**22
# How alike tokens are: enough that some experts are chosen by more of them than they take.
_SKEW = 1.5


class _UnknownError(Exception):
    """The region reads something for which random data means nothing."""


@dataclass(frozen=True)
class _RankOne:
    """A large weight [.., A, B] as the product of [.., A, 1] and [.., 1, B]."""

    left: Tensor
    right: Tensor


@dataclass
class TokenWise:
    """Checks regions of a program; layers that are alike are checked once."""

    program: Program
    known: dict[Any, Any] = field(default_factory=dict)

    def holds(self, region: Region) -> bool:
        """Whether tokens do not change each other, or only by the slots that they take.

        Capacity that is counted by each rank alone needs no check: it changes the result, as the
        user asked for.

        Raises:
            RingCompileError: the user declared it token-wise, and it is not.
        """
        if region.local:
            return True
        nodes = [node for node in self.program.graph.nodes if node in region.nodes]
        key = self._structure(nodes, region)
        if key not in self.known:
            self.known[key] = self._why_not(nodes, region)
        reason = self.known[key]
        if region.declared and reason:
            raise error_at(
                nodes[0],
                f"a function declared token-wise {reason}",
                hint="leave out the declaration; the function is then compiled op by op",
            )
        return not reason

    def holds_by_rows(self, region: Region) -> bool:
        """Whether each sequence of a batch gives the same alone; numbers of sequences would not.

        Only of a region that `holds`: what is counted by each part alone needs no check.
        """
        if region.local:
            return True
        nodes = [node for node in self.program.graph.nodes if node in region.nodes]
        key = ("rows", self._structure(nodes, region))
        if key not in self.known:
            self.known[key] = self._same_by_rows(nodes, region)
        return bool(self.known[key])

    def _same_by_rows(self, nodes: list[fx.Node], region: Region) -> bool:
        run = _Run(self.program, region)
        try:
            whole = run.whole(nodes)
            parts = [run.row(nodes, row) for row in range(_BATCHES[BATCH])]
            return all(
                _alike(part[node], _row(whole[node], node, row), whole[node])
                for row, part in enumerate(parts) for node in region.leaving
            )
        except (_UnknownError, RuntimeError, IndexError, ValueError, TypeError):
            return False

    def _structure(self, nodes: list[fx.Node], region: Region) -> Any:
        """Equal for regions that compute the same of their operands."""
        index: dict[fx.Node, int] = {}

        def named(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return f"%{index.setdefault(value, len(index))}: {value.meta['type']}"
            return str(value)

        texts = [
            (str(node.target), str(map_values((node.args, dict(node.kwargs)), named)), named(node))
            for node in nodes
        ]
        ends = [[named(node) for node in part] for part in (region.entering, region.leaving)]
        return str((texts, ends, region.slots))

    def _why_not(self, nodes: list[fx.Node], region: Region) -> str:
        """Why it does not hold; empty if it does."""
        run = _Run(self.program, region)
        try:
            whole = run.whole(nodes)
            same = all(
                _close(run.part(whole, nodes, part), whole, region.leaving, part)
                for part in _PARTS
            )
        except (_UnknownError, RuntimeError, IndexError, ValueError, TypeError):
            same = False
        if not same:
            return "is not token-wise: run on a part of the tokens, it gives different results"
        return "" if run.thresholds.reached else (
            "cannot be shown to be token-wise: it compares a count or rank of tokens with a "
            f"constant that {_LENGTH} tokens do not reach, such as a capacity that does not grow "
            "with the sequence"
        )


def _close(
    part: Mapping[fx.Node, Any],
    whole: Mapping[fx.Node, Any],
    leaving: Mapping[fx.Node, Layout],
    tokens: list[int],
) -> bool:
    for node, layout in leaving.items():
        if not _alike(part[node], _taken(whole[node], layout, tokens), whole[node]):
            return False
    return True


def _alike(found: Tensor, expected: Tensor, whole: Tensor) -> bool:
    """Whether a part has the values expected of it, as far as the size of the whole tells."""
    if found.shape != expected.shape:
        return False
    scale = float(whole.abs().max()) or 1.0
    limit = _TOLERANCE.get(found.dtype, _LOW_PRECISION) * scale
    return float((found - expected).abs().max()) <= limit


def _row(x: Tensor, node: fx.Node, row: int) -> Tensor:
    """A sequence's piece of a value, as a batch is dealt out; all of what no sequence has."""
    dims = [dim for dim, atoms in enumerate(rows_of(node).dims) if atoms]
    if not dims:
        return x
    each = x.shape[dims[0]] // _BATCHES[BATCH]
    return x.narrow(dims[0], row * each, each)


def _taken(x: Tensor, layout: Layout, tokens: list[int]) -> Tensor:
    """Some of the tokens of a tensor in which they are the split atom of one dim."""
    dim = next(i for i, atoms in enumerate(layout.dims) if atoms)
    atoms = layout.dims[dim]
    where = next(i for i, atom in enumerate(atoms) if atom.axes)
    sizes = [-1 if atom.axes else int(bind(atom.size, _BATCHES)) for atom in atoms]
    opened = x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])
    picked = opened.index_select(dim + where, torch.tensor(tokens))
    return picked.flatten(dim, dim + len(atoms) - 1)


class _Run:
    """Runs a region's nodes, on random data for what they read from outside."""

    def __init__(self, program: Program, region: Region) -> None:
        self.program, self.region = program, region
        self.generator = torch.Generator().manual_seed(0)
        self.outside: dict[fx.Node, Any] = {}
        self.unpacked = Unpacked(lambda node: node.name in program.weights)
        self.lengths = {SEQUENCE: _LENGTH - region.prefix, **_BATCHES}
        self.thresholds = Thresholds(grows, frozenset(region.counted))

    def whole(self, nodes: list[fx.Node]) -> dict[fx.Node, Any]:
        """All values, for all tokens."""
        values: dict[fx.Node, Any] = {}
        for node in nodes:
            values[node] = self._call(node, values, lambda size: size, self.lengths)
            self._note(node, values)
        return values

    def part(
        self, whole: Mapping[fx.Node, Any], nodes: list[fx.Node], tokens: list[int]
    ) -> dict[fx.Node, Any]:
        """All values for some tokens alone; what is counted over all tokens is taken from all."""
        taken = {
            node: _taken(self._outer(node), layout, tokens)
            for node, layout in self.region.entering.items()
        }
        counted = {
            node: _taken(whole[node], layout, tokens)
            for node, layout in self.region.counted.items()
        }
        lengths = {**self.lengths, OWN: len(tokens)}
        values: dict[fx.Node, Any] = dict(taken)
        for node in nodes:
            made = self._call(node, values, self.region.own, lengths)
            values[node] = counted.get(node, made)
            self._note(node, values)
        return values

    def row(self, nodes: list[fx.Node], row: int) -> dict[fx.Node, Any]:
        """All values for one sequence of the batch alone."""
        values: dict[fx.Node, Any] = {}
        for node in nodes:
            for operand in node.all_input_nodes:
                if operand not in values:
                    x = self._outer(operand)
                    values[operand] = _row(x, operand, row) if torch.is_tensor(x) else x
            values[node] = self._call(
                node, values, lambda size: size, {**self.lengths, BATCH: 1, PART: 1}
            )
        return values

    def _note(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        given = {n: values[n] if n in values else self._outer(n) for n in node.all_input_nodes}
        self.thresholds.note(node, given, values[node])

    def _call(
        self,
        node: fx.Node,
        values: Mapping[fx.Node, Any],
        own: Callable[[Any], Any],
        lengths: dict[str, int],
    ) -> Any:
        def filled(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return values[value] if value in values else self._outer(value)
            return bind(own(value), lengths) if is_symbolic(value) else value

        args, kwargs = map_values((list(node.args), dict(node.kwargs)), filled)
        thin = _THIN.get(target_name(node.target))
        if thin is not None and len(args) > 1 and isinstance(args[-1], _RankOne):
            return thin(*args, **kwargs)
        args, kwargs = map_values((args, kwargs), _dense)
        return body_of(node.target)(*args, **kwargs)

    def _outer(self, node: fx.Node) -> Any:
        """A value from outside: random features, weights, and what is computed of these."""
        if node not in self.outside:
            self.outside[node] = self._made(node)
        return self.outside[node]

    def _made(self, node: fx.Node) -> Any:
        if node in self.region.entering:
            return self._random(node)
        if node.op == "call_function":
            if self._is_large_weight(node):
                return self._drawn(tuple(map(int, type_of(node).shape)), type_of(node).dtype)
            return self._call(node, {}, lambda size: size, self.lengths)
        if node.name in self.program.weights:
            return self._weight(self.program.weights[node.name])
        return self._random(node)

    def _random(self, node: fx.Node) -> Tensor:
        type_ = type_of(node)
        if not type_.dtype.is_floating_point:
            raise _UnknownError
        shape = [int(bind(size, self.lengths)) for size in type_.shape]
        common = [1 if is_symbolic(size) else int(size) for size in type_.shape]
        own, shared = (torch.randn(s, generator=self.generator) for s in (shape, common))
        return (own + _SKEW * shared).to(type_.dtype)

    def _weight(self, weight: Weight) -> Tensor | _RankOne:
        if not weight.dtype.is_floating_point:  # a table of indices means something
            if self.program.source is None:
                raise _UnknownError
            return self.program.source(weight.name)
        return self._drawn(weight.shape, weight.dtype)

    def _is_large_weight(self, node: fx.Node) -> bool:
        """Whether a large matrix is unpacked from weights: it is drawn as such, not unpacked."""
        made = node.meta["type"]
        single = isinstance(made, TensorType) and made.dtype.is_floating_point
        return single and bool(self.unpacked.weights(node)) and math.prod(made.shape) > _LARGE

    def _drawn(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | _RankOne:
        """A random matrix, a large one of rank one."""
        scale = 1 / math.sqrt(shape[-1]) if shape else 1.0
        if math.prod(shape) <= _LARGE:
            return (self._normal(shape) * scale).to(dtype)
        *batch, rows, columns = shape
        left, right = self._normal((*batch, rows, 1)), self._normal((*batch, 1, columns)) * scale
        return _RankOne(left.to(dtype), right.to(dtype))

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def _dense(value: Any) -> Any:
    return value.left @ value.right if isinstance(value, _RankOne) else value


def _matmul(x: Tensor, weight: _RankOne) -> Tensor:
    return x @ weight.left @ weight.right


def _linear(x: Tensor, weight: _RankOne) -> Tensor:
    return F.linear(F.linear(x, weight.right), weight.left)


def _expert_linear(
    x: Tensor, expert: Tensor, weight: _RankOne, *, transposed: bool = False
) -> Tensor:
    first, second = weight.right, weight.left
    if transposed:
        first, second = second, first
    inner = expert_linear(x, expert, first, transposed=transposed)
    return expert_linear(inner, expert, second, transposed=transposed)


# Products of which the last operand may be a weight of rank one.
_THIN: dict[str, Callable[..., Tensor]] = {
    "aten.bmm.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.matmul.default": _matmul,
    "aten.linear.default": _linear,
    "ringcompile.expert_linear.default": _expert_linear,
}
