"""Programs as text for people: numbered values, types that carry the layout, where lines come from.

    %9:  f32[1, 6, s/ring, 16]  = ring.attention(%6, %7, %8) scale=0.25 causal  // gpt.py:76 .attn

The same program prints the same text on every machine: no addresses, no absolute paths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import bind, equal
from ringcompile.ir.legend import is_state, legend, op_name, summary, title
from ringcompile.ir.program import Program, Structure, location_of, type_of
from ringcompile.ir.types import DTYPE_NAMES, TensorType, ValueType, format_type

_MAX_ITEMS = 8
# Columns follow the lines that fit; the few longer ones stick out.
_MAX_TYPE, _MAX_CODE = 36, 96


def print_program(program: Program, *, weights: bool = False) -> str:
    """The text form of a program.

    Args:
        weights: list the weights with their types; otherwise only their number and size.
    """
    names = value_names(program)
    head = [f"// {line}".rstrip() for line in (*title(program), "", *legend(program))]
    foot = [f"// {line}" for line in summary(program)]
    entry = _columns([_entry(program, node, names) for node in _placeholders(program, weights)])
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    lines = [
        _line(program, node, block, names)
        for block, group in blocks(calls)
        for node in group
    ]
    text = iter(_columns(lines))
    body: list[str] = []
    for block, group in blocks(calls):
        body += ["", f"// {block or outside(group)}", *itertools.islice(text, len(group))]
    return "\n".join([*head, "", *entry, *body, "", _return(program, names), "", *foot]) + "\n"


# -- values and their names ----------------------------------------------------------------------


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


def type_text(value: ValueType | None) -> str:
    """`f32[1, s/ring, 96]`; a state (out, lse) of attention as `state` and the type of out."""
    if value is None:
        return "()"
    if isinstance(value, tuple) and is_state(value):
        return f"state {value[0]}"
    return format_type(value)


def format_value(value: Any, names: Mapping[fx.Node, str]) -> str:
    """An argument; long lists show their ends."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        items = [format_value(item, names) for item in value]
        if len(items) > _MAX_ITEMS:
            items = [*items[:3], "...", *items[-3:]]
        return f"[{', '.join(items)}]"
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value, str(value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).removeprefix("torch.")


# -- arguments -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Argument:
    """An argument that a call gives: what the op computes on, or how it does so.

    Attributes:
        is_operand: a tensor, tensors, or a number in a tensor's place.
        is_named: written with its name, because arguments in front of it are left out.
    """

    name: str
    value: Any
    is_operand: bool
    is_named: bool


def given_arguments(node: fx.Node) -> list[Argument]:
    """The arguments of a call that differ from their defaults, in the order of the schema."""
    if not hasattr(node.target, "_schema"):
        return [
            *(Argument("", value, True, False) for value in node.args),
            *(Argument(name, value, False, True) for name, value in node.kwargs.items()),
        ]
    values, given, gap = Call(node).arguments, [], False
    for schema in node.target._schema.arguments:
        value = values[schema.name]
        if schema.has_default_value() and _same(value, schema.default_value):
            gap = True
            continue
        kind = str(schema.type)
        number = "number" in kind and not schema.kwarg_only and not schema.has_default_value()
        operand = "Tensor" in kind or number
        optional_of_ours = schema.has_default_value() and str(node.target).startswith("ringcompile")
        named = gap or schema.kwarg_only or not operand or optional_of_ours
        given.append(Argument(schema.name, value, operand, named))
    return given


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, fx.Node):
        return False
    return bool(value == default)


def _band(call: Call) -> str:
    """Which keys a query sees, by lower <= query - key <= upper, in words."""
    lower, upper = call["lower"], call["upper"]
    if lower is None and upper is None:
        return "full"
    if lower == 0:
        return "causal" if upper is None else f"causal window {upper + 1}"
    return f"band {lower}..{upper}".replace("None", "")


def _is_chunk(program: Program, node: fx.Node, value: Any) -> bool:
    sequence = program.sequence
    return sequence is not None and equal(value, bind(sequence.chunk, program.lengths))


def _is_length(program: Program, node: fx.Node, value: Any) -> bool:
    sequence = program.sequence
    return sequence is not None and equal(value, bind(sequence.length, program.lengths))


def _is_head_dim(program: Program, node: fx.Node, value: Any) -> bool:
    return equal(value, type_of(Call(node)["q"]).shape[-1])


def _is_result_dtype(program: Program, node: fx.Node, value: Any) -> bool:
    made = node.meta.get("type")
    return op_name(node) != "to" and isinstance(made, TensorType) and made.dtype == value


def _is_last_dim(program: Program, node: fx.Node, value: Any) -> bool:
    return list(value) == list(type_of(node).shape[-1:])


# Attributes that the rest of the line or the header says, by name.
_SAID: dict[str, Callable[[Program, fx.Node, Any], bool]] = {
    "axis": lambda program, node, value: op_name(node).startswith(f"{value}."),
    "chunk": _is_chunk,
    "cudnn_enable": lambda program, node, value: True,
    "end": lambda program, node, value: value == 2**63 - 1,
    "dtype": _is_result_dtype,
    "head_dim": _is_head_dim,
    "layout": lambda program, node, value: op_name(node) == "redistribute",
    "limit": _is_length,
    "lower": lambda program, node, value: "upper" in Call(node).arguments,
    "normalized_shape": _is_last_dim,
    "upper": lambda program, node, value: "lower" in Call(node).arguments,
}


def _call_text(program: Program, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """`op(operands) attribute=value ...`."""
    operands, attributes = [], []
    for argument in given_arguments(node):
        text = format_value(argument.value, names)
        text = f"{argument.name}={text}" if argument.is_named else text
        if argument.is_operand:
            operands.append(text)
        elif argument.name not in _SAID or not _SAID[argument.name](program, node, argument.value):
            attributes.append(text)
    if hasattr(node.target, "_schema") and {"lower", "upper"} <= set(Call(node).arguments):
        attributes.append(_band(Call(node)))
    return " ".join([f"{op_name(node)}({', '.join(operands)})", *attributes])


# -- lines ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    name: str
    type: str
    code: str
    source: str = ""
    layer: str = ""
    why: str = ""


def _placeholders(program: Program, weights: bool) -> Iterable[fx.Node]:
    nodes = (node for node in program.graph.nodes if node.op == "placeholder")
    return [node for node in nodes if weights or node.name not in program.weights]


def _entry(program: Program, node: fx.Node, names: Mapping[fx.Node, str]) -> _Line:
    if node.name in program.weights:
        size = f"{program.weights[node.name].num_bytes:,} bytes"
        return _Line(names[node], type_text(type_of(node)), "weight", why=size)
    passed = program.placeholders[node.name]
    code = "input" if passed == node.name else f"input {passed}"
    share = "whole" if type_of(node).layout.is_whole else "this rank's share"
    why = share if program.mesh is not None else ""
    return _Line(names[node], type_text(type_of(node)), code, why=why)


def _line(program: Program, node: fx.Node, block: str, names: Mapping[fx.Node, str]) -> _Line:
    location = location_of(node)
    layer = location.layer.removeprefix(block) if block else location.layer
    code = _call_text(program, node, names)
    return _Line(
        names[node], type_text(node.meta.get("type")), code, location.short, layer, _why(node)
    )


def _why(node: fx.Node) -> str:
    why: str = node.meta.get("why") or ""
    if op_name(node) != "redistribute":
        return why
    source = type_of(node.args[0])  # type: ignore[arg-type]
    return f"{why} from {source}".strip()


def _columns(lines: list[_Line]) -> list[str]:
    """Types, calls and comments below each other."""
    names = _width((len(line.name) for line in lines), _MAX_TYPE)
    heads = [f"{line.name + ':':<{names + 1}} {line.type}" for line in lines]
    middle = _width(map(len, heads), names + _MAX_TYPE)
    codes = [f"{head:<{middle}} = {line.code}" for head, line in zip(heads, lines, strict=True)]
    right = _width(map(len, codes), _MAX_CODE)
    source = _width((len(line.source) for line in lines), _MAX_CODE)
    made = []
    for code, line in zip(codes, lines, strict=True):
        comment = f"{line.source:<{source}} {line.layer}".strip()
        comment = "; ".join(filter(None, (comment, line.why)))
        made.append(f"{code:<{right}}  // {comment}" if comment else code)
    return made


def _width(widths: Iterable[int], limit: int) -> int:
    return max((width for width in widths if width <= limit), default=0)


def _return(program: Program, names: Mapping[fx.Node, str]) -> str:
    value = program.output_structure.build(names[node] for node in program.outputs)
    types = ", ".join(type_text(node.meta.get("type")) for node in program.outputs)
    return f"return {_nested(value)}  // {types}"


def _nested(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_nested(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_nested, value)) + ")"
    return str(value)


# -- layers --------------------------------------------------------------------------------------


def blocks(nodes: list[fx.Node]) -> list[tuple[str, list[fx.Node]]]:
    """Runs of nodes of one block, such as `blocks.0`, by its name; empty outside the blocks.

    What a pass computed again inside a block, positions for instance, belongs to that block.
    """
    found = itertools.groupby(nodes, key=lambda node: _block(location_of(node).layer))
    runs: list[tuple[str, list[fx.Node]]] = []
    for name, run in found:
        if len(runs) > 1 and not runs[-1][0] and runs[-2][0] == name:
            between = runs.pop()[1]
            runs[-1] = (name, [*runs[-1][1], *between, *run])
        else:
            runs.append((name, list(run)))
    return runs


def outside(nodes: list[fx.Node]) -> str:
    """A heading for nodes outside the blocks: the layers that they come from."""
    named = (location_of(node).layer for node in nodes)
    return ", ".join(dict.fromkeys(layer for layer in named if layer)) or "no layer of its own"


def _block(layer: str) -> str:
    """`model.layers.3` of `model.layers.3.self_attn.q_proj`; empty where nothing is numbered."""
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""
