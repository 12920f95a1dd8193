"""A program as JSON for other tools: every node complete in itself, one a line."""

from __future__ import annotations

import json
from typing import Any

from torch import fx

from ringcompile.ir.calls import operands
from ringcompile.ir.program import Program
from ringcompile.ir.serialize import program_to_json


def json_document(program: Program) -> dict[str, Any]:
    """Plain values: what is saved of a program, without its tables.

    Nodes have `name`, `op`, `operands` (the names of the nodes they read), `args` and `kwargs` as
    they are saved (see `ir/serialize.py`), `type` (with its `layout` where a dim is split), `loc`,
    `layer`, and `why` where a pass made them.
    """
    document = program_to_json(program)
    types, locations = document.pop("types"), document.pop("locations")
    document["nodes"] = [
        _node(data, node, types, locations)
        for data, node in zip(document["nodes"], program.graph.nodes, strict=True)
    ]
    return document


def _node(
    data: dict[str, Any], node: fx.Node, types: list[Any], locations: list[Any]
) -> dict[str, Any]:
    read = [operand.name for operand in operands(node)]
    data = {"name": data["name"], "op": data["op"], "operands": read, **data}
    if "type" in data:
        data["type"] = types[data["type"]]
    if "loc" in data:
        file, line, data["layer"] = locations[data["loc"]]
        data["loc"] = {"file": file, "line": line}
    return data


def json_(program: Program) -> str:
    """The document as text, with a line for each node and each weight."""
    document = json_document(program)
    fields = (f"{json.dumps(key)}: {_lines(value)}" for key, value in document.items())
    return "{\n " + ",\n ".join(fields) + "\n}"


def _lines(value: Any) -> str:
    """JSON with an item a line, where items are objects."""
    if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
        items = [f"{json.dumps(key)}: {_flat(item)}" for key, item in value.items()]
        return "{\n  " + ",\n  ".join(items) + "\n }"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n  " + ",\n  ".join(map(_flat, value)) + "\n ]"
    return _flat(value)


def _flat(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
