"""Our operators: a table of schemas, registered with torch so that graphs can be typed and checked.

`attention` and `redistribute` are what a program for one device holds; the rest appear as it is
partitioned. A state is the running result of attention over some of the keys: [out, lse], out
in the model's dtype until blocks are merged into it, then float32 (float64 for float64), and lse
the natural-log sum of exponentials per row.
"""

from __future__ import annotations

from functools import lru_cache

import torch

SCHEMAS = {
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? mask=None, *, float scale, "
        "SymInt? lower=None, SymInt? upper=None) -> Tensor"
    ),
    "redistribute": "(Tensor x, *, str layout) -> Tensor",
    "positions": "(SymInt[] chunks, *, SymInt chunk, SymInt limit) -> Tensor",
    "gather": "(Tensor x, *, int dim, str axis, SymInt limit) -> Tensor",
    "ring_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? mask=None, *, float scale, "
        "SymInt? lower=None, SymInt? upper=None, str axis) -> Tensor"
    ),
    "pack": "(Tensor k, Tensor v) -> Tensor",
    "block_attention": (
        "(Tensor q, Tensor[] kv, Tensor? key_mask=None, Tensor? mask=None, *, SymInt head_dim, "
        "SymInt[]? queries, SymInt[]? keys, SymInt chunk, SymInt limit, float scale, "
        "SymInt? lower=None, SymInt? upper=None) -> Tensor[]"
    ),
    "merge": "(Tensor[] state, Tensor[] block, *, SymInt start) -> Tensor[]",
    "finish": "(Tensor[] state, *, ScalarType dtype) -> Tensor",
    "shift_start": (
        "(Tensor x, *, str axis, SymInt? to, SymInt? source, SymInt[] sends, SymInt[] takes, "
        "str of) -> Tensor"
    ),
    "wait": "(Tensor x) -> Tensor",
}

NAMESPACE = "ringcompile"
_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)

# The ops that move data between ranks; everything else is local.
COMMUNICATION = frozenset({"gather", "shift_start", "wait"})


@lru_cache
def op(name: str) -> torch._ops.OpOverload:
    """The operator of that name in our namespace."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def name_of(target: object) -> str | None:
    """The name of one of our operators, or None for any other target."""
    text = str(target)
    if text.startswith(f"{NAMESPACE}."):
        return text.split(".")[1]
    return None
