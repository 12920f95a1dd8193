"""Which ops of a program torch's compiler can see into."""

from __future__ import annotations

from torch import fx

from ringcompile.ir.expr import depends_on_data
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import COMMUNICATION, name_of

# Ours that are written in torch's own ops.
_PLAIN = frozenset({None, "finish", "redistribute", "tokenwise"})


def is_compilable(node: fx.Node) -> bool:
    """Whether an op is one of torch's own, or written in them, at sizes that are known."""
    name = name_of(node.target)
    types = node.meta.get("type")
    if name in COMMUNICATION or name not in _PLAIN or types is None:
        return False
    each: tuple[TensorType, ...] = types if isinstance(types, tuple) else (types,)
    return not any(depends_on_data(size) for type_ in each for size in type_.shape)
