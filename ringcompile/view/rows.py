"""Programs as rows for the viewer: runs of nodes, equal ones written once.

What a layer computes is the same in each of 80 layers and on most of 16 ranks, but for the names
of values and weights. So a run of nodes, one block of the model, is a *template*: a value that it
reads is written relative to the run, a weight relative to the block, and every text once in a
table. The viewer fills the names in.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ringcompile.ir.call_text import call_text, op_name
from ringcompile.ir.communication import COLLECTIVES, SHIFT, bytes_of
from ringcompile.ir.expr import bind
from ringcompile.ir.nodes import location_of
from ringcompile.ir.printer import blocks, type_text
from ringcompile.ir.program import Program


@dataclass
class Tables:
    """What is written once and named by its number: texts, templates, messages.

    Attributes:
        lengths: for which the bytes of messages are given.
    """

    lengths: Mapping[str, int]
    texts: dict[str, int] = field(default_factory=dict)
    templates: dict[tuple[Any, ...], int] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def text(self, text: str) -> int:
        """The number of a text."""
        return self.texts.setdefault(text, len(self.texts))

    def message(self, program: Program, node: fx.Node) -> int:
        """The number of what a node sends or takes; -1 where it does not communicate."""
        target = str(node.target)
        if target != SHIFT and target not in COLLECTIVES:
            return -1
        size = bind(bytes_of(program, node), dict(self.lengths))
        made = {
            "op": op_name(node), "axis": str(node.kwargs["axis"]), "shift": target == SHIFT,
            "bytes": int(size) if isinstance(size, int) else str(size),
            **({"to": node.kwargs["to"], "source": node.kwargs["source"]} if target == SHIFT
               else {}),
        }
        return self.messages.setdefault(json.dumps(made), len(self.messages))

    def to_json(self) -> dict[str, Any]:
        """The tables as plain values."""
        return {
            "texts": list(self.texts),
            "templates": [list(map(list, rows)) for rows in self.templates],
            "messages": [json.loads(text) for text in self.messages],
            "sources": self.sources,
        }


def program_rows(program: Program, tables: Tables, label: str) -> dict[str, Any]:
    """A program as runs of templates.

    Args:
        program: at any stage.
        tables: added to.
        label: what the viewer calls it.
    """
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    numbers = {node: i for i, node in enumerate(calls)}
    runs, before = [], 0
    for block, run in blocks(calls):
        start = numbers[run[0]]
        names = _names(program, run, block, start, before, numbers)
        rows = tuple(_row(program, node, block, names, tables) for node in run)
        number = tables.templates.setdefault(rows, len(tables.templates))
        runs.append([tables.text(block), number, start])
        before = start
    inputs = [
        [node.name, type_text(program, node.meta["type"])]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name not in program.weights
    ]
    returned = [numbers.get(node, -1) for node in program.outputs]
    return {
        "label": label, "runs": runs, "inputs": inputs, "returned": returned,
        "ops": dict(Counter(map(op_name, calls)).most_common()),
    }


def _names(
    program: Program, run: list[fx.Node], block: str, start: int, before: int,
    numbers: Mapping[fx.Node, int],
) -> dict[fx.Node, str]:
    """What a run calls the values that it reads: `<r3>` from its start on, `<a7>` in all."""
    names: dict[fx.Node, str] = {}
    for node in run:
        for operand in node.all_input_nodes:
            if operand in numbers:
                at = numbers[operand]
                near = at >= before
                names[operand] = f"<r{at - start}>" if near else f"<a{at}>"
            elif operand.name in program.weights:
                name = program.weights[operand.name].name
                inside = block and name.startswith(f"{block}.")
                names[operand] = f"<w{name.removeprefix(block)}>" if inside else f"<v{name}>"
            else:
                names[operand] = f"%{operand.name}"
        names.setdefault(node, f"<r{numbers[node] - start}>")
    return names


def _row(
    program: Program, node: fx.Node, block: str, names: Mapping[fx.Node, str], tables: Tables
) -> tuple[Any, ...]:
    """Numbers of texts: op, call, type, place, layer, why; then the number of its message."""
    location = location_of(node)
    if location.short and location.short not in tables.sources:
        tables.sources[location.short] = location.text if location.file.endswith(".py") else ""
    layer = location.layer.removeprefix(block) if block else location.layer
    why = "; ".join(filter(None, (node.meta.get("why"), node.meta.get("mask_kind"))))
    texts = (
        op_name(node), call_text(program, node, names),
        type_text(program, node.meta.get("type")), location.short, layer, why,
    )
    return (*map(tables.text, texts), tables.message(program, node))
