"""Later calls of a model that was captured: which of their arguments are inputs, and what returns.

A captured program has the flags and numbers of its example in it. Whoever calls it as the model
itself is told where a call differs in more than its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ringcompile.capture.flat_call import (
    CONSTANTS,
    children,
    named_arguments,
    rebuilt,
    signature_of,
    with_names,
)
from ringcompile.capture.huggingface import without_cache
from ringcompile.errors import RingCompileError


class SameCall:
    """Reads calls with the signature of a model, against the example that it was captured with.

    The model itself is not kept, so that its weights can be freed.

    Args:
        model: the model; called once with the example, to see what it returns.
        args: the example's arguments by position.
        kwargs: the others.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._signature = signature_of(model)
        self._constants = self._constants_of(args, kwargs)
        with torch.no_grad(), without_cache(model):
            result = model(*args, **kwargs)
        self._result = rebuilt(result, lambda _: torch.empty(0))

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of a call, by the names that the program gives its inputs.

        Raises:
            RingCompileError: the model's forward does not take the arguments, or an argument that
                is no tensor differs from the example's.
        """
        named = dict(with_names(named_arguments(self._signature, args, kwargs)))
        found, wanted = self._constants_of(args, kwargs), self._constants
        for path in dict.fromkeys((*wanted, *found)):
            if path in found and path in wanted and _same(found[path], wanted[path]):
                continue
            raise RingCompileError(
                f"the argument '{path}' is {_text(found, path)} in this call, and "
                f"{_text(wanted, path)} in the example that the model was captured with",
                hint="only tensors may change from call to call; parallelize the model again for "
                "other flags and numbers",
            )
        return named

    def result(self, tensors: Iterable[Any]) -> Any:
        """What the model would return, around other tensors in the same order."""
        rest = iter(tensors)
        return rebuilt(self._result, lambda _: next(rest))

    def _constants_of(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What is no tensor among the arguments of a call, defaults included, by its path."""
        bound = self._signature.bind(args, kwargs)
        bound.apply_defaults()
        return dict(_constants(bound.arguments.items()))


def _constants(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for name, value in named:
        if torch.is_tensor(value):
            continue
        inner = children(value, name)
        if inner is None:
            yield name, value
        else:
            yield from _constants((f"{name}.{key}", child) for key, child in inner)


def _same(value: Any, other: Any) -> bool:
    if value is other:
        return True
    return type(value) is type(other) and isinstance(value, CONSTANTS) and value == other


def _text(constants: Mapping[str, Any], path: str) -> str:
    return repr(constants[path]) if path in constants else "a tensor, or missing"
