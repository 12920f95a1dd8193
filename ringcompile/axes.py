"""The kinds of mesh axes: one row each, and references to an axis or to a part of one.

A row says what an axis divides and what follows from that: every other module asks the table
instead of naming axes. The grammar of references (`ring`, `ring,ulysses`, `tp//4`, `tp%4`) is read
here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any


@dataclass(frozen=True)
class Axis:
    """One kind of mesh axis.

    Attributes:
        name: as it is written in a parallel spec.
        splits: what is divided over the ranks of this axis, for help texts.
        divides_sequence: whether inputs are divided by position along it. `tp` can, on request.
        only_sequence: whether the sequence is all that it ever divides.
        rotates: whether keys and values may pass from place to place along it.
        gathers_queries: whether attention leaves keys and values where they are along it, gathers
            the queries, and brings the results over each rank's keys together.
        balances: whether zigzag order, which gives all ranks the same causal work, is for it.
        has_ranks: whether its places are different ranks. The places of `time` and of `halves` are
            pieces of work that one rank does in turn.
        own_tokens: whether its ranks compute different tokens, whatever the options.
        keeps_tokens: whether the tokens of a cache lie along it, each on one rank.
        divides_weights: whether each of its ranks is meant to hold a part of the weights only.
    """

    name: str
    splits: str
    divides_sequence: bool = False
    only_sequence: bool = False
    rotates: bool = False
    gathers_queries: bool = False
    balances: bool = False
    has_ranks: bool = True
    own_tokens: bool = False
    keeps_tokens: bool = False
    divides_weights: bool = False


TIME = "time"
HALVES = "halves"

# Outermost first. Ranks that exchange most are neighbours, so that they share a node if any do;
# where several axes divide the sequence, it is divided in this order.
AXES = {
    axis.name: axis
    for axis in (
        Axis("pp", "splits layers into pipeline stages", divides_weights=True),
        Axis("dp", "splits the batch"),
        Axis(HALVES, "splits the batch in two; one half computes while the other sends",
             has_ranks=False),
        Axis(TIME, "splits the sequence; each rank computes piece after piece",
             divides_sequence=True, only_sequence=True, rotates=True, has_ranks=False),
        Axis("ring", "splits the sequence; keys and values rotate", divides_sequence=True,
             only_sequence=True, rotates=True, balances=True, own_tokens=True, keeps_tokens=True),
        Axis("tile", "splits the sequence; queries are gathered",
             divides_sequence=True, only_sequence=True, gathers_queries=True, balances=True,
             own_tokens=True, keeps_tokens=True),
        Axis("ep", "splits the sequence; experts are split too", divides_sequence=True,
             balances=True, own_tokens=True, keeps_tokens=True, divides_weights=True),
        Axis("ulysses", "splits the sequence; attention is split by heads",
             divides_sequence=True, own_tokens=True, keeps_tokens=True),
        Axis("tp", "splits heads and features", divides_sequence=True, divides_weights=True),
    )
}
KEEP_TOKENS = tuple(axis.name for axis in AXES.values() if axis.keeps_tokens)
WITHOUT_RANKS = tuple(axis.name for axis in AXES.values() if not axis.has_ranks)
ONLY_SEQUENCE = frozenset(axis.name for axis in AXES.values() if axis.only_sequence)

_PART = re.compile(r"(\w+)(//|%)(\d+)")


@dataclass(frozen=True)
class AxisRef:
    """An axis, or a part of one.

    `tp//4` stands for the runs of 4 neighbours on `tp`: ranks in the same run have the same place
    on it. `tp%4` stands for the place within such a run.

    Attributes:
        name: the axis.
        part: "" for all of it, "//" for the runs, "%" for the place within a run.
        run: the length of a run; 1 where all of the axis is meant.
    """

    name: str
    part: str = ""
    run: int = 1

    def size(self, sizes: Mapping[str, int]) -> int:
        """The number of places, from the sizes of the axes; an axis that is not there has one."""
        whole = sizes.get(self.name, 1)
        return {"": whole, "//": whole // self.run, "%": self.run}[self.part]

    def place(self, coordinate: Any) -> Any:
        """The place of a rank, an int or a sympy integer, from its coordinate on the axis."""
        if self.part == "//":
            return coordinate // self.run
        return coordinate % self.run if self.part == "%" else coordinate

    def __str__(self) -> str:
        return f"{self.name}{self.part}{self.run}" if self.part else self.name


@lru_cache(maxsize=1024)
def refs(text: str) -> tuple[AxisRef, ...]:
    """What a text such as `ring,ulysses` or `tp//4` names, in order."""
    found = []
    for name in text.split(","):
        part = _PART.fullmatch(name)
        found.append(AxisRef(part[1], part[2], int(part[3])) if part else AxisRef(name))
    return tuple(found)


def size_of(sizes: Mapping[str, int], text: str) -> int:
    """The number of places on one or several axes, or on a part, from the sizes of the axes."""
    if text in sizes:
        return sizes[text]
    return prod(ref.size(sizes) for ref in refs(text))


def base_axis(text: str) -> str:
    """The axis that a reference to one axis, or to a part of it, is about."""
    (ref,) = refs(text)
    return ref.name
