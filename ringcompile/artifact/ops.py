"""The ops that a saved program may hold, and the only way from a name in a file to a function."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.pure_ops import is_pure_name
from ringcompile.ir.rules import RULES
from ringcompile.ir.serialize import PYTHON_OPS
from ringcompile.ops.schemas import NAMESPACE, SCHEMAS


def allowed_ops() -> frozenset[str]:
    """The ops by name: the rule table's, our own, and picking one of an op's several results."""
    return frozenset({*RULES, *PYTHON_OPS, *(f"{NAMESPACE}.{name}.default" for name in SCHEMAS)})


class AllowedOps(Container[str]):
    """`allowed_ops`, and torch's functions of their operands alone, which need no row."""

    def __init__(self) -> None:
        self.named = allowed_ops()

    def __contains__(self, name: object) -> bool:
        return name in self.named or (isinstance(name, str) and is_pure_name(name))


@lru_cache(maxsize=4096)
def resolve(name: str) -> Callable[..., Any]:
    """The op of a name that the caller has found to be allowed.

    Raises:
        RingCompileError: it is not the name of an op, or this torch has none of that name.
    """
    if name in PYTHON_OPS:
        return PYTHON_OPS[name]
    parts = name.split(".")
    if len(parts) != 3 or not (parts[0] in ("aten", NAMESPACE) or name in RULES):
        raise RingCompileError(f"'{name}' is not the name of an op")
    try:
        target = getattr(getattr(getattr(torch.ops, parts[0]), parts[1]), parts[2])
    except AttributeError:
        target = None
    if not isinstance(target, torch._ops.OpOverload):
        raise RingCompileError(
            f"torch {torch.__version__} has no op '{name}'", hint="use the torch that saved it"
        )
    return target


def check_arguments(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise RingCompileError where arguments do not fit an op's schema.

    Their number and names have to; None may stand only where an argument is optional, and text or
    lists nowhere in place of a tensor, which a number may be.
    """
    if target is operator.getitem:
        if kwargs or [type(arg) for arg in args] != [fx.Node, int]:
            raise RingCompileError("the arguments do not fit: one of several results, by its index")
        return
    if not isinstance(target, torch._ops.OpOverload):
        return
    positional, kinds, needed = _parameters(target)
    given = [*positional[: len(args)], *kwargs]
    names = set(given)
    fits = len(args) <= len(positional) and len(names) == len(given)
    if not fits or not needed <= names <= kinds.keys():
        raise RingCompileError(f"the arguments do not fit {target._schema}")
    for name, value in zip(given, [*args, *kwargs.values()], strict=True):
        if not kinds[name].fits(value):
            raise RingCompileError(f"the argument '{name}' does not fit {target._schema}")


class _ArgumentKind(NamedTuple):
    """What a schema says of an argument.

    Attributes:
        optional: whether it may be None.
        entries: the kind of its entries where it is a list; None where it is none.
        tensor: whether it is a tensor.
    """

    optional: bool
    entries: _ArgumentKind | None
    tensor: bool

    def fits(self, value: Any) -> bool:
        """Whether a value may be a tensor where one is wanted, and is given where it has to be."""
        if value is None:
            return self.optional
        if isinstance(value, list | tuple):
            return self.entries is not None and all(map(self.entries.fits, value))
        return not (self.tensor and isinstance(value, str))


def _kind(of: Any) -> _ArgumentKind:
    if isinstance(of, torch.OptionalType):
        return _kind(of.getElementType())._replace(optional=True)
    entries = _kind(of.getElementType()) if isinstance(of, torch.ListType) else None
    return _ArgumentKind(False, entries, isinstance(of, torch.TensorType))


@lru_cache(maxsize=4096)  # torch looks every type up anew
def _parameters(target: Any) -> tuple[list[str], dict[str, _ArgumentKind], frozenset[str]]:
    """The names of an op's positional arguments, the kinds of all, and those without a default."""
    arguments = target._schema.arguments
    return (
        [a.name for a in arguments if not a.kwarg_only],
        {a.name: _kind(a.type) for a in arguments},
        frozenset(a.name for a in arguments if not a.has_default_value()),
    )
