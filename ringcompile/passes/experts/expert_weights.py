"""A rank's share of experts' weights along `ep`: read, or unpacked from what is read."""

from __future__ import annotations

from torch import fx

from ringcompile.ir.layout import Atom, Layout
from ringcompile.ir.nodes import error_at, layout_of, type_of
from ringcompile.ir.program import Weight
from ringcompile.mesh import Mesh
from ringcompile.passes.base import Builder
from ringcompile.passes.experts.expert_groups import Group
from ringcompile.passes.requests import Requests

EP = "ep"


class ExpertWeights(Requests):
    """Weights of some experts only.

    Args:
        builder: writes the graph.
        mesh: the parallel plan.
        weights: of the program that is written, by placeholder; shares are added.
    """

    def __init__(self, builder: Builder, mesh: Mesh, weights: dict[str, Weight]) -> None:
        super().__init__(builder, dict(mesh.axes))
        self.weights = weights

    def share(self, weight: fx.Node) -> fx.Node:
        """The entries of a weight [E, ...] of the model for this rank's experts."""
        layout = layout_of(weight).with_dim(0, (Atom(type_of(weight).shape[0], (EP,)),))
        return self.request(self.builder.env[weight], layout)

    def input_again(self, node: fx.Node, wanted: Layout) -> fx.Node | None:
        """A weight by its share; each rank reads nothing else of it."""
        if node.name not in self.weights:
            return None
        again = self.builder.placeholder(f"{node.name}_ep", type_of(node).with_layout(wanted))
        self.weights[again.name] = self.weights[node.name]
        return again


def experts_of_rank(group: Group, mesh: Mesh) -> int:
    """How many experts a rank along `ep` has.

    Raises:
        RingCompileError: they do not divide over `ep`.
    """
    ways = mesh.size(EP)
    if group.num_experts % ways:
        raise error_at(
            group.nodes[0],
            f"{group.num_experts} experts do not divide over ep={ways}",
            hint=f"use an ep that divides {group.num_experts}",
        )
    return group.num_experts // ways


def no_experts(mesh: Mesh, whose: str) -> str:
    """What a note says where no experts are found that could be split.

    Args:
        mesh: the parallel plan.
        whose: on which tokens each rank runs all of them.
    """
    return (
        f"no experts that could be split were found: their weights are replicated along "
        f"ep={mesh.size(EP)}, and each of its ranks runs all of them on {whose}"
    )
