"""Arithmetic of symbolic sizes that torch does anew each time: what `s0 * 8` is, whether `s0 == 1`.

For the strides of every value torch multiplies and compares sizes, and a model asks for the same
few hundred results ten thousand times. A result depends on nothing but the expressions, their types
and the numbers of the example, so it is remembered while a model is captured. What torch concludes
from a result, its guards, is not: they are asked for and noted as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.sym_node import SymNode

_Operation = Callable[[SymNode, SymNode], SymNode]
# The operations of two sizes by the names of torch's methods; another torch may have others.
_OPERATIONS = (
    "add", "sub", "mul", "mod", "int_floordiv", "eq", "ne", "ge", "gt", "le", "lt", "sym_max",
    "sym_min", "and_", "or_",
)  # fmt: skip


@contextlib.contextmanager
def sizes_remembered() -> Iterator[None]:
    """While inside, torch computes with the same two symbolic sizes once."""
    known: dict[Any, SymNode] = {}
    with contextlib.ExitStack() as stack:
        for name in _OPERATIONS:
            original = getattr(SymNode, f"_{name}", None)
            if original is not None:
                once = _once(name, original, known)
                stack.enter_context(mock.patch.object(SymNode, f"_{name}", once))
        yield


def _once(name: str, original: _Operation, known: dict[Any, SymNode]) -> _Operation:
    def operation(size: SymNode, other: SymNode) -> SymNode:
        if get_proxy_mode() is not None:  # the operation itself is traced
            return original(size, other)
        key = (
            name, size.shape_env, size.expr, size.pytype, size.hint,
            other.expr, other.pytype, other.hint,
        )  # fmt: skip
        found = known.get(key)
        if found is None:
            found = known[key] = original(size, other)
        return found

    return operation
