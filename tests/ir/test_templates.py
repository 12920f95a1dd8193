"""Texts of sections are filled at once, and one by one where that would not tell them apart."""

from __future__ import annotations

from typing import Any

import pytest
from torch import fx

from ringcompile.ir.stretched import Section
from ringcompile.ir.templates import Templates


def filled(separator: str) -> tuple[list[str], list[str]]:
    """The texts of a section and of one ahead of it, whose nodes have other names."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = [graph.call_function(abs, (x,), name="first"), graph.call_function(abs, (x,))]
    nodes[1].args = (nodes[0],)

    def write(node: fx.Node, said: Any) -> str:
        return f"{said(node)} = 100 %{separator}({', '.join(map(said, node.all_input_nodes))})"

    templates, texts = Templates(write), []
    for ahead in (0, 1):
        names = {node: f"{node.name}{'_more' * ahead}" for node in graph.nodes}
        section = Section(nodes, names, None, ahead)
        texts.append(templates.texts(section, names.__getitem__, names.__getitem__))
    return texts[0], texts[1]


@pytest.mark.parametrize("separator", ["", " %s", "\x00", "\ue000"], ids=ascii)
def test_sections_ahead_are_written_as_the_first_with_other_names(separator: str) -> None:
    first, ahead = filled(separator)
    assert first == [f"first = 100 %{separator}(x)", f"abs_1 = 100 %{separator}(first)"]
    assert ahead == [text.replace("first", "first_more").replace("abs_1", "abs_1_more")
                     .replace("(x)", "(x_more)") for text in first]
