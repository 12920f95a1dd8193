"""Say of every attention what its mask is: a band of positions, hidden keys, and what is left over.

A mask that is an L x L tensor in the model becomes `lower <= query - key <= upper` where that can
be proved from the ops that compute it. A part that is the same for all queries becomes the key
mask. What remains stays a tensor operand, which `place` computes for one rank's queries only. No
part is ever dropped or guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.expr import equal
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ops.blocks import Band
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.masks.analysis import Analysis
from ringcompile.passes.masks.even_rows import evened, may_even
from ringcompile.passes.masks.kinds import kind_of_rest
from ringcompile.passes.masks.operands import joined
from ringcompile.passes.masks.reach import may_hide
from ringcompile.passes.masks.values import Choice, Condition, band_of, sees_itself

aten = torch.ops.aten
_ATTENTION = op("attention")


@dataclass
class Parts:
    """What a mask is made of.

    Attributes:
        band: which differences of positions are visible.
        nodes: what else has to be seen, or is added.
        kinds: what people call these.
        finite: a finite number that hides keys was taken for -inf.
        may_blind: some of it may hide the key at a query's own position.
    """

    band: Band = field(default_factory=Band)
    nodes: list[fx.Node] = field(default_factory=list)
    kinds: dict[fx.Node, str] = field(default_factory=dict)
    finite: bool = False
    may_blind: bool = False

    def __add__(self, other: Parts) -> Parts:
        return Parts(
            self.band & other.band, self.nodes + other.nodes, {**self.kinds, **other.kinds},
            self.finite or other.finite, self.may_blind or other.may_blind,
        )


@dataclass(frozen=True)
class RecognizeMasks(Pass):
    """Split the mask of attention into a band (causal, window), a key mask and the rest.

        o = attention(q, k, v, None, and(le(key, query), padding))
    ->  o = attention(q, k, v, padding, None, lower=0)
    """

    name: ClassVar[str] = "recognize-masks"
    reads_masks: ClassVar[bool] = True

    def run(self, program: Program) -> Program:
        """Rewrite each attention that has a mask; other nodes are copied."""
        analysis, builder = Analysis(program), Builder()
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
    if parts.finite and parts.may_blind:  # together they may hide a row, which is then even
        parts = Parts(nodes=[call["mask"]])
    band = parts.band & Band(call["lower"], call["upper"])
    q, k, v = (builder.env[call[name]] for name in ("q", "k", "v"))
    sink = builder.env[call["sink"]] if call["sink"] is not None else None
    masks = [builder.env[n] for n in parts.nodes]
    if sink is None and may_even(analysis.program, parts.nodes):
        bias = joined(masks, builder)
        assert bias is not None
        q, bias = evened(builder, q, bias, band, type_of(k).shape[2])
        masks = [bias]
    others = [n for n in parts.nodes if not _for_all_queries(n)]
    keys = joined([n for n in masks if _for_all_queries(n)], builder)
    rest = joined([n for n in masks if not _for_all_queries(n)], builder)
    new = builder.call(
        _ATTENTION,
        (q, k, v, keys, rest, sink),
        node.meta["type"],
        name=node.name,
        scale=call["scale"],
        softcap=call["softcap"],
        lower=band.lower,
        upper=band.upper,
    )
    if others:
        new.meta["mask_kind"] = _kind(others, parts, analysis)
    return new


def _parts(mask: fx.Node, analysis: Analysis) -> Parts:
    """The band and the remaining nodes that a mask means together."""
    if _adds_leading_dims(mask):  # masks broadcast from the right, with them or without
        return _parts(mask.args[0], analysis)  # type: ignore[arg-type]
    if type_of(mask).dtype == torch.bool:
        return _of_condition(mask, analysis.condition(mask))
    terms = mask.args[:2]
    plain = mask.target is aten.add.Tensor and Call(mask)["alpha"] == 1
    if plain and all(isinstance(term, fx.Node) for term in terms):
        return _parts(terms[0], analysis) + _parts(terms[1], analysis)  # type: ignore[arg-type]
    if mask.target is aten.expand.default:
        return _parts(mask.args[0], analysis)  # type: ignore[arg-type]
    value = analysis.of(mask)
    condition = _as_condition(value, mask)
    if condition is not None and isinstance(value, Choice):
        parts = _of_condition(mask, condition)
        return replace(parts, finite=parts.finite or -inf not in (value.true, value.false))
    hidden = _of_hidden(mask, analysis)
    return hidden or Parts(nodes=[mask], may_blind=may_hide(analysis.program, [mask], True))


def _of_hidden(mask: fx.Node, analysis: Analysis) -> Parts | None:
    """A number that hides where a condition does not hold, another additive mask where it does."""
    name = target_name(mask.target).split(".")[1] if mask.op == "call_function" else ""
    if name not in ("where", "masked_fill"):
        return None
    call = Call(mask)
    if name == "masked_fill":
        condition, rest, hidden, where = call["mask"], call["self"], call["value"], False
    else:
        condition, rest, hidden, where = call["condition"], call["self"], call["other"], True
        if not isinstance(rest, fx.Node) or _is_low(analysis.number(rest), mask):
            rest, hidden, where = hidden, rest, False
    number = analysis.number(hidden)
    if not isinstance(rest, fx.Node) or not _is_low(number, mask):
        return None
    seen: Condition | None = analysis.condition(condition)
    if not where and seen is not None:
        seen = seen.negated()
    if seen is None or any(test.node is None and test.value is None for test in seen.tests):
        return None
    if number != -inf and not _no_row_is_hidden(mask, seen):
        return None
    parts = _of_condition(mask, seen)
    if mask in parts.nodes:
        return None
    return replace(parts, finite=number != -inf) + _parts(rest, analysis)


def _adds_leading_dims(node: fx.Node) -> bool:
    """A reshape that only puts dims of size 1 in front."""
    if node.target is not aten.reshape.default:
        return False
    shape, source = type_of(node).shape, type_of(node.args[0]).shape  # type: ignore[arg-type]
    added = len(shape) - len(source)
    return added > 0 and all(size == 1 for size in shape[:added]) and shape[added:] == source


# No score comes near: the most negative numbers of wide dtypes, also where they were scaled.
_LOW = -1e30


def _as_condition(value: object, mask: fx.Node) -> Condition | None:
    """An additive mask of 0 and -inf as a condition.

    The most negative finite number hides a key just as well, unless it hides all of a row's keys
    (softmax then weighs them evenly): it is taken for -inf only where every query sees itself.
    """
    if not isinstance(value, Choice):
        return None
    if value.true == 0 and _is_low(value.false, mask):
        condition, hidden = value.condition, value.false
    elif value.false == 0 and _is_low(value.true, mask):
        negated = value.condition.negated()
        if negated is None:
            return None
        condition, hidden = negated, value.true
    else:
        return None
    return condition if hidden == -inf or _no_row_is_hidden(mask, condition) else None


def _is_low(number: float | None, mask: fx.Node) -> bool:
    """Whether a number that is added to scores hides them from a softmax over others."""
    low = max(torch.finfo(type_of(mask).dtype).min, _LOW)
    return number is not None and number <= low


def _no_row_is_hidden(mask: fx.Node, seen: Condition) -> bool:
    """Whether every query sees itself, so that no row is of hidden keys alone."""
    rows, columns = type_of(mask).shape[-2:]
    return equal(rows, columns) and sees_itself(seen)


def _of_condition(mask: fx.Node, condition: Condition) -> Parts:
    parts = Parts(may_blind=not sees_itself(condition))
    if condition.never:
        return replace(parts, nodes=[mask])
    whole = False
    for test in condition.tests:
        band = band_of(test)
        if band is not None:
            parts.band &= band
        elif test.node is not None:
            if test.node not in parts.nodes:
                parts.nodes.append(test.node)
            if test.kind:
                parts.kinds[test.node] = test.kind
        elif not test.implied:  # understood, but no band, and its own node no longer lines up
            whole = True
    return replace(parts, nodes=[mask]) if whole else parts


def _kind(nodes: list[fx.Node], parts: Parts, analysis: Analysis) -> str:
    """What is left over of a mask, in the words that people have for it."""
    weights = analysis.program.weights if analysis.program else ()
    kinds = [
        parts.kinds.get(n) or kind_of_rest(n, analysis.is_apart, weights) for n in nodes
    ]
    return " + ".join(dict.fromkeys(kinds))


def _for_all_queries(node: fx.Node) -> bool:
    """[B|1, 1, 1, Sk]: the same for every query and head."""
    shape = type_of(node).shape
    return all(size == 1 for size in shape[-3:-1])
