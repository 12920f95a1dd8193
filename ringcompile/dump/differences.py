"""Parts of programs as text: what a pass changed, and one layer."""

from __future__ import annotations

import difflib

from ringcompile.errors import RingCompileError
from ringcompile.ir.call_text import call_text
from ringcompile.ir.nodes import location_of
from ringcompile.ir.printer import type_text, value_names
from ringcompile.ir.program import Program


def difference(before: Program, after: Program) -> str:
    """The lines that a pass removed (-) and wrote (+), with one line around them.

    Values go by the names that they keep from pass to pass, not by numbers, which all change where
    one line is added.
    """
    old, new = _lines(before), _lines(after)
    changed = difflib.unified_diff(old, new, "before", "after", n=1, lineterm="")
    lines = list(changed)
    added = sum(line.startswith("+") for line in lines[2:])
    removed = sum(line.startswith("-") for line in lines[2:])
    return "\n".join([*lines, f"{removed} lines less, {added} lines more, of {len(new)}"])


def _lines(program: Program) -> list[str]:
    names = {
        node: f"@{program.weights[node.name].name}" if node.name in program.weights
        else f"%{node.name}" for node in program.graph.nodes
    }
    return [
        f"{names[node]}: {type_text(program, node.meta.get('type'))} = "
        f"{call_text(program, node, names)}"
        for node in program.graph.nodes if node.op == "call_function"
    ]


def layer_text(program: Program, layer: str) -> str:
    """The lines of one layer and of what is inside it.

    Raises:
        RingCompileError: no line is of this layer.
    """
    names = value_names(program)
    lines = []
    for node in program.graph.nodes:
        place = location_of(node)
        if node.op == "call_function" and f"{place.layer}.".startswith(f"{layer}."):
            inner = place.layer.removeprefix(layer)
            lines.append(
                f"{names[node]}: {type_text(program, node.meta.get('type'))} = "
                f"{call_text(program, node, names)}  // {place.short} {inner}".rstrip()
            )
    if not lines:
        layers = dict.fromkeys(
            location_of(node).layer for node in program.graph.nodes if node.op == "call_function"
        )
        raise RingCompileError(
            f"the program has no layer '{layer}'",
            hint=f"layers are: {', '.join(list(filter(None, layers))[:12])}",
        )
    return "\n".join(lines)
