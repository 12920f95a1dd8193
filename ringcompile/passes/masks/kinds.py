"""What people call the part of a mask that is no band: chunks, documents, a prefix, a bias.

Names are for reports; that two tensors hold the same, the analysis also relies on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import fx

from ringcompile.ir.calls import Call, aten_name, map_values, target_name
from ringcompile.ir.expr import equal
from ringcompile.ir.nodes import reached, type_of

_VIEWS = ("reshape", "expand", "permute", "to")
# Of relative positions these make relative values.
_ELEMENTWISE = frozenset([
    "add", "sub", "rsub", "mul", "div", "neg", "abs", "log", "exp", "sqrt", "pow", "sign", "clamp",
    "clamp_min", "clamp_max", "minimum", "maximum", "where", "lt", "le", "gt", "ge", "eq", "ne",
    "masked_fill", "floor_divide", "logical_not", "bitwise_not", "logical_and", "logical_or",
    "tanh", "sigmoid", "relu", "gelu", "silu", "linear", "embedding", "index", "select", "slice",
])


def expression(node: Any) -> Any:
    """Equal for values that are computed alike; nodes before clean-up may be double."""
    if not isinstance(node, fx.Node):
        return (type(node), node)
    if node.op != "call_function":
        return node
    parts: list[Any] = []
    map_values((node.args, dict(node.kwargs)), lambda v: parts.append(expression(v)))
    return (node.target, *parts)


def same_by_row_and_column(a: fx.Node, b: fx.Node) -> bool:
    """Whether a[..., i, 0] is b[..., 0, i]: one value a token, by query and by key."""
    shapes = type_of(a).shape, type_of(b).shape
    if len(shapes[0]) != len(shapes[1]) or len(shapes[0]) < 2:
        return False
    mirrored = (*shapes[1][:-2], *shapes[1][:-3:-1])
    if not all(map(equal, shapes[0], mirrored)) or 1 not in shapes[0][-2:]:
        return False
    if {target_name(a.target), target_name(b.target)} == {"aten.index.Tensor"}:
        return _same_lookup(a, b)
    sources = [x.args[0] if _short(x) == "reshape" else x for x in (a, b)]
    return expression(sources[0]) == expression(sources[1])


def _same_lookup(a: fx.Node, b: fx.Node) -> bool:
    one, other = Call(a), Call(b)
    if expression(one["self"]) != expression(other["self"]):
        return False
    pairs = zip(one["indices"], other["indices"], strict=True)
    return all(
        isinstance(i, fx.Node) and isinstance(j, fx.Node)
        and (expression(i) == expression(j) or same_by_row_and_column(i, j))
        for i, j in pairs
    )


def kind_of_rest(
    node: fx.Node, is_apart: Callable[[fx.Node], bool], weights: Collection[str]
) -> str:
    """The kind of a tensor that is left over of a mask.

    Args:
        node: it.
        is_apart: whether a node is known to hold multiples of query - key.
        weights: the placeholders that are no inputs.
    """
    if type_of(node).dtype.is_floating_point:
        return "relative bias" if _is_relative(node, is_apart, {}) else "bias"
    return "data-dependent mask" if _reads_inputs(node, weights) else "mask"


def _is_relative(
    node: fx.Node, is_apart: Callable[[fx.Node], bool], known: dict[fx.Node, bool]
) -> bool:
    """Made of differences of positions and of what is the same everywhere."""
    if node in known:
        return known[node]
    if node.op != "call_function":
        return False
    known[node] = is_apart(node)
    if not known[node] and (_short(node) in _ELEMENTWISE or _short(node) in _VIEWS):
        inputs = [x for x in node.all_input_nodes if not _is_small(x)]
        known[node] = bool(inputs) and all(_is_relative(x, is_apart, known) for x in inputs)
    return known[node]


def _is_small(node: fx.Node) -> bool:
    """A weight: a table that is looked up in, a slope a head."""
    while _short(node) in _VIEWS:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" or _short(node) == "full"


def _reads_inputs(node: fx.Node, weights: Collection[str]) -> bool:
    above = reached([node], lambda node: node.all_input_nodes)
    return any(n.op == "placeholder" and n.name not in weights for n in above)


def _short(node: fx.Node) -> str:
    return aten_name(node.target)
