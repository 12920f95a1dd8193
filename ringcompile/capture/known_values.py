"""Inputs whose values the model's code asks for: they are constants of the program.

A vision tower is told of how many rows and columns of patches each image has, in a tensor; its code
makes Python numbers of that, and positions, windows and the lengths of pieces of these. A graph has
no place for such numbers. So where an export fails on them, or leaves sizes open that only the data
tells, the model is exported again with the values of the example: what follows from these alone is
computed at once, and what of that meets other values stands in the program as a constant. The
program still takes these inputs, and refuses other values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

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
    """While inside, the model is given numbers for these inputs, and computes with them."""
    if not names:
        yield
        return
    call.known, call.around = {name: call.example[name] for name in names}, OnKnownValues
    try:
        yield
    finally:
        call.known, call.around = {}, contextlib.nullcontext


class OnKnownValues(TorchFunctionMode):
    """Computes at once what depends on no input, weight or size that varies.

    Whole numbers begin as such where a model makes them of Python's numbers.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The function's result, computed or traced."""
        leaves = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        if not _is_known(func, leaves):
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            return func(*args, **(kwargs or {}))


_FACTORIES = frozenset({torch.arange, torch.tensor})


def _is_known(func: Callable[..., Any], leaves: list[Any]) -> bool:
    """Whether all that a function reads is numbers, and tensors that were computed of them."""
    if any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves):
        return False
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors:
        return func in _FACTORIES and not any(isinstance(leaf, float) for leaf in leaves)
    return all(type(x) is torch.Tensor and not torch._is_functional_tensor(x) for x in tensors)


def notes_on(example: Example) -> tuple[str, ...]:
    """What the caller should know of inputs that are constants."""
    return tuple(
        f"the program is for these values of the input '{leaf.name}' alone, because the model's "
        f"code decides by them: {leaf.tensor.tolist()}"
        for leaf in example.leaves if leaf.name in example.known
    )
