"""A model as torch.export sees it: tensors by name go in, a flat tuple of tensors comes out.

How arguments and results are nested is no concern of a graph. `FlatCall` puts the arguments of the
example together again around the tensors that it is given, calls the model as the user does, and
takes its result apart. So keyword arguments of any name, flags, numbers, dataclasses and outputs
that are None need nothing from torch.export.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import keyword
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Structure

# What a graph may hold as it is.
CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_CACHE_HINT = "call it with use_cache=False"


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, where `torch.compile` has put one around it."""
    while isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    return model


@dataclasses.dataclass
class _Result:
    """Beside the module, since torch.export takes back what is assigned to a module."""

    structure: Structure | None = None


class FlatCall(nn.Module):
    """Calls a model with the arguments of an example, tensors exchanged for those it is given.

    Attributes:
        model: the user's model; the names of its weights here begin with `PREFIX`.
        example: the tensors among the arguments, by name and in order.
        known: while the model is exported, the inputs whose values are constants; see
            known_values.py.
        around: what is entered around a call then.
    """

    PREFIX = "model."

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._arguments = (args, dict(kwargs))
        named = named_arguments(signature_of(model), args, kwargs)
        # Strides would be taken for a property of the model, and fix its length.
        self.example = {
            name: tensor.contiguous() for name, tensor in with_names(named) if tensor is not None
        }
        self.known: dict[str, torch.Tensor] = {}
        self.around: Callable[[], Any] = contextlib.nullcontext
        self._result = _Result()
        self.forward = _with_signature(self._call, self.example)

    def _call(self, *tensors: torch.Tensor, **by_name: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = zip(self.example, (*tensors, *by_name.values()), strict=True)
        args, kwargs = self.arguments(*(self.known.get(name, tensor) for name, tensor in given))
        leaves: list[torch.Tensor] = []
        with self.around():
            self._result.structure = flat(self.model(*args, **kwargs), leaves)
        return tuple(leaves)

    @property
    def structure(self) -> Structure:
        """How the result of the last call was nested."""
        assert self._result.structure is not None
        return self._result.structure

    def arguments(self, *tensors: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the example with other tensors, which come in the order of `example`."""
        rest = iter(tensors)
        args, kwargs = rebuilt(self._arguments, lambda _: next(rest))
        return args, kwargs


def own_name(name: str) -> str:
    """A weight or module of `FlatCall` by its name in the user's model."""
    return "" if f"{name}." == FlatCall.PREFIX else name.removeprefix(FlatCall.PREFIX)


def flat(value: Any, leaves: list[torch.Tensor]) -> Structure:
    """How a model's result is nested; its tensors are appended to `leaves`.

    Anything with keys or fields counts as a dict.

    Raises:
        RingCompileError: the result holds something that no program could return.
    """
    if torch.is_tensor(value):
        leaves.append(value)
        return Structure("tensor")
    if value is None:
        return Structure("none")
    if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return Structure("constant", value=value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise RingCompileError(
            "the model returns a number that depends on the sequence length besides its tensors",
            hint="compute it from the shapes of the inputs instead",
        )
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return _nested("dict", value.values(), leaves, tuple(value))
    if isinstance(value, tuple | list):
        return _nested("list" if isinstance(value, list) else "tuple", value, leaves)
    if dataclasses.is_dataclass(value) and not _is_cache(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _nested("dict", fields.values(), leaves, tuple(fields))
    if _is_cache(value):
        raise RingCompileError(
            "the model returns a cache of keys and values besides its tensors", hint=_CACHE_HINT
        )
    raise RingCompileError(
        f"the model returns a {type(value).__name__} besides its tensors",
        hint="return tensors, or tuples, lists, dicts and dataclasses of them",
    )


def _nested(
    kind: str, values: Iterable[Any], leaves: list[torch.Tensor], keys: tuple[str, ...] = ()
) -> Structure:
    return Structure(kind, keys, tuple(flat(value, leaves) for value in values))


def _is_cache(value: Any) -> bool:
    return "Cache" in type(value).__name__


# -- arguments -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Signature:
    """How a model is called.

    Attributes:
        name: the model's class, for errors.
        forward: the signature of its forward.
    """

    name: str
    forward: inspect.Signature

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """The arguments by parameter.

        Raises:
            RingCompileError: forward does not take them.
        """
        try:
            return self.forward.bind(*args, **kwargs)
        except TypeError as error:
            raise RingCompileError(
                f"the arguments do not fit {self.name}.forward: {error}",
                hint="pass the arguments that the model is called with",
            ) from None


def signature_of(model: nn.Module) -> Signature:
    """How a model is called."""
    return Signature(type(model).__name__, inspect.signature(model.forward))


def named_arguments(
    signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Arguments in the order in which they were passed, each by its name in the signature.

    Raises:
        RingCompileError: forward does not take them.
    """
    signature.bind(args, kwargs)
    names: list[str] = []
    for parameter in signature.forward.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(len(args) - len(names))]
    return [*zip(names, args, strict=False), *kwargs.items()]


def with_names(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in arguments, each with a name that is an identifier and has not been used."""
    taken: set[str] = set()
    for path, tensor in _tensors(named):
        name = re.sub(r"\W", "_", path).lower()
        name = f"_{name}" if name[:1].isdigit() or keyword.iskeyword(name) else name
        while name in taken:
            name += "_1"
        taken.add(name)
        yield name, tensor


def _tensors(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in named:
        if torch.is_tensor(value):
            yield name, value
        elif (inner := children(value, name)) is not None:
            yield from _tensors((f"{name}_{key}", child) for key, child in inner)


def children(value: Any, name: str = "") -> Iterable[tuple[Any, Any]] | None:
    """What a container of arguments holds, with keys; None of a constant.

    Raises:
        RingCompileError: an object of another kind that holds tensors.
    """
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, tuple | list):
        return enumerate(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    held = () if isinstance(value, CONSTANTS) else getattr(value, "__dict__", {}).values()
    if any(map(torch.is_tensor, held)):
        raise RingCompileError(
            f"the argument '{name}' is a {type(value).__name__}, which holds tensors",
            hint="pass tensors, or tuples, lists, dicts and dataclasses of them",
        )
    return None


def rebuilt(value: Any, exchange: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same arguments with each tensor exchanged, in the order of `_tensors`."""
    if torch.is_tensor(value):
        return exchange(value)
    if children(value) is None:
        return value
    if isinstance(value, Mapping):
        made = {key: rebuilt(child, exchange) for key, child in value.items()}
        return made if type(value) is dict else type(value)(made)  # type: ignore[call-arg]
    if isinstance(value, tuple | list):
        items = [rebuilt(child, exchange) for child in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    fields = dataclasses.fields(value)
    return dataclasses.replace(
        value, **{f.name: rebuilt(getattr(value, f.name), exchange) for f in fields}
    )


def _with_signature(call: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """A function that says which names it takes: torch.export names the inputs of a graph by it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in names]
    )
    return forward
