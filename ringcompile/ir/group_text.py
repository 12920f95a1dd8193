"""How dumps show fused groups: a name, and the bytes that pass a group's border."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import sympy
from torch import fx

from ringcompile.ir import expr
from ringcompile.ir.expr import Size
from ringcompile.ir.fused import group_of, member_of, name_of_group, needs_whole
from ringcompile.ir.nodes import results_of
from ringcompile.ir.types import local_shape

if TYPE_CHECKING:
    from ringcompile.ir.program import Program


def legend_entries(calls: Iterable[fx.Node]) -> Iterator[tuple[str, str]]:
    """What a reader has to know of groups, where a program has any."""
    if any(member_of(node) is not None for node in calls):
        yield "{ ... }", (
            "a fused group: one kernel computes these ops, where the device's compiler is at hand; "
            "it reads and writes only what passes the border of the group"
        )


def opening(program: Program, group: Sequence[fx.Node]) -> str:
    """The line in front of a group: `{  // add_rms_norm: reads 96*b bytes, writes 64*b bytes`."""
    read, written = border(group)
    looked_up = {x: node for node in group for x in node.all_input_nodes if needs_whole(node, x)}
    taken = [looked_up.get(x, x) for x in read]  # a gather reads no more of a table than it takes
    return (
        f"{{  // {name_of_group(group)}: reads {_total(program, taken)} bytes, "
        f"writes {_total(program, written)} bytes"
    )


def border(group: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The values that a group reads from outside, and those of its own that are read outside."""
    inside = set(group)
    read = dict.fromkeys(x for node in group for x in node.all_input_nodes if x not in inside)
    written = [node for node in group if any(user not in inside for user in node.users)]
    return list(read), written


def note_of(node: fx.Node) -> str:
    """For the view as Python: which group a call belongs to; the first has the group's name."""
    member = member_of(node)
    if member is None:
        return ""
    place = f"{member.index + 1} of {member.size}"
    if member.index:
        return f"fused, {place}"
    return f"fused {name_of_group(group_of(node))}, {place}"


def _total(program: Program, nodes: Iterable[fx.Node]) -> str:
    """The bytes of one rank's shares of values."""
    total = sum((_bytes(program, node) for node in nodes), sympy.Integer(0))
    known = expr.bind(expr.simplify(sympy.expand(total)), program.lengths)
    return f"{known:,}" if isinstance(known, int) else str(known)


def _bytes(program: Program, node: fx.Node) -> Size:
    sizes = [
        expr.product([*local_shape(type_, program.mesh, program.sequence), type_.dtype.itemsize])
        for type_ in results_of(node)
    ]
    return sum(sizes, sympy.Integer(0))
