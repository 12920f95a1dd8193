"""Few ops for many: what torch writes in several ways is written in one.

Views become `reshape`, dim orders `permute`, pieces `slice`, constants `full`, positions `arange`;
casts that change nothing, device moves, copies and checks of metadata disappear. Rules and later
passes then have one case each. The rewrites themselves are in `rewrites/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx
from torch.utils import _pytree as pytree

from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import depends_on_data
from ringcompile.ir.nodes import error_at
from ringcompile.ir.program import Program
from ringcompile.passes.base import Builder, Pass, refuse
from ringcompile.passes.canonicalize.rewrites import REWRITES, short_name


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrite aten calls into the canonical few.

        y = view(x, [1, s, -1, 16]); z = transpose(y, 1, 2); a, b = split(z, 8, -1)
    ->  y = reshape(x, [1, s, 4, 16]); z = permute(y, [0, 2, 1, 3]); a = slice(z, 3, 0, 8); b = ...
    """

    name: ClassVar[str] = "canonicalize"

    def run(self, program: Program) -> Program:
        """Look each call up in `REWRITES`; what is not there stays as it was."""
        builder = Builder()
        for node in program.graph.nodes:
            builder.at(node)
            rewrite = REWRITES.get(short_name(node)) if node.op == "call_function" else None
            try:
                new = rewrite(builder, node) if rewrite else builder.copy(node)
            except RingCompileError as error:
                raise refuse(node, error) from None
            builder.env[node] = new
            _check_arguments(new)
        return program.with_graph(builder.graph)


def _check_arguments(node: Any) -> None:
    """A size that only the data tells may be that of a tensor, but no number in the graph."""
    if isinstance(node, fx.Node) and node.op == "call_function":
        leaves = pytree.tree_leaves((node.args, node.kwargs))
        unknown = next((leaf for leaf in leaves if depends_on_data(leaf)), None)
        if unknown is not None:
            raise error_at(
                node,
                f"a size depends on the data (torch calls it {unknown})",
                hint="sizes may depend on the lengths of inputs, not on their values",
            )
