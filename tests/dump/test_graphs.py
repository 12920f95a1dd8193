"""DOT and GraphML of a program."""

from __future__ import annotations

import io
import re

import networkx as nx

import ringcompile as rc
from ringcompile.dump import render
from ringcompile.ir.program import Program
from tests.support import zoo_program


def program() -> Program:
    return rc.transform(zoo_program("llama-tiny", "llama-tiny", sequence=24), "ring=2").rank(1)


def test_graphml_is_read_back_with_what_ranks_exchange() -> None:
    one = program()
    found = nx.read_graphml(io.BytesIO(render(one, "graphml").encode()))
    calls = [node for node in one.graph.nodes if node.op == "call_function"]
    assert len(found) == len(calls) + len(one.inputs)
    shifts = [facts for _, facts in found.nodes(data=True) if facts["op"] == "ring.shift_start"]
    assert {facts["axis"] for facts in shifts} == {"ring"}
    assert len(shifts) == 2
    assert nx.is_directed_acyclic_graph(found)


def test_dot_has_a_cluster_for_each_block() -> None:
    text = render(program(), "dot")
    assert re.findall(r'(?m)^    label="(.*)";$', text) == ["blocks.0", "blocks.1"]
    assert text.count("{") == text.count("}") == 3
    assert re.search(r'"%\d+" -> "%\d+";', text)
    assert 'fillcolor="#ffe4bf"' in text
