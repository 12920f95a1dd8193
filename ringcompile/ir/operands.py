"""What each attention reads, and whether a pass has lost any of it.

An attention keeps its name from the pass that finds it to the program of one rank. Where it has
become attention over blocks, its operands are those that every block reads, and its sink is
`finish`'s. A pass that drops one of them would change results without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import fx

from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.program import Program

_WHOLE = frozenset({"ringcompile.attention.default", "ringcompile.ring_attention.default"})
_BLOCKS = frozenset({
    "ringcompile.block_attention.default", "ringcompile.attend_merge.default",
    "ringcompile.cached_attention.default",
})
_FINISH = "ringcompile.finish.default"
_ATTENTION = _WHOLE | {_FINISH}
# Where the states are that a state was merged from, also those of other ranks.
_FROM = ("state", "block", "packed", "x")
_OPTIONAL = ("key_mask", "mask", "sink")
# What `unroll` appends to the name of a node that it writes out for each chunk of time.
_CHUNK = re.compile(r"_t\d+$")


def attention_operands(program: Program) -> dict[str, frozenset[str]]:
    """For each attention of a program, by name, which of its optional operands it reads."""
    return {
        node.name: _given(node)
        for node in program.graph.nodes
        if target_name(node.target) in _ATTENTION
    }


def lost_operand(
    before: Mapping[str, frozenset[str]], after: Mapping[str, frozenset[str]]
) -> str | None:
    """What a pass has lost of an attention's operands, as a phrase; None if nothing.

    An attention that is gone (no result needs it, or another stage has it) has lost nothing.
    """
    for name, given in after.items():
        known = before.get(name, before.get(_CHUNK.sub("", name), frozenset()))
        if missing := sorted(known - given):
            return f"%{name} has lost its {' and '.join(missing)}"
    return None


def _given(node: fx.Node) -> frozenset[str]:
    call = Call(node)
    if target_name(node.target) != _FINISH:
        return frozenset(name for name in _OPTIONAL if call[name] is not None)
    given = set(_OPTIONAL[:2])
    for block in _blocks(call["state"]):
        given &= {name for name in given if Call(block)[name] is not None}
    return frozenset(given | ({"sink"} if call["sink"] is not None else set()))


def _blocks(state: fx.Node) -> list[fx.Node]:
    """All attention over blocks that a state has been merged from."""
    found, work = [], [state]
    while work:
        node = work.pop()
        if target_name(node.target) in _BLOCKS:
            found.append(node)
        if target_name(node.target) not in _BLOCKS or "state" in Call(node).arguments:
            work += [n for n in map(Call(node).get, _FROM) if n is not None]
    return found
