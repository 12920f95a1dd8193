"""Fill in the mesh coordinates: from one program for all ranks to the program of one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx
from torch.fx.node import map_aggregate

from ringcompile.ir.expr import bind, is_symbolic
from ringcompile.ir.program import Program
from ringcompile.passes.base import Builder, Pass


@dataclass(frozen=True)
class Specialize(Pass):
    """Replace the symbols for mesh coordinates by the numbers of one rank.

    p = positions([ring, 7 - ring], ...)   ->   p = positions([1, 6], ...)      (rank 1 of 4)
    """

    name: ClassVar[str] = "specialize"
    rank: int

    def run(self, program: Program) -> Program:
        """Bind coordinates wherever an argument holds them; symbols of lengths stay."""
        assert program.mesh is not None
        coordinates = program.mesh.coordinates(self.rank)
        builder = Builder()

        def here(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return builder.env[value]
            return bind(value, coordinates) if is_symbolic(value) else value

        for node in program.graph.nodes:
            arguments = map_aggregate((node.args, node.kwargs), here)
            builder.env[node] = builder.copy(node, arguments)
        return program.with_graph(builder.graph, coordinates=coordinates)
