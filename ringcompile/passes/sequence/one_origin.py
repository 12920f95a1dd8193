"""What a model decides on comes from one computation, in whatever layout it is read.

A matmul over a rank's share of the features rounds otherwise than the same matmul over all of them.
Where a value is computed in both forms, `h == h.amax(-1)` would find no largest entry, and
`h >= h.topk(4).values[-1]` would find three. So of every value that reaches a comparison, a sort or
a choice, through ops that keep exact relations, only one form may be computed; the other is moved.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

from torch import fx

from ringcompile.ir.calls import aten_name
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import layout_of, location_of, results_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import FactorRule, ViewRule, find_rule
from ringcompile.ir.rules.table import pointwise
from ringcompile.passes.requests import REDISTRIBUTE, origin_of

# The result jumps where an operand crosses a bound, or another operand. (`view` is of bits.)
_DECIDING = frozenset({
    "eq", "ne", "lt", "le", "gt", "ge", "isclose", "sign", "signbit", "heaviside", "floor", "ceil",
    "round", "trunc", "frac", "fmod", "remainder", "floor_divide", "threshold", "hardshrink",
    "argmax", "argmin", "topk", "sort", "argsort", "kthvalue", "median", "mode", "max", "min",
    "cummax", "cummin", "isin", "bucketize", "searchsorted", "nonzero", "nonzero_numpy",
    "masked_select", "unique_consecutive", "_unique2", "logical_not", "logical_and", "logical_or",
    "logical_xor", "count_nonzero", "any", "all", "histc", "view",
})
# Entries are moved, picked or ordered, never mixed; pointwise ops and views too, by their rules.
_PICKING = frozenset({
    "permute", "expand", "select", "slice", "cat", "stack", "flip", "roll", "gather", "index",
    "index_select", "index_put", "index_copy", "index_fill", "scatter", "slice_scatter",
    "select_scatter", "sort", "topk", "kthvalue", "max", "min", "amax", "amin", "median", "mode",
    "cummax", "cummin", "constant_pad_nd", "pad", "unfold", "tril", "triu", "embedding", "glu",
    "diff", "max_pool1d", "max_pool2d", "masked_select", "view_as_complex", "view_as_real",
})


def with_one_origin(write: Callable[[frozenset[str]], Program]) -> Program:
    """What a pass writes when each value that is decided on is computed in one layout only.

    Args:
        write: writes the program, given the names of values to compute in one layout.
    """
    single: frozenset[str] = frozenset()
    while True:
        program = write(single)
        found = decided_twice(program.graph.nodes)
        if not found:
            return _noted(program, single)
        assert not found & single, f"{', '.join(sorted(found & single))} in two layouts after all"
        single |= found


def _noted(program: Program, single: frozenset[str]) -> Program:
    notes = [
        f"{location_of(node).short}: %{node.name} is computed in one layout only: the model "
        "compares its entries with each other".lstrip(": ")
        for node in program.graph.nodes if node.name in single
    ]
    return program.with_graph(
        program.graph, notes=tuple(dict.fromkeys((*program.notes, *notes)))
    )


def decided_twice(nodes: Iterable[fx.Node]) -> frozenset[str]:
    """The origins of which two forms are decided on.

    Args:
        nodes: of a graph with layouts, in order.
    """
    forms: dict[str, set[Layout]] = {}
    seen: set[fx.Node] = set()
    for node in nodes:
        if _decides(node):
            for source in _sources(node.all_input_nodes, seen):
                forms.setdefault(origin_of(source), set()).add(layout_of(source))
    return frozenset(origin for origin, layouts in forms.items() if len(layouts) > 1)


def _decides(node: fx.Node) -> bool:
    if node.op != "call_function" or not any(map(_is_float, node.all_input_nodes)):
        return False
    to_whole_numbers = _short(node) == "to" and not _is_float(node)
    rounds = "rounding_mode" in node.kwargs
    return _short(node) in _DECIDING or to_whole_numbers or rounds


def _sources(nodes: Iterable[fx.Node], seen: set[fx.Node]) -> list[fx.Node]:
    """What values come from that mixes and rounds, by ops that keep exact relations."""
    found, work = [], list(nodes)
    while work:
        node = work.pop()
        if node in seen or node.op != "call_function" or not _is_float(node):
            continue
        seen.add(node)
        if _keeps_relations(node):
            work += node.all_input_nodes
        else:
            found.append(node)
    return found


def _keeps_relations(node: fx.Node) -> bool:
    if node.target in (operator.getitem, REDISTRIBUTE) or _short(node) in _PICKING:
        return True
    rule = find_rule(node.target)
    by_entry = isinstance(rule, FactorRule) and rule.factors is pointwise
    return by_entry or isinstance(rule, ViewRule)


def _is_float(node: fx.Node) -> bool:
    return "type" in node.meta and results_of(node)[0].dtype.is_floating_point


def _short(node: fx.Node) -> str:
    return aten_name(node.target)
