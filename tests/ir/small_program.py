"""A program in which everything occurs, small enough to damage in every place."""

from typing import Any

import torch
from torch import fx

from ringcompile.errors import SourceLocation
from ringcompile.ir.expr import coordinate, symbol
from ringcompile.ir.layout import Atom, Layout
from ringcompile.ir.program import Input, Program, Structure, Weight
from ringcompile.ir.types import SequenceSplit, TensorType
from ringcompile.mesh import Mesh

x32 = TensorType.whole(torch.float32, (2, symbol("s")))


def small(value: Any = 1.5) -> Program:
    ring, s, n = coordinate("ring"), symbol("s"), symbol("n")
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    y = graph.create_node("call_function", torch.ops.aten.add.Tensor, (x, w), {}, "y")
    z = graph.create_node("call_function", torch.ops.aten.mul.Tensor, (y, value), {}, "z")
    p = graph.create_node(
        "call_function",
        torch.ops.ringcompile.positions.default,
        ([ring, 7 - ring],),
        {"chunk": n / 2, "limit": s},
        "p",
    )
    graph.output((z, p))
    split = Layout(((), (Atom(s, ("ring",)),)))
    for node in (x, w, y, z):
        node.meta.update(type=x32.with_layout(split), loc=SourceLocation("gpt.py", 3, "layers.0"))
    p.meta.update(type=TensorType.whole(torch.int64, (s,)), why="positions")
    return Program(
        graph=graph,
        inputs=(Input("ids", x32),),
        placeholders={"x": "ids"},
        weights={"w": Weight("layer.w", torch.float32, (2, 1))},
        output_structure=Structure("dict", ("a", "b"), (Structure("tensor"),) * 2),
        length_range=(2, 512),
        mesh=Mesh.parse("ring=4"),
        sequence=SequenceSplit((("ring", 4),), "zigzag"),
        passes=("capture", "place"),
        notes=("a note",),
        lengths={"s": 8},
    )
