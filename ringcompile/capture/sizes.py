"""What became of the sizes of inputs in an exported program: which are the batch, the length.

Every dim that may vary is exported as a symbol of its own. The code then says more than the sizes
of the example: a symbol that it made equal to the batch of the first input is the batch, one that
it turned into a number is a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ringcompile.capture.dims import BATCH, FIXED, LENGTHS, OTHERS, SEQUENCE, Example, Leaf
from ringcompile.errors import RingCompileError
from ringcompile.ir import expr


@dataclass
class Sizes:
    """The symbols of an exported program, by what they mean.

    Attributes:
        symbols: torch's name -> ours, `b`, `s`, `s2`, ...
        names: an input's dim, as torch's guards write it -> the role it turned out to have, or the
            number that it is.
        numbers: roles that the code turned into numbers, all of them.
        loose: dims of inputs that could be the batch by their size alone, and are not.
        tied: whether lengths depend on each other otherwise than by being equal, or are joined.
    """

    symbols: dict[str, sympy.Symbol] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    numbers: set[str] = field(default_factory=set)
    loose: list[str] = field(default_factory=list)
    tied: bool = False


def user_inputs(exported: ExportedProgram) -> list[torch.fx.Node]:
    """The placeholders of the tensors that the caller passes, in order."""
    names = {
        spec.arg.name
        for spec in exported.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    }
    return [
        node
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.name in names and torch.is_tensor(node.meta["val"])
    ]


def read_sizes(exported: ExportedProgram, example: Example) -> Sizes:
    """Which symbols are the batch and which are lengths.

    Raises:
        RingCompileError: a feature size of the first input equals the example's length.
    """
    dims = list(_dims(exported, example))
    found = Sizes()
    anchors = {role: _anchor(dims, role) for role in SYMBOLS}
    for role, anchor in anchors.items():
        if _has(example, role) and anchor is None:
            found.numbers |= {role} if role not in OTHERS or _is_said(example, role) else set()
    first = dims[0][0] if dims else None
    for leaf, dim, size in dims:
        if is_number(size):
            found.names[leaf.size_text(dim)] = str(size)
            if example.widened and leaf.roles[dim] == BATCH and anchors[BATCH] is not None:
                found.loose.append(leaf.size_text(dim))  # it is 1, and was so for another reason
            continue
        meant = _role(leaf, dim, size, anchors)
        if meant is None:
            continue
        if leaf is first and meant == SEQUENCE and not leaf.said and size != anchors[SEQUENCE]:
            raise RingCompileError(
                f"the example length {example.length} is also the size of another dim, so it is "
                "not clear which dim is the sequence",
                hint="choose an example length that differs from all other sizes of the inputs, "
                     "or name the dims: dims={{'{leaf.name}': {{0: 'batch', 1: 'sequence'}}}}",
            )
        if meant == BATCH and size != anchors[BATCH] and _is_loose(leaf, dim, dims, anchors[BATCH]):
            found.loose.append(leaf.size_text(dim))
        found.tied |= bool(example.others) and not size.is_Symbol
        ours = expr.symbol(SYMBOLS[meant])
        found.symbols.update({free.name: ours for free in size.free_symbols})
        found.names[leaf.size_text(dim)] = meant
    found.tied |= bool(example.others) and _joins_lengths(exported, found)
    return found


def _joins_lengths(exported: ExportedProgram, sizes: Sizes) -> bool:
    """Whether some value holds tokens of several lengths, one behind the other, or cut by another.

    Then they are one sequence, of which a part is fixed.
    """
    ours = {
        name: str(symbol) for name, symbol in sizes.symbols.items() if str(symbol) in expr.LENGTHS
    }
    return any(_mixes(size, ours) for size in set(_sizes_of_values(exported)))


def _sizes_of_values(exported: ExportedProgram) -> Iterator[Any]:
    for node in exported.graph.nodes:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            shape: Any = value.shape if torch.is_tensor(value) else ()
            yield from (size.node.expr for size in shape if isinstance(size, torch.SymInt))


def _mixes(size: Any, ours: dict[str, str]) -> bool:
    """Whether a size is more than a product of lengths, and of several of them."""
    def lengths(part: Any) -> set[str]:
        return {ours[free.name] for free in part.free_symbols if free.name in ours}

    factors = sympy.Mul.make_args(sympy.factor(size)) if len(lengths(size)) > 1 else ()
    return any(len(lengths(factor)) > 1 for factor in factors)


def read_squeezed(exported: ExportedProgram, sizes: Sizes) -> set[str]:
    """The roles of dims that `squeeze` leaves out where they are 1: the code is for 2 or more."""
    found: set[str] = set()
    for node in exported.graph.nodes:
        if not str(node.target).startswith("aten.squeeze."):
            continue
        shape = node.args[0].meta["val"].shape
        dims = node.args[1] if len(node.args) > 1 else range(len(shape))
        for dim in [dims] if isinstance(dims, int) else dims:
            if isinstance(shape[dim], torch.SymInt) and not is_number(shape[dim].node.expr):
                ours = {str(sizes.symbols.get(s.name)) for s in shape[dim].node.expr.free_symbols}
                found |= {role for role, name in SYMBOLS.items() if name in ours}
    return found


# What our expressions call the size with a role.
SYMBOLS = {BATCH: expr.BATCH, **{role: name for name, role in LENGTHS.items()}}


def is_number(size: Any) -> bool:
    """Whether a size of an input is no symbol, and no expression in symbols."""
    return isinstance(size, int) or bool(size.is_number)


def _dims(exported: ExportedProgram, example: Example) -> Iterator[tuple[Leaf, int, Any]]:
    """Every dim of the inputs that was to vary: the leaf, the dim, and its size in the program."""
    for leaf, node in zip(example.leaves, user_inputs(exported), strict=True):
        for dim, size in enumerate(node.meta["val"].shape):
            if leaf.roles[dim] != FIXED:
                yield leaf, dim, size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _anchor(dims: list[tuple[Leaf, int, Any]], role: str) -> Any:
    """The symbol that means a role: what is said, else of the first input; None if a number."""
    sizes = [(leaf, size) for leaf, dim, size in dims if leaf.roles[dim] == role]
    said = [size for leaf, size in sizes if leaf.said]
    for size in said or [size for _, size in (sizes if role in OTHERS else sizes[:1])]:
        if not is_number(size):
            return size
    return None


def _role(leaf: Leaf, dim: int, size: Any, anchors: dict[str, Any]) -> str | None:
    """What a dim is: as the code says, else as the caller, else as its size."""
    for role in (*LENGTHS.values(), BATCH):
        if anchors[role] is not None and size == anchors[role]:
            return role
    role = leaf.roles[dim]
    return role if anchors[role] is not None or leaf.said else None


def _has(example: Example, role: str) -> bool:
    return any(leaf.dims_of(role) for leaf in example.leaves)


def _is_said(example: Example, role: str) -> bool:
    return any(leaf.said and leaf.dims_of(role) for leaf in example.leaves)


def _is_loose(leaf: Leaf, dim: int, dims: list[tuple[Leaf, int, Any]], anchor: Any) -> bool:
    """Whether a dim that the code does not tie to the batch is only equal to it by chance.

    An input has one batch dim: the one that is tied to it, or else the first. An input of one or
    two dims of floats without the sequence is more likely a table.
    """
    if leaf.said:
        return False
    others = [(i, size) for other, i, size in dims if other is leaf and i != dim]
    if any(size == anchor for _, size in others) or any(
        i < dim and leaf.roles[i] == BATCH for i, _ in others
    ):
        return True
    return leaf.tensor.is_floating_point() and leaf.tensor.dim() < 3 and SEQUENCE not in leaf.roles
