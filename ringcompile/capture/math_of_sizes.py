"""Functions of sizes that torch.export would turn into numbers: `math.log(x.shape[1])`.

Python's `math` asks a size for the number that it is in the example, which fixes the length. While
a model is captured, these functions take sizes as they are, and so do those of torch that would ask
for numbers (`functions_of_sizes`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from torch._export.verifier import Verifier

from ringcompile.capture.functions_of_sizes import FUNCTIONS

_log2: Any = vars(torch)["_sym_log2"]
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sqrt": torch.sym_sqrt,
    "log2": _log2,
    "log": lambda size: _log2(size) * math.log(2),
    "exp": lambda size: math.e**size,
}


@contextlib.contextmanager
def math_of_sizes() -> Iterator[None]:
    """While inside, functions of `math` and of torch keep sizes of inputs symbolic."""
    with contextlib.ExitStack() as stack:
        for name, symbolic in _FUNCTIONS.items():
            changed = _of_sizes(getattr(math, name), symbolic)
            stack.enter_context(mock.patch.object(math, name, changed))
        allowed = _and_functions(Verifier.allowed_op_types)
        stack.enter_context(mock.patch.object(Verifier, "allowed_op_types", allowed))
        for module, name, symbolic in FUNCTIONS:
            changed = symbolic(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, changed))
        yield


def _and_functions(original: Callable[[Any], tuple[type, ...]]) -> Callable[[Any], Any]:
    """Torch's check of an exported graph knows `sym_sqrt` and no `_sym_log2`."""
    return lambda verifier: (*original(verifier), FunctionType)


def _of_sizes(original: Callable[..., Any], symbolic: Callable[[Any], Any]) -> Callable[..., Any]:
    def function(value: Any, *base: Any) -> Any:
        if not isinstance(value, torch.SymInt | torch.SymFloat):
            return original(value, *base)
        found = symbolic(value)
        return found / math.log(*base) if base else found

    return function
