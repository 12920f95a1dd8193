"""Reading JSON that need not be ours: every member is asked for by its kind."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Structure, Weight
from ringcompile.ir.serialize import CONSTANTS, MAX_INT
from ringcompile.mesh import Mesh

T = TypeVar("T")

_KINDS = {
    dict: "an object", list: "a list", str: "a text", int: "a whole number", bool: "true or false",
}


def expect(value: Any, kind: type[T], what: str) -> T:
    """`value`, if it is JSON of that kind (true is no number); RingCompileError if not."""
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    shown = repr(value) if isinstance(value, int | float | str) else type(value).__name__
    raise RingCompileError(f"{what} is {shown[:60]}, not {_KINDS[kind]}")


def member(data: dict[str, Any], key: str, kind: type[T]) -> T:
    """A member of a JSON object, of that kind; RingCompileError if it is missing or another."""
    if key not in data:
        raise RingCompileError(f"'{key}' is missing")
    return expect(data[key], kind, f"'{key}'")


def texts(data: dict[str, Any], key: str) -> tuple[str, ...]:
    """A member that is a list of texts."""
    return tuple(expect(text, str, f"an entry of '{key}'") for text in member(data, key, list))


def numbers(data: dict[str, Any], key: str) -> dict[str, int]:
    """A member that is an object of counts."""
    return {k: count(v, f"'{k}' of '{key}'") for k, v in member(data, key, dict).items()}


def count(value: Any, what: str) -> int:
    """`value`, if it is a whole number of 64 bits and not negative."""
    number = expect(value, int, what)
    if not 0 <= number < MAX_INT:
        raise RingCompileError(f"{what} is out of range")
    return number


def dtype_from_json(value: Any) -> torch.dtype:
    """The dtype of that name; RingCompileError if there is none."""
    found: torch.dtype = constant("dtype", value)
    return found


def constant(kind: str, name: Any) -> Any:
    """The dtype, layout or memory format of that name; RingCompileError if there is none."""
    known = CONSTANTS[kind]
    if expect(name, str, f"a {kind}") not in known:
        raise RingCompileError(f"'{name[:40]}' is not a {kind}")
    return known[name]


def weight_from_json(name: str, data: Any) -> Weight:
    """Reads back what `weight_to_json` wrote."""
    data = expect(data, dict, f"weight '{name}'")
    shape = tuple(count(size, f"a size of '{name}'") for size in member(data, "shape", list))
    return Weight(name, dtype_from_json(data.get("dtype")), shape)


def range_from_json(data: dict[str, Any], name: str) -> tuple[int, int | None]:
    """A member such as `length_range`: the smallest size, and the largest or null."""
    limits = member(data, name, list)
    if len(limits) != 2:
        raise RingCompileError(f"'{name}' is not a pair")
    low, high = limits
    what = name.removesuffix("_range")
    largest = None if high is None else count(high, f"the largest {what}")
    return count(low, f"the smallest {what}"), largest


def mesh_from_json(spec: str) -> Mesh:
    """The mesh of a parallel spec; RingCompileError if it is none."""
    if len(spec) > 100:
        raise RingCompileError("the parallel spec is too long")
    return Mesh.parse(spec)


def structure_from_json(value: Any) -> Structure:
    """How outputs are nested; RingCompileError if it is not a structure."""
    data = expect(value, dict, "a structure")
    kind = member(data, "kind", str)
    keys = texts(data, "keys") if "keys" in data else ()
    children = tuple(
        map(structure_from_json, member(data, "children", list) if "children" in data else ())
    )
    plain = kind in ("tuple", "list") and not keys
    named = kind == "dict" and len(set(keys)) == len(children) == len(keys)
    leaf = kind in ("tensor", "none", "constant") and not keys and not children
    if not (plain or named or leaf):
        raise RingCompileError(f"'{kind[:40]}' is not a structure of outputs")
    if kind == "constant":
        return Structure(kind, value=_output_constant(data.get("value")))
    return Structure(kind, keys, children)


def _output_constant(value: Any) -> bool | int | float | str:
    if isinstance(value, bool | int | float | str):
        return value
    raise RingCompileError(f"a constant output is {type(value).__name__}")


def values_from_json(given: Any) -> tuple[int, ...] | None:
    """The only entries that an input may have, if there are such."""
    if given is None:
        return None
    values = expect(given, list, "the values of an input")
    if len(values) > 4096 or not all(type(v) is int and abs(v) < MAX_INT for v in values):
        raise RingCompileError("the values of an input are too many, or no whole numbers")
    return tuple(values)


def entry(table: list[T], row: dict[str, Any], key: str) -> T:
    """What a row names by its place in a table."""
    index = member(row, key, int)
    if not 0 <= index < len(table):
        raise RingCompileError(f"'{key}' {index} is not in its table")
    return table[index]
