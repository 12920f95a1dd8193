"""Fused groups: neighbouring nodes of a rank's program that are computed by one kernel.

The nodes stay as they are, each with its type and line, and say which member of their group they
are. A group stands in one piece, so it is computed at one moment: whatever reads one of its nodes
comes behind all of them. `passes/rank/fuse.py` finds groups; costs, schedules and executors take
one as a unit.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from ringcompile.ir.calls import Call, aten_name, target_name
from ringcompile.ir.communication import COMMUNICATION
from ringcompile.ir.expr import depends_on_data, product
from ringcompile.ir.kinds import kind_of
from ringcompile.ir.nodes import results_of, type_of
from ringcompile.ir.rules import FactorRule, find_rule
from ringcompile.ir.rules.bits import BitsRule

# The key of `Node.meta` with a node's place in its group.
MARK = "fused"
RING_ATTENTION = "ringcompile.ring_attention.default"
# Ours that are written in torch's own ops, and so can share a kernel with them.
_PLAIN = frozenset({
    "ringcompile.pack.default", "ringcompile.finish.default", "ringcompile.padded_tokens.default",
})
# What each kind of work is to a group. Of reductions those along the last dims are thin, and those
# of a few entries, such as the results of the experts that a token chose.
_THIN = frozenset({
    "stream", "special", "reduction", "join", "pick_rows", "outer", "finish", "view", "same",
})
_VIEWS = frozenset({"view", "same"})
_NAME = 48
# Entries that a reduction of a few takes at most.
_FEW = 8


@dataclass(frozen=True)
class Member:
    """A node's place in its group, and how many nodes the group has."""

    index: int
    size: int


def member_of(node: fx.Node) -> Member | None:
    """A node's place in its group; None if it is in none."""
    found: Member | None = node.meta.get(MARK)
    return found


def group_of(node: fx.Node) -> list[fx.Node]:
    """The group that a node is a member of; itself alone if it is in none."""
    member, group = member_of(node), [node]
    for _ in range(member.index if member else 0):
        group.insert(0, group[0].prev)
    while member is not None and len(group) < member.size:
        group.append(group[-1].next)
    return group


def mark_group(nodes: Sequence[fx.Node]) -> None:
    """Make neighbours a group; a node by itself is in none."""
    for index, node in enumerate(nodes):
        node.meta.pop(MARK, None)
        if len(nodes) > 1:
            node.meta[MARK] = Member(index, len(nodes))


def keep_mark(node: fx.Node, other: fx.Node) -> None:
    """Another node takes a node's place in its group, if that is in one."""
    if MARK in node.meta:
        other.meta[MARK] = node.meta[MARK]


def units_of(nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """All nodes in order: those of a group together, and every other one by itself."""
    units: list[list[fx.Node]] = []
    for node in nodes:
        member = member_of(node)
        if member is None or not member.index:
            units.append([])
        units[-1].append(node)
    return units


def groups_of(nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """The groups among nodes that stand in the order of a graph."""
    return [unit for unit in units_of(nodes) if member_of(unit[0]) is not None]


def broken_group(nodes: Sequence[fx.Node]) -> tuple[fx.Node, str] | None:
    """The first node that does not stand where its mark says, or may not be fused, and why."""
    before: Member | None = None
    for node in nodes:
        member = member_of(node)
        going_on = before is not None and before.index + 1 < before.size
        expected = Member(before.index + 1, before.size) if before and going_on else None
        if going_on and member != expected:
            return node, f"stands between the members of a fused group of {before.size}"  # type: ignore[union-attr]
        if member is not None and not going_on and (member.index or member.size < 2):
            return node, f"is member {member.index} of a fused group that does not begin before it"
        if member is not None and not (is_thin(node) or (starts_group(node) and not member.index)):
            return node, "may not be fused"
        before = member
    return None


def starts_group(node: fx.Node) -> bool:
    """Whether a node ends with a thin op: ring attention, whose last step scales its result."""
    return target_name(node.target) == RING_ATTENTION


def is_thin(node: fx.Node) -> bool:
    """Whether one kernel can compute a node along with other such nodes.

    These are torch's pointwise ops, views and copies, gathers, and reductions along the last dims
    or of a few entries.
    """
    name = target_name(node.target)
    if node.op != "call_function" or not _has_known_sizes(node):
        return False
    if node.target is operator.getitem or name in _PLAIN:
        return True
    rule = find_rule(node.target)
    if rule is None or not name.startswith("aten.") or isinstance(rule, BitsRule):
        return False
    if rule.cost not in _THIN:
        return False
    return rule.cost != "reduction" or _is_by_row(rule, node) or _is_of_few(rule, node)


def is_view(node: fx.Node) -> bool:
    """Whether a thin node looks at the memory of what it reads; some must copy it all the same."""
    return kind_of_thin(node) in _VIEWS


def needs_whole(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a thin node may read any entry of an operand, which then has to be written first."""
    return not starts_group(node) and (
        kind_of_thin(node) == "pick_rows" and node.args[0] is operand
    )


def kind_of_thin(node: fx.Node) -> str:
    """As `kind_of`; taking a result of an op that has several is a view."""
    return "view" if node.target is operator.getitem else kind_of(node.target)


def moves_on(node: fx.Node) -> bool:
    """Whether nodes may be moved past this one: it neither exchanges nor keeps anything."""
    name = target_name(node.target)
    if name in COMMUNICATION:
        return False
    return not name.startswith("ringcompile.") or name in _PLAIN | _MOVABLE


# Ours that only compute, in little time.
_MOVABLE = frozenset({
    "ringcompile.positions.default", "ringcompile.window_positions.default",
    "ringcompile.redistribute.default", "ringcompile.tokenwise.default",
})


def name_of_group(nodes: Sequence[fx.Node]) -> str:
    """What a group computes, `add_rms_norm`: its ops but views, each once."""
    text = "_".join(dict.fromkeys(map(_op_name, working(nodes))))
    return text if len(text) <= _NAME else text[:_NAME].rsplit("_", 1)[0] + "_etc"


def _op_name(node: fx.Node) -> str:
    if starts_group(node):
        return "finish"
    return target_name(node.target).split(".")[1]


def working(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes of a group that would launch a kernel by themselves, as far as ops alone tell."""
    return [node for node in nodes if starts_group(node) or not only_looks(node)]


def only_looks(node: fx.Node) -> bool:
    """Whether a thin node makes no kernel: it is a view, and need not copy what it looks at.

    A reshape copies behind a view that puts entries in another order, and so does `contiguous`.
    """
    if starts_group(node) or not is_view(node):
        return False
    if aten_name(node.target) not in _COPYING:
        return True
    source = node.args[0]
    while isinstance(source, fx.Node) and source.op == "call_function" and is_thin(source):
        if aten_name(source.target) in _REORDERING:
            return False
        if not is_view(source):
            break
        source = source.args[0]
    return True


_COPYING = frozenset({"reshape", "contiguous"})
_REORDERING = frozenset({"permute", "expand", "slice", "select", "unfold", "diagonal"})


def _has_known_sizes(node: fx.Node) -> bool:
    """Whether lengths tell its sizes; complex numbers are not known to every compiler."""
    if node.meta.get("type") is None:
        return False
    read = (type_ for operand in node.all_input_nodes for type_ in results_of(operand))
    types = (*results_of(node), *read)
    return not any(
        type_.dtype.is_complex or any(map(depends_on_data, type_.shape)) for type_ in types
    )


def _is_of_few(rule: object, node: fx.Node) -> bool:
    """Whether a sum or the like takes so few entries that a compiler writes them all out.

    Inductor does so up to 8 (`unroll_reductions_threshold`): it is a pointwise op then.
    """
    assert isinstance(rule, FactorRule)
    factors = rule.factors(Call(node))
    if len(results_of(node)) > 1 or len(factors.operands) != 1:
        return False
    sizes = zip(factors.operands[0], type_of(node.all_input_nodes[0]).shape, strict=True)
    taken = product([size for name, size in sizes if name is None])
    return isinstance(taken, int) and 1 < taken <= _FEW and None not in factors.output


def _is_by_row(rule: object, node: fx.Node) -> bool:
    """Whether a reduction takes the last dims of a tensor together, and not all dims."""
    assert isinstance(rule, FactorRule)
    names = rule.factors(Call(node)).operands[0]
    kept = [name is not None for name in names]
    return kept == sorted(kept, reverse=True) and any(kept) and not all(kept)
