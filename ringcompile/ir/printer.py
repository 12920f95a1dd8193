"""Programs as text for people: numbered values, types that carry the layout, where lines come from.

    %9:  f32[1, 6, s/ring, 16]  = ring.attention(%6, %7, %8) scale=0.25 causal  // gpt.py:76 .attn

The same program prints the same text on every machine: no addresses, no absolute paths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from torch import fx

from ringcompile.ir.call_text import call_text, op_name
from ringcompile.ir.fused import group_of, member_of
from ringcompile.ir.group_text import opening
from ringcompile.ir.legend import is_state, legend, summary, title
from ringcompile.ir.nodes import location_of, type_of
from ringcompile.ir.state import STATE_KINDS
from ringcompile.ir.types import ValueType, bind_type, format_type

if TYPE_CHECKING:
    from ringcompile.ir.program import Program

T = TypeVar("T")
# Columns follow the lines that fit; the few longer ones stick out.
_MAX_TYPE, _MAX_CODE = 40, 96


def print_program(program: Program, *, weights: bool = False) -> str:
    """The text form of a program.

    Args:
        program: at any stage.
        weights: list the weights with their types and sizes, not only their number.
    """
    names = value_names(program)
    head = [f"// {line}".rstrip() for line in (*title(program, "passes"), "", *legend(program))]
    entry = [_entry(program, node, names) for node in _placeholders(program, weights)]
    runs = blocks([node for node in program.graph.nodes if node.op == "call_function"])
    lines = iter(_columns(
        [_line(program, node, block, names) for block, run in runs for node in run]
    ))
    body: list[str] = []
    for block, run in runs:
        body += ["", f"// {block or outside(run)}"]
        for node in run:
            body += _in_group(program, node, next(lines))
    foot = [f"// {line}" for line in summary(program)]
    return "\n".join(
        [*head, "", *_columns(entry), *body, "", _return(program, names), "", *foot]
    )


def _in_group(program: Program, node: fx.Node, line: str) -> Iterator[str]:
    """A line, in braces with the others of its fused group."""
    member = member_of(node)
    if member is not None and not member.index:
        yield opening(program, group_of(node))
    yield line
    if member is not None and member.index + 1 == member.size:
        yield "}"


def value_names(program: Program) -> dict[fx.Node, str]:
    """%0, %1, ... for results, %name for inputs, @qualified.name for weights."""
    names: dict[fx.Node, str] = {}
    count = itertools.count()
    for node in program.graph.nodes:
        if node.op == "call_function":
            names[node] = f"%{next(count)}"
        elif node.name in program.weights:
            names[node] = f"@{program.weights[node.name].name}"
        else:
            names[node] = f"%{node.name}"
    return names


def type_text(program: Program, value: ValueType | None) -> str:
    """`f32[1, s/ring, 96]`; a state (out, lse) of attention as `state` and the type of out."""
    if value is None:
        return "()"
    bound = bind_type(value, program.lengths)
    if isinstance(bound, tuple) and is_state(value):
        return f"state {bound[0]}"
    return format_type(bound)


# -- lines ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    name: str
    type: str
    code: str
    source: str = ""
    layer: str = ""
    why: str = ""


def _placeholders(program: Program, weights: bool) -> list[fx.Node]:
    nodes = (node for node in program.graph.nodes if node.op == "placeholder")
    return [node for node in nodes if weights or node.name not in program.weights]


def _entry(program: Program, node: fx.Node, names: Mapping[fx.Node, str]) -> _Line:
    type_ = type_text(program, type_of(node))
    if node.name in program.weights:
        size = f"{program.weights[node.name].num_bytes:,} bytes"
        return _Line(names[node], type_, "weight", why=size)
    if node.name in program.state:
        kind = program.state[node.name]
        return _Line(names[node], type_, f"state {kind}", why=STATE_KINDS[kind])
    passed = program.placeholders[node.name]
    code = "input" if passed == node.name else f"input {passed}"
    share = "whole" if type_of(node).layout.is_whole else "this rank's share"
    return _Line(names[node], type_, code, why=share if program.mesh is not None else "")


def _line(program: Program, node: fx.Node, block: str, names: Mapping[fx.Node, str]) -> _Line:
    location = location_of(node)
    layer = location.layer.removeprefix(block) if block else location.layer
    type_, code = type_text(program, node.meta.get("type")), call_text(program, node, names)
    return _Line(names[node], type_, code, location.short, layer, _why(program, node))


def _why(program: Program, node: fx.Node) -> str:
    why = "; ".join(filter(None, (node.meta.get("why"), node.meta.get("mask_kind"))))
    if op_name(node) != "redistribute":
        return why
    source = type_of(node.args[0])  # type: ignore[arg-type]
    return f"{why} from {type_text(program, source)}".strip()


def _columns(lines: list[_Line]) -> list[str]:
    """Types, calls and comments below each other."""
    names = _width((len(line.name) for line in lines), _MAX_TYPE) + 1
    heads = [f"{line.name + ':':<{names}} {line.type}" for line in lines]
    left = _width(map(len, heads), names + _MAX_TYPE)
    codes = [f"{head:<{left}} = {line.code}" for head, line in zip(heads, lines, strict=True)]
    right = _width(map(len, codes), _MAX_CODE)
    source = _width((len(line.source) for line in lines), _MAX_CODE)
    made = []
    for code, line in zip(codes, lines, strict=True):
        place = f"{line.source:<{source}} {line.layer}".strip()
        comment = "; ".join(filter(None, (place, line.why)))
        made.append(f"{code:<{right}}  // {comment}" if comment else code)
    return made


def _width(widths: Iterable[int], limit: int) -> int:
    return max((width for width in widths if width <= limit), default=0)


def _return(program: Program, names: Mapping[fx.Node, str]) -> str:
    value = program.nested(names[node] for node in program.outputs)
    types = ", ".join(type_text(program, node.meta.get("type")) for node in program.outputs)
    return f"return {_nested(value)}  // {types}"


def _nested(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_nested(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_nested, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return str(value)


# -- layers --------------------------------------------------------------------------------------


def blocks(nodes: list[fx.Node]) -> list[tuple[str, list[fx.Node]]]:
    """Runs of nodes of one block, such as `blocks.0`, with its name; empty outside the blocks."""
    return runs_of_blocks(nodes, lambda node: location_of(node).layer)


def runs_of_blocks(
    items: Iterable[T], layer: Callable[[T], str], below: int = 0
) -> list[tuple[str, list[T]]]:
    """Runs of items of one block, with its name; empty outside the blocks.

    What a pass computed again inside a block, positions for instance, belongs to that block.

    Args:
        items: in the order of the graph.
        layer: of an item.
        below: how many levels below the block still make a run of their own.
    """
    runs: list[tuple[str, list[T]]] = []
    for name, run in itertools.groupby(items, lambda item: block_at(layer(item), below)):
        if len(runs) > 1 and not block_at(layer(runs[-1][1][0])) and runs[-2][0] == name:
            between = runs.pop()[1]
            runs[-1] = (name, [*runs[-1][1], *between, *run])
        else:
            runs.append((name, list(run)))
    return runs


def block_of(node: fx.Node) -> str:
    """The block that a node belongs to."""
    return block_at(location_of(node).layer)


@lru_cache(maxsize=4096)
def block_at(layer: str, below: int = 0) -> str:
    """`model.layers.3` of `model.layers.3.self_attn.q_proj`, or empty outside the blocks."""
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1 + below]) if numbers else ""


def outside(nodes: list[fx.Node]) -> str:
    """A heading for nodes outside the blocks: the layers that they come from."""
    named = (location_of(node).layer for node in nodes)
    return ", ".join(dict.fromkeys(layer for layer in named if layer)) or "the model itself"
