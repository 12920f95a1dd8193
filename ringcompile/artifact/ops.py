"""The ops that a saved program may hold, and the only way from a name in a file to a function."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container
from functools import lru_cache
from typing import Any

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
    arguments = target._schema.arguments
    positional = [a.name for a in arguments if not a.kwarg_only]
    given = [*positional[: len(args)], *kwargs]
    needed = {a.name for a in arguments if not a.has_default_value()}
    fits = len(args) <= len(positional) and len(set(given)) == len(given)
    if not fits or not needed <= set(given) <= {a.name for a in arguments}:
        raise RingCompileError(f"the arguments do not fit {target._schema}")
    types = {a.name: a.type for a in arguments}
    for name, value in zip(given, [*args, *kwargs.values()], strict=True):
        if not _fits(types[name], value):
            raise RingCompileError(f"the argument '{name}' does not fit {target._schema}")


def _fits(kind: Any, value: Any) -> bool:
    """Whether an argument may be a tensor where one is wanted, and is given where it has to be."""
    if isinstance(kind, torch.OptionalType):
        return value is None or _fits(kind.getElementType(), value)
    if isinstance(value, list | tuple):
        lists = isinstance(kind, torch.ListType)
        return lists and all(_fits(kind.getElementType(), entry) for entry in value)
    return value is not None and not (isinstance(value, str) and isinstance(kind, torch.TensorType))
