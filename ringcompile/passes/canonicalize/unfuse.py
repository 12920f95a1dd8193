"""Products that are computed as one and taken apart again, as several: queries, keys and values.

The parts of a fused weight divide over ranks one by one: a rank needs some rows of each. So each
part becomes a weight of its own, a view of the whole in memory and a tensor of its own in files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call, replace_operands
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program, Weight, WeightSource
from ringcompile.ir.rules import FactorRule, find_rule
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class Unfuse(Pass):
    """Split a matmul with a fused weight, such as QKV, into one for each part of its result.

    y = linear(x, w)                    q = linear(x, w[0:a])
    q = slice(y, -1, 0, a)         ->   k = linear(x, w[a:b])
    k = slice(y, -1, a, b)
    """

    name: ClassVar[str] = "unfuse"

    def run(self, program: Program) -> Program:
        """Every product of a weight of which slices of the last dim are all that is read."""
        return _Unfuser(program).run()


@dataclass(frozen=True)
class Cut:
    """Some rows of a weight along one dim."""

    weight: str
    dim: int
    rows: slice

    @property
    def name(self) -> str:
        """`qkv.weight[0:4096]`, `c_attn.weight[:,0:768]`, `gate_up_proj[:,0:512:2]`."""
        step = f":{self.rows.step}" if self.rows.step > 1 else ""
        return f"{self.weight}[{':,' * self.dim}{self.rows.start}:{self.rows.stop}{step}]"


@dataclass(frozen=True)
class Cuts:
    """A weight source that also knows parts of what another one has."""

    source: WeightSource
    cuts: Mapping[str, Cut]

    def __call__(self, name: str) -> torch.Tensor:
        """The data of a weight or of a part of one; a part is a view."""
        cut = self.cuts.get(name)
        if cut is None:
            return self.source(name)
        return self.source(cut.weight)[(*(slice(None),) * cut.dim, cut.rows)]


@dataclass
class _Unfuser:
    program: Program
    builder: Builder = field(default_factory=Builder)
    cuts: dict[str, Cut] = field(default_factory=dict)
    made: dict[str, fx.Node] = field(default_factory=dict)

    def run(self) -> Program:
        self.weights = dict(self.program.weights)
        products = {node: _slices(node, self.program) for node in self.program.graph.nodes}
        parts = {part: (node, between) for node, found in products.items()
                 for part, between in found.items()}
        for node in self.program.graph.nodes:
            self.builder.at(node)
            if node in parts:
                self.builder.env[node] = self._part(node, *parts[node])
            elif not (products[node] or self._is_between(node, parts)):
                self.builder.env[node] = self.builder.copy(node)
        if not self.cuts:
            return self.program
        source = self.program.source
        return self.program.with_graph(
            self.builder.graph,
            weights=self.weights,
            source=None if source is None else Cuts(source, self.cuts),
        )

    @staticmethod
    def _is_between(node: fx.Node, parts: Mapping[fx.Node, tuple[fx.Node, fx.Node | None]]) -> bool:
        return any(between is node for _, between in parts.values())

    def _part(self, part: fx.Node, product: fx.Node, between: fx.Node | None) -> fx.Node:
        """The product of a part of the weight, in place of a slice of the whole product."""
        call = Call(product)
        start, step = Call(part)["start"] or 0, Call(part)["step"]
        type_ = type_of(part)
        length = type_.shape[-1]
        assert isinstance(length, int)
        rows = slice(start, start + length * step, step)
        operands = [
            self._operand(n, dim, rows)
            for n, dim in zip(call.operands, _cut_dims(product), strict=True)
        ]
        args, kwargs = replace_operands(product, operands)
        whole = type_of(product)
        shape = (*whole.shape[:-1], length)
        made = self.builder.call(
            product.target, args, replace(whole, shape=shape), why="a part of a fused product",
            **kwargs,
        )
        if between is None:
            return made
        return self.builder.call(aten.reshape.default, (made, list(type_.shape)), type_)

    def _operand(self, node: fx.Node, dim: int | None, rows: slice) -> fx.Node:
        if dim is None:
            found: fx.Node = self.builder.env[node]
            return found
        weight = self.weights[node.name]
        cut = Cut(weight.name, dim, rows)
        if cut.name not in self.made:
            count = len(range(weight.shape[dim])[rows])
            shape = (*weight.shape[:dim], count, *weight.shape[dim + 1 :])
            name = f"{node.name}_{rows.start}_{rows.stop}"
            new = self._placeholder(name, TensorType.whole(weight.dtype, shape))
            self.weights[new.name] = Weight(cut.name, weight.dtype, shape)
            self.cuts[cut.name], self.made[cut.name] = cut, new
        return self.made[cut.name]

    def _placeholder(self, name: str, type_: TensorType) -> fx.Node:
        """A new placeholder, in front of the graph."""
        graph = self.builder.graph
        with graph.inserting_before(next(iter(graph.nodes))):
            return self.builder.placeholder(name, type_)


def _slices(node: fx.Node, program: Program) -> dict[fx.Node, fx.Node | None]:
    """The slices that are all that is read of a product, each with a view between, if any."""
    dims = _cut_dims(node)
    cut = [n for n, dim in zip(Call(node).operands, dims, strict=True) if dim is not None] if (
        dims
    ) else []
    if not cut or not all(n.op == "placeholder" and n.name in program.weights for n in cut):
        return {}
    found: dict[fx.Node, fx.Node | None] = {}
    for user in node.users:
        if _cuts_last_dim(user):
            found[user] = None
        elif user.target is aten.reshape.default and (
            type_of(user).shape[-1] == type_of(node).shape[-1]
            and all(map(_cuts_last_dim, user.users))
        ):
            found.update(dict.fromkeys(user.users, user))
        else:
            return {}
    return found if _apart(found) else {}


def _apart(slices: Iterable[fx.Node]) -> bool:
    """Whether no two slices share an entry: as products of their own they would round it twice."""
    rows = {
        range(call["start"] or 0, (call["start"] or 0) + size * call["step"], call["step"])
        for call, size in ((Call(node), type_of(node).shape[-1]) for node in slices)
    }
    return len(set(chain(*rows))) == sum(map(len, rows))


def _cut_dims(node: fx.Node) -> list[int | None]:
    """For each operand of a product, the dim that the result's last dim comes from, if any."""
    rule = find_rule(node.target) if node.op == "call_function" else None
    if not isinstance(rule, FactorRule) or not rule.sums or len(type_of(node).shape) < 2:
        return []
    names = rule.factors(Call(node))
    last = names.output[-1]
    if last is None:
        return []
    return [dims.index(last) if last in dims else None for dims in names.operands]


def _cuts_last_dim(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    call = Call(node)
    last = len(type_of(node).shape) - 1
    length = type_of(node).shape[-1]
    return call["dim"] in (-1, last) and isinstance(length, int)
