"""Which lengths are worth trying: those that divide and do not, few tokens, and every threshold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sympy
from torch import fx
from torch.utils import _pytree as pytree

from ringcompile.ir.expr import is_symbolic
from ringcompile.ir.program import Program

# What is compared with a number, and what cuts at one.
_CUTS = frozenset({
    "aten.lt.Scalar", "aten.le.Scalar", "aten.gt.Scalar", "aten.ge.Scalar", "aten.clamp.default",
    "aten.clamp_min.default", "aten.clamp_max.default", "aten.floor_divide.Scalar",
    "aten.floor_divide.default", "aten.remainder.Scalar", "aten.div.Scalar_mode",
    "aten.fmod.Scalar",
})
COMPARISONS = frozenset({
    f"aten.{name}.{kind}" for name in ("lt", "le", "gt", "ge") for kind in ("Scalar", "Tensor")
})
_BANDS = ("lower", "upper")
# Thresholds beyond this are tried where the user names the length.
LONGEST = 1100


def lengths_to_try(programs: Sequence[Program], num_ranks: int, num_chunks: int) -> list[int]:
    """The lengths for a model of any length, most telling ones first.

    Args:
        programs: the model's, and those of ranks; thresholds of all of them count.
        num_ranks: along the sequence.
        num_chunks: that it is cut into.
    """
    low, high = programs[0].length_range
    whole = max(num_chunks, 2) * 4
    few = [whole + 3, whole, 1, max(num_ranks - 1, 1)]
    limits = sorted(set(thresholds(programs)))
    reached = [limit + 1 for limit in limits if limit < LONGEST]
    last = [high] if high is not None and high <= LONGEST else []
    wanted = [max(length, low) for length in [*few, *reached, *last]]
    return list(dict.fromkeys(n if high is None else min(n, high) for n in wanted))


def longer(length: int, high: int | None, times: int | None = None) -> Iterator[int]:
    """Longer lengths, up to the longest that is tried unasked; none that divides evenly.

    Args:
        length: what was tried already.
        high: the longest that the program takes, if it says so.
        times: one length that is so many times as long; by default ever longer ones.
    """
    while (length := (times or 2) * length + 1) <= min(high or LONGEST, LONGEST):
        yield length
        if times is not None:
            return


def windows(programs: Iterable[Program]) -> Iterator[int]:
    """How far attention sees back or ahead, wherever that is limited."""
    for program in programs:
        for node in program.graph.nodes:
            yield from _bands(node)


def thresholds(programs: Iterable[Program]) -> Iterator[int]:
    """The numbers, two and up, at which code may behave in another way."""
    for program in programs:
        for node in program.graph.nodes:
            if node.op == "call_function":
                yield from filter(lambda number: number > 1, _numbers(node))


def _numbers(node: fx.Node) -> Iterator[int]:
    if str(node.target) in _CUTS:
        yield from (arg for arg in node.args if type(arg) is int)
    yield from _bands(node)
    for leaf in pytree.tree_leaves((node.args, node.kwargs)):
        if is_symbolic(leaf):
            for cut in leaf.atoms(sympy.Min, sympy.Max, sympy.floor, sympy.ceiling, sympy.Mod):
                yield from (int(number) for number in cut.atoms(sympy.Integer))


def _bands(node: fx.Node) -> Iterator[int]:
    for name in _BANDS:
        bound: Any = node.kwargs.get(name)
        if type(bound) is int and bound:
            yield abs(bound)
