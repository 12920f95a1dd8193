"""Which matrix products of a program each rank computes for its own tokens, heads or features."""

from __future__ import annotations

from torch import fx

from ringcompile.ir.expr import LOCAL, is_symbolic, symbols_in
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType

# Ops that multiply weights with activations, or activations with one another.
_PRODUCTS = frozenset({
    "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "einsum", "expert_linear",
    "linear", "matmul", "mm",
})


def products_of(program: Program) -> list[TensorType]:
    """What matrix products and convolutions give."""
    return [
        type_of(node)
        for node in program.graph.nodes
        if node.op == "call_function" and _op_name(node) in _PRODUCTS
    ]


def with_share(type_: TensorType) -> bool:
    """Whether a rank computes only its share, of tokens in windows too."""
    sizes = [size for size in type_.shape if is_symbolic(size)]
    return bool(type_.layout.axes) or any(LOCAL in symbols_in(size) for size in sizes)


def _op_name(node: fx.Node) -> str:
    """`linear` for `aten.linear.default`."""
    return str(node.target).partition(".")[2].partition(".")[0]
