"""Our operators: a table of schemas, registered with torch so that graphs can be typed and checked.

`attention`, `linear_attention`, `recurrence`, `expert_linear` and `redistribute` are what a program
for one device holds; the rest appear as it is partitioned. A state of attention is its running
result over some of the keys: [out, lse], out in the model's dtype, and float32 (float64 for
float64) where blocks are merged into it, and lse the natural-log sum of exponentials per row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

SCHEMAS = {
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? mask=None, "
        "Tensor? sink=None, *, float scale, float? softcap=None, SymInt? lower=None, "
        "SymInt? upper=None) -> Tensor"
    ),
    "expert_linear": (
        "(Tensor x, Tensor expert, Tensor weight, Tensor? bias=None, *, bool transposed=False) "
        "-> Tensor"
    ),
    "redistribute": "(Tensor x, *, str layout) -> Tensor",
    "tokenwise": "(Tensor x, *, int region, bool leaves) -> Tensor",
    "positions": "(SymInt[] chunks, *, SymInt chunk, SymInt limit) -> Tensor",
    "halo": (
        "(Tensor x, Tensor? past=None, Tensor? later=None, *, int dim, int before, int after, "
        "str axis, SymInt? piece=None) -> Tensor"
    ),
    "own_tokens": "(Tensor x, *, int dim, SymInt size) -> Tensor",
    "padded_tokens": "(Tensor x, *, int dim, SymInt size) -> Tensor",
    "trim": "(Tensor x, *, int dim, int before, int after, int chunks) -> Tensor",
    "window_positions": (
        "(SymInt[] chunks, *, SymInt chunk, int before, int after) -> Tensor"
    ),
    "gather": "(Tensor x, *, int dim, str axis, SymInt? limit) -> Tensor",
    "in_order": "(Tensor x, int[] chunks) -> Tensor",
    "all_reduce": "(Tensor x, *, str axis) -> Tensor",
    "reduce_scatter": "(Tensor x, *, int dim, str axis) -> Tensor",
    "all_to_all": "(Tensor x, *, int split, int concat, str axis) -> Tensor",
    "ring_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? mask=None, "
        "Tensor? sink=None, Tensor? past_k=None, Tensor? past_v=None, *, float scale, "
        "float? softcap=None, SymInt? lower=None, SymInt? upper=None, str axis, "
        "str? tile=None, SymInt? piece=None, SymInt[]? past=None) -> Tensor"
    ),
    "pack": "(Tensor k, Tensor v) -> Tensor",
    "block_attention": (
        "(Tensor q, Tensor[] kv, Tensor? key_mask=None, Tensor? mask=None, *, SymInt head_dim, "
        "SymInt[]? queries, SymInt[]? keys, SymInt chunk, SymInt limit, float scale, "
        "float? softcap=None, SymInt? lower=None, SymInt? upper=None, bool wide=False) -> Tensor[]"
    ),
    "attend_merge": (
        "(Tensor[] state, Tensor q, Tensor[] kv, Tensor? key_mask=None, Tensor? mask=None, *, "
        "SymInt start, SymInt head_dim, SymInt[]? queries, SymInt[]? keys, SymInt chunk, "
        "SymInt limit, float scale, float? softcap=None, SymInt? lower=None, SymInt? upper=None) "
        "-> Tensor[]"
    ),
    "merge": "(Tensor[] state, Tensor[] block, *, SymInt start) -> Tensor[]",
    "finish": "(Tensor[] state, Tensor? sink=None, *, ScalarType dtype) -> Tensor",
    "store": "(Tensor x, Tensor(a!) cache, Tensor slots) -> Tensor",
    "cached_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor cached_k, Tensor cached_v, Tensor places, "
        "Tensor positions, Tensor? key_mask=None, Tensor? mask=None, *, float scale, "
        "float? softcap=None, SymInt? lower=None, SymInt? upper=None, bool wide=False) -> Tensor[]"
    ),
    "pack_state": "(Tensor[] state, *, int dim=2, int ways=1, int runs=1) -> Tensor",
    "merge_states": "(Tensor packed) -> Tensor[]",
    "running_sum": (
        "(Tensor x, Tensor(a!) sums, Tensor positions, *, int dim, ScalarType? dtype=None, "
        'str by="sum") -> Tensor'
    ),
    "recurrence": "(Tensor factor, Tensor term, *, int dim) -> Tensor",
    "running_recurrence": (
        "(Tensor factor, Tensor term, Tensor(a!) kept, Tensor positions, *, int dim) -> Tensor"
    ),
    "linear_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? beta=None, Tensor? state=None) "
        "-> Tensor"
    ),
    "linear_state": "(Tensor k, Tensor v, Tensor decay, Tensor? beta=None) -> Tensor",
    "chained_states": "(Tensor totals) -> Tensor",
    "running_linear_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? beta, Tensor(a!) kept_k, "
        "Tensor(b!) kept_v, Tensor(c!) kept_decay, Tensor(d!)? kept_beta, "
        "Tensor(e!) kept_states, Tensor positions) -> Tensor"
    ),
    "recent": (
        "(Tensor x, Tensor(a!) kept, Tensor positions, *, int dim, int before) -> Tensor"
    ),
    "sort_rows": "(Tensor expert, *, int num_experts) -> Tensor[]",
    "grouped_linear": (
        "(Tensor x, Tensor ends, Tensor weight, Tensor? bias=None, *, bool transposed=False) "
        "-> Tensor"
    ),
    "route": "(Tensor expert, *, int each, int ways) -> Tensor[]",
    "dispatch": (
        "(Tensor x, Tensor order, Tensor sends, Tensor takes, *, str axis, int lead) -> Tensor"
    ),
    "combine": "(Tensor x, Tensor order, Tensor sends, Tensor takes, *, str axis) -> Tensor",
    "shift_start": (
        "(Tensor? x, *, str axis, SymInt? to, SymInt? source, SymInt[] sends, SymInt[] takes, "
        "str of) -> Tensor"
    ),
    "wait": "(Tensor x) -> Tensor",
}

NAMESPACE = "ringcompile"
_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)


def _attention_shape(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _expert_linear_shape(
    x: torch.Tensor,
    expert: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[2 if transposed else 1]))


# What a model may call while it is captured, where there is no data: results of the right shape.
torch.library.register_fake(
    f"{NAMESPACE}::tokenwise", lambda x, *, region, leaves: torch.empty_like(x), lib=_library
)
torch.library.register_fake(f"{NAMESPACE}::attention", _attention_shape, lib=_library)
torch.library.register_fake(
    f"{NAMESPACE}::recurrence", lambda factor, term, *, dim: torch.empty_like(term), lib=_library
)
torch.library.register_fake(
    f"{NAMESPACE}::linear_attention",
    lambda q, k, v, *_: torch.empty_like(v, memory_format=torch.contiguous_format),
    lib=_library,
)
torch.library.register_fake(f"{NAMESPACE}::expert_linear", _expert_linear_shape, lib=_library)

# The ops that move data between ranks; everything else is local.
COMMUNICATION = frozenset(
    {
        "gather", "all_reduce", "reduce_scatter", "all_to_all", "dispatch", "combine",
        "shift_start", "wait",
    }
)


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
