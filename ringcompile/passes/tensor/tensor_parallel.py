"""Tensor parallelism: heads and features over `tp`, found from layouts, not from names of layers.

Two requests set it off, and the op rules carry them to the weights (Megatron-LM, Shoeybi et al.,
2019, is what comes out):

- attention wants its heads split: pushed backwards through rotary embeddings and views this ends
  at the rows of the query, key and value weights; forwards, the output projection then sums over
  features that are split, and its result is a partial sum;
- a product that sums over features wants them split, if that splits the product that made them:
  the pair of an MLP, gated or not, or of experts.

A partial sum is passed on as long as what follows is linear in it, and then summed over the ranks
once. With `tp_sequence` that sum also divides the sequence over `tp`, and what lies between two
such layers runs on each rank's part of it (Korthikanti et al., 2022).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar

import torch
from torch import fx

from ringcompile.axes import base_axis
from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.expr import simplify
from ringcompile.ir.layout import WHOLE, Atom, DimLayout, Layout
from ringcompile.ir.nodes import layout_of, location_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import FactorRule, Placement, find_rule
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Pass
from ringcompile.passes.requests import REDISTRIBUTE, placeholders_first
from ringcompile.passes.sequence.attention_rows import (
    Rows,
    given_operands,
    head_counts,
    repeat_heads,
    repeats,
)
from ringcompile.passes.sequence.one_origin import with_one_origin
from ringcompile.passes.tensor.requests import TP, has_tp
from ringcompile.passes.tensor.vocabulary import VocabularySplits

aten = torch.ops.aten
_ATTENTION, _EXPERTS = op("attention"), op("expert_linear")
# So many times fewer features than a matmul makes are not worth a sum of what it makes.
_THIN = 4

@dataclass(frozen=True)
class TensorParallel(Pass):
    """Split heads and features over `tp`, in a program whose other layouts are chosen.

    h = linear(x, up)              ->  h = linear(x, up[F/tp, D])        [.., F/tp]
    y = linear(act(h), down, b)        p = linear(act(h), down[D, F/tp]) [.., D] partial(tp)
                                       y = redistribute(p) + b

    Attributes:
        mesh: the parallel plan.
        told: for weights of which the user says so, the dim that is split; None for whole.
        run_of_heads: so many neighbours on `tp` compute the same heads of attention, and part from
            each other behind it; see `decode_features`.
    """

    name: ClassVar[str] = "tensor-parallel"
    mesh: Mesh
    told: Mapping[str, int | None] = field(default_factory=dict)
    run_of_heads: int = 1

    def run(self, program: Program) -> Program:
        """Write the program anew, with `tp` added to its layouts."""
        if self.mesh.size(TP) == 1:
            return program
        return with_one_origin(
            lambda single: _Splitter(
                program, self.mesh, self.told, single, self.run_of_heads
            ).run()
        )


class _Splitter(VocabularySplits):
    def __init__(
        self,
        program: Program,
        mesh: Mesh,
        told: Mapping[str, int | None],
        single: frozenset[str],
        run_of_heads: int,
    ) -> None:
        super().__init__(program, mesh, told, single, run_of_heads)

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            self.builder.at(node)
            if node.op == "placeholder":
                self.builder.env[node] = self.builder.placeholder(node.name, type_of(node))
                if node.name in self.program.placeholders:
                    self.placeholders[node.name] = self.program.placeholders[node.name]
            elif node.op == "call_function":
                self.builder.env[node] = self._call(node)
            else:
                self.builder.output(tuple(self.summed(self.builder.env[n]) for n in node.args[0]))
        return self.program.with_graph(
            placeholders_first(self.builder.graph),
            placeholders=self.placeholders,
            weights=self.weights,
            mesh=self.mesh,
            notes=tuple(dict.fromkeys((*self.program.notes, *self.notes))),
        )

    def _call(self, node: fx.Node) -> fx.Node:
        if node.target is operator.getitem:
            source, index = node.args
            return self.pick(self.builder.env[source], index, node.name)  # type: ignore[index, arg-type]
        call = Call(node)
        operands = [self.builder.env[n] for n in call.operands]
        if node.target is _ATTENTION:
            return self._attention(node, call, operands)
        if node.target is REDISTRIBUTE:
            return self._redistribute(node, operands[0])
        found = (
            self._summing(node, call, operands)
            or self.vocabulary(node, call, operands)
            or self._as_told(node, call, operands)
        )
        return found or self._carried(node, call, operands)

    # -- what splits: attention's heads, summed features, the vocabulary ---------------------------

    def _attention(self, node: fx.Node, call: Call, operands: list[fx.Node]) -> fx.Node:
        """Attention on each rank's heads; whole where they do not divide."""
        old = [type_of(n).layout for n in call.operands]
        shared = old[0].dims[1][0].axes if old[0].dims[1] else ()
        split = self.size // self.run_of_heads
        ways = split * self.mesh.size(",".join(shared)) if shared else split
        queries, keys = head_counts(call)
        operands = list(map(self.summed, operands))
        if queries % ways:
            self.note(node, f"{queries} heads do not divide over {self._text(shared)}: each of "
                            "its ranks computes all of the attention")
            wanted = [layout.without(TP) for layout in old]
            return self.emit(
                node, [self.request(*pair) for pair in zip(operands, wanted, strict=True)],
                layout_of(node),
            )
        times = 1 if shared else repeats(queries, keys, ways)
        if times > 1:
            whole = [self.request(x, o) for x, o in zip(operands[1:3], old[1:3], strict=True)]
            operands[1:3] = [repeat_heads(self.builder, x, times) for x in whole]
        self.why = f"heads of {location_of(node).layer or 'attention'}"
        over = (TP,) if self.run_of_heads == 1 else (f"{TP}//{self.run_of_heads}",)
        heads = (*(over if split > 1 else ()), *shared)
        rows = Rows(old[0].dims[0], heads, old[0].dims[2], old[1].dims[2])
        placement = rows.placement(given_operands(call, operands))
        new = [self.obtain(n, w) for n, w in zip(operands, placement.operands, strict=True)]
        return self._parted(node, self.emit(node, new, placement.output), queries)

    def _parted(self, node: fx.Node, attended: fx.Node, queries: int) -> fx.Node:
        """Heads that neighbours on `tp` have in common, each of them with its own from here on."""
        if self.run_of_heads == 1:
            return attended
        self.why = f"heads of {location_of(node).layer or 'attention'}"
        heads: DimLayout = (Atom(queries, (TP,)),)
        if queries % self.size:
            heads = WHOLE
            self.note(node, f"{queries} heads do not divide over {self.ranks_text}: attention's "
                            "result is replicated, as it is with --decode simple")
        return self.request(attended, layout_of(attended).with_dim(1, heads))

    def _text(self, shared: Sequence[str]) -> str:
        return " x ".join(f"{axis}={self.mesh.size(axis)}" for axis in (TP, *shared))

    def _summing(self, node: fx.Node, call: Call, operands: list[fx.Node]) -> fx.Node | None:
        """A product over features that are split, or can be for nothing; a partial sum."""
        rule = find_rule(node.target)
        if not isinstance(rule, FactorRule) or not rule.sums:
            return None
        names = rule.factors(call)
        for factor in rule.contracted(names):
            where = [(i, dims.index(factor)) for i, dims in enumerate(names.operands)
                     if factor in dims]
            split = self._split_of(call, operands, where)
            if split is None or not self._is_product(call, rule, [i for i, _ in where]):
                continue
            self.why = f"features summed over in {location_of(node).layer or node.name}"
            wanted = [layout_of(n) for n in call.operands]
            for i, dim in where:
                wanted[i] = wanted[i].with_dim(dim, split)
            bias = rule.given_bias(call)
            if bias is not None:
                return self._with_bias(node, call, operands, wanted, bias)
            new = [self.obtain(n, w) for n, w in zip(operands, wanted, strict=True)]
            return self.emit(node, new, self._partial(node))
        return None

    @staticmethod
    def _partial(node: fx.Node) -> Layout:
        """The layout of a product that is a term of a sum over `tp`, beside what it was one of."""
        have = layout_of(node)
        return replace(have, partial=(*have.partial, TP))

    def _is_product(self, call: Call, rule: FactorRule, factors: Sequence[int]) -> bool:
        """Whether terms of the sum add up: of all that is not summed over only a bias is added."""
        if target_name(call.target) in ("aten.addmm.default", "aten.baddbmm.default") and (
            call["alpha"] != 1 or call["beta"] != 1
        ):
            return False
        bias = rule.given_bias(call)
        return all(
            i in factors or (bias is not None and x is call[bias]) or not _is_float(x)
            for i, x in enumerate(call.operands)
        )

    def _split_of(
        self, call: Call, operands: list[fx.Node], where: Sequence[tuple[int, int]]
    ) -> DimLayout | None:
        """How a summed factor is split, if one operand's is or can be by splitting its making."""
        for i, dim in where:
            have = layout_of(operands[i]).dims[dim]
            axes = [axis for atom in have for axis in atom.axes if base_axis(axis) == TP]
            if axes and not any(atom.sequence for atom in have) and self.size == prod(
                map(self.mesh.size, axes)
            ):
                return have
        size = type_of(call.operands[where[0][0]]).shape[where[0][1]]
        split = (Atom(size, (TP,)),)
        if not self.divides(split):
            return None
        if any(self._told(call.operands[i]) == dim for i, dim in where):
            return split
        if self._is_thin(call, where):
            return None
        for i, dim in where:
            old = layout_of(call.operands[i])
            if not old.dims[dim] and self.gains(operands[i], old.with_dim(dim, split)):
                return split
        return None

    @staticmethod
    def _is_thin(call: Call, where: Sequence[tuple[int, int]]) -> bool:
        """Whether far fewer features are summed over than come of it, as of a low-rank adapter.

        Splitting them would cost a sum over the ranks of all that come of it.
        """
        i, dim = where[0]
        summed, made = type_of(call.operands[i]).shape[dim], type_of(call.node).shape[-1:]
        sizes = (summed, *made)
        return all(isinstance(size, int) for size in sizes) and prod([_THIN, summed]) <= prod(made)

    def _with_bias(
        self, node: fx.Node, call: Call, operands: list[fx.Node], wanted: list[Layout], bias: str
    ) -> fx.Node:
        """The sum over the ranks, and then the bias, once."""
        place = call.operands.index(call[bias])
        new = [
            self.obtain(x, w)
            for i, (x, w) in enumerate(zip(operands, wanted, strict=True)) if i != place
        ]
        type_ = type_of(node).with_layout(self._partial(node))
        rule = find_rule(node.target)
        assert isinstance(rule, FactorRule)
        target = getattr(aten, rule.without_bias).default if rule.without_bias else node.target
        how = {}
        if target is _EXPERTS:
            how = {"transposed": call["transposed"]}
        total = self.summed(
            self.builder.call(target, tuple(new), type_, **how), layout_of(node).partial
        )
        added = operands[place]
        if target is _EXPERTS:
            expert = self.request(operands[1], Layout(layout_of(total).dims[:-1]))
            added = self._expert_bias(added, expert, type_of(total))
        return self.builder.call(
            aten.add.Tensor, (total, added), type_of(total), name=node.name, why="bias, once"
        )

    def _expert_bias(self, bias: fx.Node, expert: fx.Node, type_: TensorType) -> fx.Node:
        """The bias of each row's expert; 0 for a row that has none (see `ops.experts`)."""
        (count,) = local_shape(type_of(bias), self.mesh, self.sequence)[:1]
        index = type_of(expert)
        known = self.builder.call(aten.clamp.default, (expert, 0, simplify(count - 1)), index)
        rows = type_.with_layout(replace(type_.layout, partial=()))
        found = self.builder.call(aten.embedding.default, (bias, known), rows)
        none = self.builder.call(
            aten.ge.Scalar, (expert, count), replace(index, dtype=torch.bool)
        )
        shape = (*index.shape, 1)
        opened = TensorType(torch.bool, shape, Layout((*index.layout.dims, WHOLE)))
        none = self.builder.call(aten.reshape.default, (none, list(shape)), opened)
        return self.builder.call(aten.masked_fill.Scalar, (found, none, 0), type_)

    def _as_told(self, node: fx.Node, call: Call, operands: list[fx.Node]) -> fx.Node | None:
        """A product whose weight the user wants split along what it makes."""
        rule = find_rule(node.target)
        if not isinstance(rule, FactorRule) or not rule.sums:
            return None
        names = rule.factors(call)
        for i, x in enumerate(call.operands):
            dim = self._told(x)
            factor = None if dim is None else names.operands[i][dim]
            if factor is None or factor not in names.output:
                continue
            split = (Atom(type_of(x).shape[dim], (TP,)),)  # type: ignore[index]
            wanted = [layout_of(n) for n in call.operands]
            for j, dims in enumerate(names.operands):
                if factor in dims:
                    wanted[j] = wanted[j].with_dim(dims.index(factor), split)
            new = [self.obtain(self.summed(n), w) for n, w in zip(operands, wanted, strict=True)]
            output = layout_of(node).with_dim(names.output.index(factor), split)
            return self.emit(node, new, output)
        return None

    def _told(self, node: fx.Node) -> int | None:
        """The dim of a weight that the user wants split."""
        weight = self.program.weights.get(node.name)
        return None if weight is None else self.told.get(weight.name)

    # -- what follows ------------------------------------------------------------------------------

    def _redistribute(self, node: fx.Node, x: fx.Node) -> fx.Node:
        """A move along the sequence, with what is split over tp left so."""
        x = self.summed(x)
        wanted = self._moved(node, layout_of(x))
        if wanted is None:
            x = self.request(x, layout_of(node.args[0]))  # type: ignore[arg-type]
            wanted = layout_of(node)
        return self.request(x, wanted)

    def _moved(self, node: fx.Node, have: Layout) -> Layout | None:
        """The target of a redistribution whose operand has `tp` in its layout; None if not so."""
        source, target = layout_of(node.args[0]), layout_of(node)  # type: ignore[arg-type]
        dims = []
        for before, now, then in zip(source.dims, have.dims, target.dims, strict=True):
            if now == before or any(atom.sequence for atom in now):
                dims.append(then)
            elif len(now) == 1 and len(then) <= 1 and now[0].axes[0] == TP:
                axes = (TP, *(then[0].axes if then else ()))
                dims.append((replace(now[0], axes=axes),))
            else:
                return None
        return Layout(tuple(dims))

    def _carried(self, node: fx.Node, call: Call, operands: list[fx.Node]) -> fx.Node:
        """An op behind split operands: its rule says what becomes of the split."""
        # What several ops read is summed once, for all of them.
        operands = [
            self.summed(new) if len(old.users) > 1 else new
            for old, new in zip(call.operands, operands, strict=True)
        ]
        rule = find_rule(node.target)
        linear = rule.linear if rule is not None else None
        partial = linear.axes(call, [layout_of(n).partial for n in operands]) if linear else ()
        if not partial:
            operands = list(map(self.summed, operands))
        layouts = [replace(layout_of(n), partial=()) for n in operands]
        placement = None
        if any(map(has_tp, layouts)):
            placement = self.forward(node, rule, layouts)
        if placement is None:
            wanted = [replace(layout_of(n), partial=()) for n in call.operands]
            placement = Placement(tuple(wanted), layout_of(node))
        begun = _begins_sum(node)
        output = replace(placement.output, partial=(*begun, *partial))
        if output.has_conflict:
            return self._carried(node, call, list(map(self.summed, operands)))
        new = [
            n if layout_of(n).partial and layout_of(n).dims == want.dims
            else self.obtain(self.summed(n), want)
            for n, want in zip(operands, placement.operands, strict=True)
        ]
        if partial and not any(layout_of(n).partial for n in new):
            output = replace(output, partial=begun)
        return self.emit(node, new, output)


def _begins_sum(node: fx.Node) -> tuple[str, ...]:
    """The axes over which an op's result is a term of a sum, and no operand is one.

    It is so of experts over `ep` that are given all tokens.
    """
    before = [axis for x in node.all_input_nodes for axis in layout_of(x).partial]
    return tuple(axis for axis in layout_of(node).partial if axis not in before)


def _is_float(node: fx.Node) -> bool:
    return type_of(node).dtype.is_floating_point or type_of(node).dtype.is_complex
