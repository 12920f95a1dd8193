"""A program as a graph for other tools: DOT for graphviz, GraphML for networkx and Gephi."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any

from torch import fx

from ringcompile.ir.call_text import op_name
from ringcompile.ir.communication import COMMUNICATION
from ringcompile.ir.nodes import location_of
from ringcompile.ir.printer import block_of, type_text, value_names
from ringcompile.ir.program import Program
from ringcompile.later import Later

if TYPE_CHECKING:
    import networkx as nx
else:
    nx = Later("networkx")


def graph_of(program: Program) -> nx.DiGraph:
    """Values as nodes, named as `dump` names them, with an edge from each to what reads it.

    Nodes have `op`, `type`, `layer`, `line`, `block`, and `axis` where ranks communicate. Weights
    are left out.
    """
    names, graph = value_names(program), nx.DiGraph(model=program.name)
    for node in _shown(program):
        graph.add_node(names[node], **_facts(program, node))
    for node in _shown(program):
        for operand in node.all_input_nodes:
            if names[operand] in graph:
                graph.add_edge(names[operand], names[node])
    return graph


def _shown(program: Program) -> Iterator[fx.Node]:
    for node in program.graph.nodes:
        if node.op != "output" and node.name not in program.weights:
            yield node


def _facts(program: Program, node: fx.Node) -> dict[str, Any]:
    place = location_of(node)
    talks = str(node.target) in COMMUNICATION and "axis" in node.kwargs
    return {
        "op": op_name(node) if node.op == "call_function" else "input",
        "type": type_text(program, node.meta.get("type")),
        "layer": place.layer, "line": place.short, "block": block_of(node),
        "axis": str(node.kwargs["axis"]) if talks else "",
    }


def dot(program: Program) -> str:
    """DOT text: a cluster for each block of the model; what ranks exchange is orange."""
    graph = graph_of(program)
    blocks: dict[str, list[str]] = {}
    for name, facts in graph.nodes(data=True):
        label = f"{name} {facts['op']}\n{facts['type']}"
        color = ' style=filled fillcolor="#ffe4bf"' if facts["axis"] else ""
        line = f"{_quoted(name)} [label={_quoted(label)}{color}];"
        blocks.setdefault(facts["block"], []).append(line)
    lines = [f"digraph {_quoted(program.name)} {{", "  node [shape=box fontsize=10];"]
    for number, (block, members) in enumerate(blocks.items()):
        if block:
            lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(block)};"]
            lines += [*(f"    {member}" for member in members), "  }"]
        else:
            lines += [f"  {member}" for member in members]
    lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in graph.edges]
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def graphml(program: Program) -> str:
    """GraphML text."""
    stream = BytesIO()
    nx.write_graphml(graph_of(program), stream)
    return stream.getvalue().decode()
