"""What a program with a cache may do along the sequence where it is not split along time.

Such a value has an entry for every position that there may be, of which later ones are not known
yet. An op may pass the dim through, go along it from the front (a prefix sum), or pick entries by
position. Whatever else mixes its entries would mix in those that are not known, and is refused; so
is a length that is used as a number, which would be another one at every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from ringcompile.ir.calls import Call, map_values, operands, target_name
from ringcompile.ir.expr import SEQUENCE, Size, equal, is_symbolic, symbol
from ringcompile.ir.nodes import error_at, layout_of, results_of, type_of
from ringcompile.ir.rules import FactorRule, Rule, find_rule
from ringcompile.ops.running import ALONG

_S = symbol(SEQUENCE)
_HINT = "leave out --cache, or compute each result from the current and earlier tokens only"
COUNTED = "if it is a capacity of experts, --capacity local counts the new tokens of each call"
# Entry t of the result depends on entries up to t.
_PREFIX = frozenset({
    *ALONG, "aten.cummax.default", "aten.cummin.default", "aten.tril.default", "aten.triu.default",
})
# Arguments that say where values end, not what they are.
_ENDS = {"aten.arange.start_step": "end", "aten.slice.Tensor": "end"}
_SAME = ("aten.reshape.default", "aten.expand.default", "aten.permute.default", "aten.to.dtype")


def check_call(node: fx.Node) -> Rule | None:
    """The rule of an op that may be in a program with a cache.

    Raises:
        RingCompileError: it mixes the entries of positions, or uses the length as a number.
    """
    rule = find_rule(node.target)
    long = list(_long_dims(node))
    if rule is None:
        if long:
            raise error_at(node, f"with a cache, {node.target} on a whole sequence cannot be "
                                 "shown to use only the current and earlier tokens for each "
                                 "result", hint=_HINT)
        return None
    _check_numbers(node, rule)
    names = rule.factors(Call(node)) if isinstance(rule, FactorRule) else None
    for operand, dim in long:
        factor = None if names is None else names.operands[operand][dim]
        passes = names is None or (factor is not None and factor in names.output)
        if not passes and not _may_mix(node, operand, dim):
            raise error_at(
                node, "with a cache, this reads the whole sequence, but later tokens are not "
                      "known yet, and they may change the results for earlier tokens", hint=_HINT,
            )
    return rule


def _long_dims(node: fx.Node) -> Iterator[tuple[int, int]]:
    """The dims of operands, by place, that have an entry for every position."""
    for place, operand in enumerate(operands(node)):
        for type_ in results_of(operand)[:1]:
            for dim, (size, atoms) in enumerate(
                zip(type_.shape, type_.layout.dims, strict=True)
            ):
                if not atoms and is_symbolic(size) and _S in size.free_symbols:
                    yield place, dim


def _may_mix(node: fx.Node, operand: int, dim: int) -> bool:
    """Whether an op that works along such a dim goes along it from the front, or picks."""
    call, name = Call(node), target_name(node.target)
    if not equal(type_of(operands(node)[operand]).shape[dim], _S):
        return False
    if name in _PREFIX:
        return True
    if name == "aten.slice.Tensor":
        return call["step"] == 1 and equal(call["start"] or 0, 0)
    if name == "ringcompile.attention.default":
        return operands(node)[operand] in (call["key_mask"], call["mask"])
    if name in ("aten.index.Tensor", "aten.index_select.default"):
        index = call["indices"][dim] if "indices" in call.arguments else call["index"]
        return operand == 0 and isinstance(index, fx.Node) and is_positions(index)
    return False


def is_positions(node: fx.Node) -> bool:
    """Whether a value is the positions 0, 1, 2, ..., in whatever shape."""
    while target_name(node.target) in _SAME:
        node = node.all_input_nodes[0]
    if target_name(node.target) != "aten.arange.start_step":
        return False
    call = Call(node)
    return bool(equal(call["start"], 0) and call["step"] == 1)


def is_last(node: fx.Node, length: Size) -> bool:
    """Whether an op picks the last token of a whole sequence: `x[:, -1]`, or `x[:, -1:]`."""
    name = target_name(node.target)
    if name not in ("aten.select.int", "aten.slice.Tensor") or layout_of(node).axes:
        return False
    call = Call(node)
    if name == "aten.select.int":
        return bool(call["index"] == -1 or equal(call["index"], length - 1))
    return bool(equal(call["start"] or 0, length - 1) and equal(call["end"], length))


def _check_numbers(node: fx.Node, rule: Rule) -> None:
    call, found = Call(node), []

    def note(value: Any) -> Any:
        if is_symbolic(value) and _S in value.free_symbols:
            found.append(value)
        return value

    for name, value in call.arguments.items():
        if name not in (rule.shape_argument, _ENDS.get(target_name(node.target))):
            map_values(value, note)
    if found:
        raise error_at(
            node, f"with a cache, the length of the sequence ({found[0]}) is used as a number, "
                  "which would change with every new token", hint=f"{_HINT}; {COUNTED}",
        )
