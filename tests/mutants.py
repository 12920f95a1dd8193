"""One fault in one rank's saved program, of any kind that JSON can hold.

A mutant is one node of a program with one thing changed: a number, a flag, an operand, a dtype, a
type, or the node itself left out or doubled. Its kind is what was changed, and in which op. Each
follows from a seed, so that it can be made again.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
_TRIES = 3  # nodes of one op take the same kinds of arguments
Change = Callable[[Json, Json, random.Random], bool]


@dataclass(frozen=True)
class Mutant:
    """A damaged program.

    Attributes:
        kind: what was changed, and in which op.
        node: the node's name.
        data: the program as JSON.
    """

    kind: str
    node: str
    data: Json


def slots(node: Json) -> Iterator[tuple[Any, Any]]:
    """Every place in a node's arguments, at any depth: the container and its key."""
    stack: list[Any] = [node.get("args", []), node.get("kwargs", {})]
    while stack:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            value = holder[key]
            if isinstance(value, list) or (isinstance(value, dict) and "tuple" in value):
                stack.append(value)


def _values(
    fits: Callable[[Any], bool], changed: Callable[[Any, random.Random], Any]
) -> Change:
    """Changes one argument, of those that fit."""

    def change(program: Json, node: Json, rng: random.Random) -> bool:
        found = [(holder, key) for holder, key in slots(node) if fits(holder[key])]
        if not found:
            return False
        holder, key = rng.choice(found)
        before = holder[key]
        holder[key] = changed(before, rng)
        return bool(holder[key] != before)

    return change


def _tagged(kind: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and kind in value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def another_operand(program: Json, node: Json, rng: random.Random) -> bool:
    """An operand becomes an earlier value of the same type."""
    types = {n["name"]: n.get("type") for n in program["nodes"]}
    place = next(i for i, n in enumerate(program["nodes"]) if n is node)
    earlier = [n["name"] for n in program["nodes"][:place]]
    found = [
        (holder, key, name)
        for holder, key in slots(node)
        if _tagged("node")(holder[key])
        for name in earlier
        if name != holder[key]["node"] and types[name] == types[holder[key]["node"]]
    ]
    if not found:
        return False
    holder, key, name = rng.choice(found)
    holder[key] = {"node": name}
    return True


def swapped(program: Json, node: Json, rng: random.Random) -> bool:
    """Two arguments change places."""
    args = node.get("args", [])
    if len(args) < 2 or args[0] == args[1]:
        return False
    args[0], args[1] = args[1], args[0]
    return True


def left_out(program: Json, node: Json, rng: random.Random) -> bool:
    """A node is gone; what read it reads its first operand of the same type."""
    types = {n["name"]: n.get("type") for n in program["nodes"]}
    operands = [
        holder[key]["node"] for holder, key in slots(node) if _tagged("node")(holder[key])
    ]
    same = [name for name in operands if types[name] == types[node["name"]]]
    if not same:
        return False
    program["nodes"].remove(node)
    _reroute(program, node["name"], same[0], 0)
    return True


def doubled(program: Json, node: Json, rng: random.Random) -> bool:
    """A node is computed once more over its own result."""
    types = {n["name"]: n.get("type") for n in program["nodes"]}
    again = copy.deepcopy(node)
    found = [
        (holder, key) for holder, key in slots(again)
        if _tagged("node")(holder[key]) and types[holder[key]["node"]] == types[node["name"]]
    ]
    if not found:
        return False
    holder, key = found[0]
    holder[key] = {"node": node["name"]}
    again["name"] += "_again"
    place = program["nodes"].index(node)
    program["nodes"].insert(place + 1, again)
    _reroute(program, node["name"], again["name"], place + 2)
    return True


def _reroute(program: Json, old: str, new: str, start: int) -> None:
    for later in program["nodes"][start:]:
        for holder, key in slots(later):
            if holder[key] == {"node": old}:
                holder[key] = {"node": new}


def another_type(program: Json, node: Json, rng: random.Random) -> bool:
    """The node claims another type of the program."""
    if "type" not in node or len(program["types"]) < 2:
        return False
    node["type"] = (node["type"] + 1 + rng.randrange(len(program["types"]) - 1)) % len(
        program["types"]
    )
    return True


def another_op(program: Json, node: Json, rng: random.Random) -> bool:
    """The node calls another op that takes as many arguments."""
    others = sorted({
        n["op"] for n in program["nodes"]
        if "." in n["op"] and n["op"] != node["op"]
        and len(n["args"]) == len(node["args"]) and n["kwargs"].keys() == node["kwargs"].keys()
    })
    if not others:
        return False
    node["op"] = rng.choice(others)
    return True


def without_keyword(program: Json, node: Json, rng: random.Random) -> bool:
    """A keyword is gone, so that its default counts."""
    if not node["kwargs"]:
        return False
    del node["kwargs"][rng.choice(sorted(node["kwargs"]))]
    return True


FORMS: dict[str, Change] = {
    "a float by half": _values(lambda v: isinstance(v, float), lambda v, _: v / 2 or 0.5),
    "a float by little": _values(lambda v: isinstance(v, float), lambda v, _: v * 1.01 + 1e-6),
    "an int by one": _values(_is_int, lambda v, rng: v + rng.choice((-1, 1))),
    "an int to zero": _values(_is_int, lambda v, _: 0 if v else 2),
    "a flag": _values(lambda v: isinstance(v, bool), lambda v, _: not v),
    "an expression by one": _values(
        _tagged("expr"), lambda v, _: {"expr": f"{v['expr']} + 1"}
    ),
    "an expression doubled": _values(
        _tagged("expr"), lambda v, _: {"expr": f"2*({v['expr']})"}
    ),
    "a dtype": _values(_tagged("dtype"), lambda v, rng: {"dtype": rng.choice(
        [name for name in ("float16", "float32", "float64", "bool") if name != v["dtype"]])}),
    "a text": _values(lambda v: isinstance(v, str), lambda v, _: v + "x"),
    "an argument to none": _values(lambda v: v is not None, lambda v, _: None),
    "another operand": another_operand,
    "two swapped": swapped,
    "left out": left_out,
    "doubled": doubled,
    "another type": another_type,
    "another op": another_op,
    "without a keyword": without_keyword,
}


def kinds_of(program: Json) -> list[str]:
    """All kinds that may have a site in a program."""
    ops = sorted({node["op"] for node in program["nodes"] if "." in node["op"]})
    return [f"{form} in {op}" for form in FORMS for op in ops]


def mutant(program: Json, kind: str, seed: int) -> Mutant | None:
    """A mutant of a kind, at a site that the seed picks; None where there is no site."""
    form, op = kind.rsplit(" in ", 1)
    rng = random.Random(f"{kind} {seed}")
    places = [i for i, node in enumerate(program["nodes"]) if node["op"] == op]
    rng.shuffle(places)
    for place in places[:_TRIES]:
        data = copy.deepcopy(program)
        node = data["nodes"][place]
        if FORMS[form](data, node, rng):
            return Mutant(kind, program["nodes"][place]["name"], data)
    return None
