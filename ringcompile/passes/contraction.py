"""matmul, bmm and einsum of two tensors read alike: a name for every dim."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, equal
from ringcompile.ir.nodes import type_of

Names = tuple[Hashable, ...]
_PRODUCTS = ("aten.matmul.default", "aten.bmm.default", "aten.mm.default")
_EINSUM = "aten.einsum.default"
_LETTER = re.compile(r"\.\.\.|[A-Za-z]")


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
    target = str(node.target)
    if target in _PRODUCTS:
        return _of_product(node)
    return _of_einsum(node) if target == _EINSUM else None


def _of_product(node: fx.Node) -> Contraction | None:
    left, right = Call(node).operands
    ranks = [len(type_of(x).shape) for x in (left, right)]
    if min(ranks) < 2:
        return None
    batch = [tuple(range(2 - rank, 0)) for rank in ranks]
    return Contraction(
        node,
        (Operand(left, (*batch[0], "m", "k")), Operand(right, (*batch[1], "k", "n"))),
        (*max(batch, key=len), "m", "n"),
    )


def _of_einsum(node: fx.Node) -> Contraction | None:
    operands = Call(node).operands
    inputs, arrow, output = str(Call(node)["equation"]).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    names = [_spelled(term, x) for term, x in zip(terms, operands, strict=True)]
    result = _spelled(output, node)
    if any(len(set(dims)) < len(dims) for dims in (*names, result)):
        return None  # a diagonal
    return Contraction(
        node, (Operand(operands[0], names[0]), Operand(operands[1], names[1])), result
    )


def _spelled(term: str, x: fx.Node) -> Names:
    """A name for each dim; those that `...` stands for are counted from the right."""
    letters: Sequence[str] = _LETTER.findall(term)
    if "..." not in letters:
        return tuple(letters)
    where, count = letters.index("..."), len(type_of(x).shape) - len(letters) + 1
    return (*letters[:where], *range(-count, 0), *letters[where + 1 :])
