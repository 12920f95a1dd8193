"""Say of every attention what its mask is: a band of positions, hidden keys, and what is left over.

A mask that is an L x L tensor in the model becomes `lower <= query - key <= upper` where that can
be proved from the ops that compute it. A part that is the same for all queries becomes the key
mask. What remains stays a tensor operand, which `place` computes for one rank's queries only. No
part is ever dropped or guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.ops.blocks import Band
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.mask_analysis import Analysis
from ringcompile.passes.mask_values import Affine, Choice, Condition, Test

aten = torch.ops.aten
_ATTENTION = op("attention")


@dataclass
class Parts:
    """What a mask is made of."""

    band: Band = field(default_factory=Band)
    nodes: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True)
class RecognizeMasks(Pass):
    """Split the mask operand of attention into band, key mask and the rest.

        o = attention(q, k, v, None, and(le(key, query), padding))
    ->  o = attention(q, k, v, padding, None, lower=0)
    """

    name: ClassVar[str] = "recognize-masks"

    def run(self, program: Program) -> Program:
        """Rewrite each attention that has a mask; other nodes are copied."""
        analysis, builder = Analysis(), Builder()
        for node in program.graph.nodes:
            builder.at(node)
            if node.target is _ATTENTION and Call(node)["mask"] is not None:
                builder.env[node] = _rewrite(node, analysis, builder)
            else:
                builder.env[node] = builder.copy(node)
        return program.with_graph(builder.graph)


def _rewrite(node: fx.Node, analysis: Analysis, builder: Builder) -> fx.Node:
    call = Call(node)
    parts = _parts(call["mask"], analysis)
    band = parts.band & Band(call["lower"], call["upper"])
    key_nodes = [n for n in parts.nodes if _for_all_queries(n)]
    others = [n for n in parts.nodes if not _for_all_queries(n)]
    q, k, v = (builder.env[call[name]] for name in ("q", "k", "v"))
    return builder.call(
        _ATTENTION,
        (q, k, v, _joined(key_nodes, builder), _joined(others, builder)),
        node.meta["type"],
        name=node.name,
        scale=call["scale"],
        lower=band.lower,
        upper=band.upper,
    )


def _parts(mask: fx.Node, analysis: Analysis) -> Parts:
    """The band and the remaining nodes that a mask means together."""
    if _adds_leading_dims(mask):  # masks broadcast from the right, with them or without
        return _parts(mask.args[0], analysis)  # type: ignore[arg-type]
    if type_of(mask).dtype == torch.bool:
        return _of_condition(mask, analysis.condition(mask))
    terms = mask.args[:2]
    plain = mask.target is aten.add.Tensor and Call(mask)["alpha"] == 1
    if plain and all(isinstance(term, fx.Node) for term in terms):
        both = [_parts(term, analysis) for term in terms]  # type: ignore[arg-type]
        return Parts(both[0].band & both[1].band, both[0].nodes + both[1].nodes)
    if mask.target is aten.expand.default:
        return _parts(mask.args[0], analysis)  # type: ignore[arg-type]
    condition = _as_condition(analysis.of(mask), type_of(mask).dtype)
    return _of_condition(mask, condition) if condition is not None else Parts(nodes=[mask])


def _adds_leading_dims(node: fx.Node) -> bool:
    """A reshape that only puts dims of size 1 in front."""
    if node.target is not aten.reshape.default:
        return False
    shape, source = type_of(node).shape, type_of(node.args[0]).shape  # type: ignore[arg-type]
    added = len(shape) - len(source)
    return added > 0 and all(size == 1 for size in shape[:added]) and shape[added:] == source


def _as_condition(value: object, dtype: torch.dtype) -> Condition | None:
    """An additive mask of 0 and -inf as a condition.

    The most negative finite number hides a key just as well, unless it hides all of a row's keys
    (softmax then weighs them evenly): it is taken for -inf only where every query sees itself.
    """
    if not isinstance(value, Choice):
        return None
    low = torch.finfo(dtype).min
    if value.true == 0 and value.false in (-inf, low):
        condition, hidden = value.condition, value.false
    elif value.false == 0 and value.true in (-inf, low):
        negated = value.condition.negated()
        if negated is None:
            return None
        condition, hidden = negated, value.true
    else:
        return None
    if hidden != -inf and not _sees_itself(condition):
        return None
    return condition


def _sees_itself(condition: Condition) -> bool:
    bands = [_band(test) for test in condition.tests]
    return not condition.never and all(
        band is not None and band.relation(0, 0) == "full" for band in bands
    )


def _of_condition(mask: fx.Node, condition: Condition) -> Parts:
    parts = Parts()
    if condition.never:
        return Parts(nodes=[mask])
    for test in condition.tests:
        band = _band(test)
        if band is not None:
            parts.band &= band
        elif test.node is not None:
            parts.nodes.append(test.node)
        else:  # understood, but no band, and its own node no longer lines up: take the whole mask
            return Parts(nodes=[mask])
    return parts


def _band(test: Test) -> Band | None:
    """The test as a bound on query - key, the dims -2 and -1."""
    if not isinstance(test.value, Affine) or not isinstance(test.value.constant, int):
        return None
    match dict(test.value.coefficients):
        case {-2: 1, -1: -1, **rest} if not rest:
            return Band(lower=-test.value.constant)
        case {-2: -1, -1: 1, **rest} if not rest:
            return Band(upper=test.value.constant)
    return None


def _for_all_queries(node: fx.Node) -> bool:
    """[B|1, 1, 1, Sk]: the same for every query and head."""
    shape = type_of(node).shape
    return all(size == 1 for size in shape[-3:-1])


def _joined(nodes: list[fx.Node], builder: Builder) -> fx.Node | None:
    """One 4-dim mask operand from several: bools are and-ed, additive ones added."""
    flags = [_four_dims(builder.env[n], builder) for n in nodes if _is_bool(n)]
    biases = [_four_dims(builder.env[n], builder) for n in nodes if not _is_bool(n)]
    joined = _fold(aten.logical_and.default, flags, builder)
    bias = _fold(aten.add.Tensor, biases, builder)
    if joined is None or bias is None:
        return joined if bias is None else bias
    return builder.call(
        aten.where.ScalarOther,
        (joined, bias, -inf),
        _broadcast([joined, bias], type_of(bias).dtype),
    )


def _fold(target: object, nodes: list[fx.Node], builder: Builder) -> fx.Node | None:
    if not nodes:
        return None
    total = nodes[0]
    for node in nodes[1:]:
        total = builder.call(target, (total, node), _broadcast([total, node], type_of(total).dtype))
    return total


def _broadcast(nodes: list[fx.Node], dtype: torch.dtype) -> TensorType:
    shapes = [type_of(node).shape for node in nodes]
    sizes = (next((s for s in sizes if s != 1), 1) for sizes in zip(*shapes, strict=True))
    return TensorType.whole(dtype, tuple(sizes))


def _four_dims(node: fx.Node, builder: Builder) -> fx.Node:
    type_ = type_of(node)
    if len(type_.shape) == 4:
        return node
    shape = (*(1,) * (4 - len(type_.shape)), *type_.shape)
    return builder.call(
        aten.reshape.default, (node, list(shape)), TensorType.whole(type_.dtype, shape)
    )


def _is_bool(node: fx.Node) -> bool:
    return type_of(node).dtype == torch.bool
