"""One call as text: `ring.attention(%6, %7, %8) scale=0.25 causal`.

What an op computes on stands in parentheses, how it does so behind them by name. Defaults are left
out, and so is what the type or the header says anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_aggregate

from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.expr import Size, bind, equal, is_symbolic, symbols_in, to_text
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import DTYPE_NAMES, TensorType

if TYPE_CHECKING:
    from ringcompile.ir.program import Program

_MAX_ITEMS = 8
_TO_THE_END = 2**63 - 1


def is_ours(node: fx.Node) -> bool:
    """Whether a node calls one of ringcompile's own ops."""
    return target_name(node.target).startswith("ringcompile.")


def op_name(node: fx.Node) -> str:
    """The short name of an op: `linear`, `ring.attention`, `operator.getitem`.

    Torch's own ops have no prefix and, as their arguments tell it, no overload. Ours that work
    along a mesh axis have that axis in front, which also tells `ring.gather` from torch's `gather`.
    """
    target: Any = node.target
    if not hasattr(target, "_schema"):
        return python_name(target)
    namespace, name = target_name(target).split(".")[:2]
    if is_ours(node):
        axis = Call(node).get("axis")
        return f"{axis}.{name.removeprefix(f'{axis}_')}" if axis else name
    return name if namespace == "aten" else f"{namespace}.{name}"


def python_name(function: Any) -> str:
    """`operator.getitem`: a function that is no operator of torch's."""
    module = getattr(function, "__module__", "").removeprefix("_")
    return f"{module}.{getattr(function, '__name__', function)}"


class Argument(NamedTuple):
    """An argument that a call gives.

    Attributes:
        is_operand: what the op computes on: a tensor, tensors, or a number in a tensor's place.
        is_named: to be written with its name; what stands where it belongs needs none.
    """

    name: str
    value: Any
    is_operand: bool
    is_named: bool


def given_arguments(node: fx.Node) -> list[Argument]:
    """The arguments of a call that differ from their defaults, in the order of the schema."""
    target: Any = node.target
    if not hasattr(target, "_schema"):
        return [
            *(Argument("", value, True, False) for value in node.args),
            *(Argument(name, value, False, True) for name, value in node.kwargs.items()),
        ]
    args, kwargs, given, gap, ours = node.args, node.kwargs, [], False, is_ours(node)
    for i, known in enumerate(_parameters(target)):
        value = args[i] if i < len(args) else kwargs.get(known.name, known.default)
        if known.optional and _equals(value, known.default):
            gap = True
            continue
        named = gap or known.keyword_only or not known.is_operand or (known.optional and ours)
        given.append(Argument(known.name, value, known.is_operand, named))
    return given


@dataclass(frozen=True)
class _Parameter:
    """What an op's schema says of an argument."""

    name: str
    optional: bool
    default: Any
    keyword_only: bool
    is_operand: bool


@lru_cache(maxsize=4096)
def _parameters(target: Any) -> tuple[_Parameter, ...]:
    found = []
    for schema in target._schema.arguments:
        kind, optional = str(schema.type), schema.has_default_value()
        operand = "Tensor" in kind or (kind == "number" and not schema.kwarg_only)
        default = schema.default_value if optional else None
        found.append(_Parameter(schema.name, optional, default, schema.kwarg_only, operand))
    return tuple(found)


def parameters(node: fx.Node) -> frozenset[str]:
    """The names of the arguments that a call of an op with a schema may have."""
    return _names(node.target)


@lru_cache(maxsize=4096)
def _names(target: Any) -> frozenset[str]:
    return frozenset(known.name for known in _parameters(target))


def _equals(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, fx.Node) and bool(value == default))


def call_text(program: Program, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """`op(operands) attribute=value ...`, the nodes that it reads called by `names`."""
    operands, attributes = [], []
    for argument in given_arguments(node):
        text = value_text(program, argument.value, names)
        text = f"{argument.name}={text}" if argument.is_named else text
        if argument.is_operand:
            operands.append(text)
        elif argument.name not in _SAID or not _SAID[argument.name](program, node, argument.value):
            attributes.append(text)
    if has_band(node):
        attributes.append(band_text(node))
    return " ".join([f"{op_name(node)}({', '.join(operands)})", *attributes])


def value_text(program: Program, value: Any, names: Mapping[fx.Node, str]) -> str:
    """An argument; of long lists the ends."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        items = [value_text(program, item, names) for item in value]
        return f"[{', '.join(elided(items))}]"
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value, str(value))
    if isinstance(value, float):
        text = f"{value:.6g}"
        return f"{text}.0" if text.lstrip("-").isdigit() else text
    if is_symbolic(value):
        known = bind(value, program.lengths)
        return to_text(known) if is_symbolic(known) else value_text(program, known, names)
    return str(value).removeprefix("torch.")


def elided(items: list[str]) -> list[str]:
    """The items, of many the first and the last three."""
    return items if len(items) <= _MAX_ITEMS else [*items[:3], "...", *items[-3:]]


def has_band(node: fx.Node) -> bool:
    """Whether an op is an attention with a band of visible positions."""
    return is_ours(node) and {"lower", "upper"} <= parameters(node)


def band_text(node: fx.Node) -> str:
    """Which keys a query sees, of lower <= query - key <= upper, in words."""
    lower, upper = Call(node)["lower"], Call(node)["upper"]
    if lower is None and upper is None:
        return "full"
    if lower == 0:
        return "causal" if upper is None else f"causal window {upper + 1}"
    low, high = ("" if end is None else str(end) for end in (lower, upper))
    return f"band {low}..{high}"


def _same_size(program: Program, value: Size, expected: Size | None) -> bool:
    if expected is None:
        return False
    return equal(*(bind(size, program.lengths) for size in (value, expected)))


def _is_chunk(program: Program, node: fx.Node, value: Any) -> bool:
    return program.sequence is not None and _same_size(program, value, program.sequence.chunk)


def _is_length(program: Program, node: fx.Node, value: Any) -> bool:
    sequence = program.sequence
    return sequence is not None and value is not None and _same_size(
        program, value, sequence.length
    )


def _is_head_dim(program: Program, node: fx.Node, value: Any) -> bool:
    return "q" in Call(node).arguments and equal(value, type_of(Call(node)["q"]).shape[-1])


def _is_result_dtype(program: Program, node: fx.Node, value: Any) -> bool:
    made = node.meta.get("type")
    return op_name(node) != "to" and isinstance(made, TensorType) and made.dtype == value


def _is_last_dim(program: Program, node: fx.Node, value: Any) -> bool:
    return list(value) == list(type_of(node).shape[-1:])


# Attributes that the rest of the line or the header may say already.
_SAID: dict[str, Callable[[Program, fx.Node, Any], bool]] = {
    "axis": lambda program, node, value: op_name(node).startswith(f"{value}."),
    "chunk": _is_chunk,
    "cudnn_enable": lambda program, node, value: True,
    "dtype": _is_result_dtype,
    "end": lambda program, node, value: value == _TO_THE_END,
    "head_dim": _is_head_dim,
    "layout": lambda program, node, value: op_name(node) == "redistribute",
    "limit": _is_length,
    "lower": lambda program, node, value: has_band(node),
    "of": lambda program, node, value: True,
    "normalized_shape": _is_last_dim,
    "upper": lambda program, node, value: has_band(node),
}


def symbols_of(node: fx.Node) -> set[str]:
    """The names of the symbols in a call's arguments."""
    found: set[str] = set()

    def visit(value: Any) -> Any:
        if is_symbolic(value):
            found.update(symbols_in(value))
        return value

    map_aggregate((node.args, node.kwargs), visit)
    return found
