"""Operators of torch's that need no row in the rule table where nothing they read is split.

Such an op is a function of its operands alone: it draws nothing, writes nothing, and reads no file
and no memory besides its tensors. Then every rank that has the operands computes the same result,
and a saved program may hold the op.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any

import torch
from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.nodes import error_at

_NAME = re.compile(r"aten\.[A-Za-z0-9_]{1,80}\.[A-Za-z0-9_]{1,40}", re.ASCII)
_PLAIN = re.compile(
    r"(Optional\[)?(List\[)?(Optional\[)?(Tensor|int|float|bool|number|complex|str|Device)\]{0,3}"
)
# Their results lie in memory that nobody wrote, or they take packed data on trust.
_DENIED = re.compile(
    "empty|as_strided|from_file|resize|unsafe|sparse|nested|quantize|fbgemm|mkldnn|cudnn|miopen|cslt"
)
_SHIFTS_AND_BITS = frozenset({"__and__", "__or__", "__xor__", "__lshift__", "__rshift__"})


def is_pure(target: Any) -> bool:
    """Whether a call's target is such an operator."""
    return isinstance(target, torch._ops.OpOverload) and is_pure_name(str(target))


@lru_cache(maxsize=4096)
def is_pure_name(name: str) -> bool:
    """Whether a name, which may come from anywhere, is that of such an operator."""
    if not _NAME.fullmatch(name) or name not in _functions():
        return False
    _, op, overload = name.split(".")
    target = getattr(getattr(torch.ops.aten, op, None), overload, None)
    return target is not None and torch.Tag.nondeterministic_seeded not in target.tags


def draws(target: Any) -> bool:
    """Whether an op draws random numbers, so that ranks would not have the same."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def drawing(node: fx.Node) -> RingCompileError:
    """The refusal of an op that draws random numbers."""
    return error_at(
        node,
        f"{node.target} draws random numbers, and every rank would draw different ones",
        hint="draw them where the model is called and pass them in as an input, so that all ranks "
        "have the same; if they are meant for training only, call model.eval()",
    )


@cache
def _functions() -> frozenset[str]:
    """The names of torch's functions from tensors and plain values to tensors."""
    return frozenset(
        f"aten.{name}.{schema.overload_name or 'default'}"
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::") and not schema.is_mutable
        for name in [schema.name.removeprefix("aten::")]
        if (not name.startswith("_") or name in _SHIFTS_AND_BITS) and not _DENIED.search(name)
        if all(_PLAIN.fullmatch(str(argument.type)) for argument in schema.arguments)
        and schema.returns
        and all(str(result.type) in ("Tensor", "List[Tensor]") for result in schema.returns)
    )
