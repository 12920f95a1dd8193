"""Inputs whose values the model's code asks for: they are constants of the program.

A vision tower is told of how many rows and columns of patches each image has, in a tensor; its code
makes Python numbers of that, and positions, windows and the lengths of pieces of these. A graph has
no place for such numbers. So where an export fails on them, or leaves sizes open that only the data
tells, the model is exported again with the values of the example: torch then computes at once what
follows from them. The program still takes these inputs, and refuses other values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses import fake_tensor
from torch.export import ExportedProgram
from torch.fx.experimental import proxy_tensor

from ringcompile.capture.dims import SEQUENCE, Example, Leaf
from ringcompile.capture.flat_call import FlatCall
from ringcompile.ir.expr import UNBACKED

# Rows of so many numbers are counts, as of frames, rows and columns; longer rows are tokens.
_COUNTS = (2, 3)
_MOST = 1024


def may_be_known(example: Example) -> tuple[str, ...]:
    """The inputs that may be constants: whole numbers, one after another or two or three in a row.

    Tokens are none of them: neither the first input, nor what is as long as it.
    """
    return tuple(leaf.name for leaf in example.leaves[1:] if _is_count(leaf))


def _is_count(leaf: Leaf) -> bool:
    shape, dtype = leaf.tensor.shape, leaf.tensor.dtype
    whole = dtype in (torch.int32, torch.int64) and SEQUENCE not in leaf.roles and not leaf.said
    return whole and leaf.tensor.numel() <= _MOST and (
        len(shape) == 1 or (len(shape) == 2 and shape[1] in _COUNTS)
    )


def asks_for_values(exported: ExportedProgram) -> bool:
    """Whether a size in a graph depends on values of tensors."""
    for node in exported.graph.nodes:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            for size in value.shape if torch.is_tensor(value) else (value,):
                names = getattr(getattr(size, "node", None), "expr", None)
                if any(UNBACKED.fullmatch(str(s)) for s in getattr(names, "free_symbols", ())):
                    return True
    return False


@contextlib.contextmanager
def known(call: FlatCall, names: tuple[str, ...]) -> Iterator[None]:
    """While inside, the model is given constants for these inputs, and torch computes with them."""
    limits = fake_tensor.CONSTANT_NUMEL_LIMIT, proxy_tensor.CONSTANT_NUMEL_LIMIT
    call.known = {
        name: (call.example[name].tolist(), call.example[name].dtype) for name in names
    }
    if names:  # torch follows constants of one entry; here of all their entries
        fake_tensor.CONSTANT_NUMEL_LIMIT = proxy_tensor.CONSTANT_NUMEL_LIMIT = _MOST**2
    try:
        yield
    finally:
        call.known = {}
        fake_tensor.CONSTANT_NUMEL_LIMIT, proxy_tensor.CONSTANT_NUMEL_LIMIT = limits


def notes_on(example: Example) -> tuple[str, ...]:
    """What the caller should know of inputs that are constants."""
    return tuple(
        f"the program is for these values of the input '{leaf.name}' alone, because the model's "
        f"code decides by them: {leaf.tensor.tolist()}"
        for leaf in example.leaves if leaf.name in example.known
    )
