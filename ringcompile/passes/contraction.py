"""matmul, bmm and einsum of two tensors read alike: a name for every dim."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import fx

from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.expr import Size, equal
from ringcompile.ir.nodes import type_of
from ringcompile.ir.rules.base import Names
from ringcompile.ir.rules.contraction import TERMS

# A linear layer is none: its second operand is a weight, not another value of the model.
_PRODUCTS = ("aten.matmul.default", "aten.bmm.default", "aten.mm.default", "aten.einsum.default")


@dataclass(frozen=True)
class Operand:
    """A factor of a product, with a name for each of its dims."""

    node: fx.Node
    names: Names


@dataclass(frozen=True)
class Contraction:
    """A product of two tensors that is summed over the names its output lacks.

    Dims of one name have one size, or are 1 and broadcast.
    """

    node: fx.Node
    operands: tuple[Operand, Operand]
    output: Names

    @property
    def summed(self) -> set[Hashable]:
        """The names that both operands have and the output lacks."""
        left, right = (set(operand.names) for operand in self.operands)
        return (left & right) - set(self.output)

    @property
    def is_product(self) -> bool:
        """Every name that an operand has alone is in the output: nothing is summed by itself."""
        left, right = (set(operand.names) for operand in self.operands)
        return (left ^ right) <= set(self.output)

    def alone(self, which: int) -> set[Hashable]:
        """The names of one operand that the other lacks."""
        return set(self.operands[which].names) - set(self.operands[1 - which].names)

    def size(self, name: Hashable) -> Size:
        """The size of a name; that of the larger dim where one is broadcast."""
        found: Size = 1
        for operand in self.operands:
            for own, size in zip(operand.names, type_of(operand.node).shape, strict=True):
                if own == name and not equal(size, 1):
                    found = size
        return found


def read(node: fx.Node) -> Contraction | None:
    """The contraction that a node computes, or None."""
    target = target_name(node.target)
    if target not in _PRODUCTS or len(Call(node).operands) != 2:
        return None
    call = Call(node)
    terms = TERMS[target](call)
    if any(len(set(dims)) < len(dims) for dims in (*terms.operands, terms.output)):
        return None  # a diagonal
    if min(map(len, terms.operands)) < 2:
        return None
    left, right = map(Operand, call.operands, terms.operands)
    return Contraction(node, (left, right), terms.output)
