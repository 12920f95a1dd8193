"""The table from op name to what runs it; ops that communicate are run by the runtime instead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ringcompile.ir.pure_ops import is_pure
from ringcompile.ir.rules import find_rule
from ringcompile.ops import attention, bindings, cached, schemas
from ringcompile.ops.experts import expert_linear, grouped_linear, route, sort_rows
from ringcompile.ops.linear_attention import chained_states, linear_attention, linear_state
from ringcompile.ops.packed_keys import pack
from ringcompile.ops.running import recurrence
from ringcompile.ops.sequence import (
    in_order,
    own_tokens,
    padded_tokens,
    positions,
    trim,
    window_positions,
)


def _redistribute(x: torch.Tensor, *, layout: str) -> torch.Tensor:
    """On one device every layout is the same tensor."""
    return x


def _tokenwise(x: torch.Tensor, *, region: int, leaves: bool) -> torch.Tensor:
    """A mark in the graph, which does nothing."""
    return x


def _cumsum(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A running sum of whole numbers on a GPU goes along memory.

    Along another dim torch gives a thread to each column, which walks down it step by step: for
    slots of experts, as many threads as experts and as many steps as tokens. Sums of whole numbers
    are the same in any order; those of others are left as they are.
    """
    if x.is_cuda and not x.is_floating_point() and not x.is_complex():
        return cumsum_along_memory(x, dim, dtype)
    return torch.ops.aten.cumsum.default(x, dim, dtype=dtype)


def cumsum_along_memory(x: torch.Tensor, dim: int, dtype: torch.dtype | None) -> torch.Tensor:
    """`cumsum` of x [...] along a dim, with that dim brought innermost for it."""
    return x.movedim(dim, -1).contiguous().cumsum(-1, dtype=dtype).movedim(-1, dim).contiguous()


def _bits(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same bytes as another dtype; elements of another length have to lie side by side."""
    alike = x.dtype.itemsize == dtype.itemsize
    return torch.ops.aten.view.dtype(x if alike else x.contiguous(), dtype)


# Of torch's operators, what is run in another way.
_FOR_TORCH: dict[str, Callable[..., Any]] = {
    **bindings.FUNCTIONS,
    "aten.cumsum.default": _cumsum,
    "aten.view.dtype": _bits,
}

BODIES: dict[str, Callable[..., Any]] = {
    "attention": attention.attention,
    "expert_linear": expert_linear,
    "sort_rows": sort_rows,
    "grouped_linear": grouped_linear,
    "route": route,
    "redistribute": _redistribute,
    "tokenwise": _tokenwise,
    "positions": positions,
    "window_positions": window_positions,
    "in_order": in_order,
    "own_tokens": own_tokens,
    "padded_tokens": padded_tokens,
    "trim": trim,
    "pack": pack,
    "block_attention": attention.block_attention,
    "merge": attention.merge,
    "attend_merge": attention.attend_merge,
    "finish": attention.finish,
    "store": cached.store,
    "cached_attention": cached.cached_attention,
    "pack_state": cached.pack_state,
    "merge_states": cached.merge_states,
    "running_sum": cached.running_sum,
    "running_recurrence": cached.running_recurrence,
    "recent": cached.recent,
    "recurrence": recurrence,
    "linear_attention": linear_attention,
    "linear_state": linear_state,
    "chained_states": chained_states,
    "running_linear_attention": cached.running_linear_attention,
}

# Bodies for programs of fixed shapes, which ask the device for nothing.
ON_DEVICE: dict[str, Callable[..., Any]] = {
    "cached_attention": partial(cached.cached_attention, on_device=True),
    "expert_linear": partial(expert_linear, on_device=True),
}

# Ops that make tensors out of nothing and so must be told the device.
CREATION = frozenset(
    {
        "aten.full.default", "aten.arange.start_step", "ringcompile.positions.default",
        "ringcompile.window_positions.default",
    }
)


def body_of(target: Any, on_device: bool = False) -> Callable[..., Any]:
    """What runs an op that does not communicate: our body, or torch's function for it.

    Args:
        target: the op.
        on_device: whether shapes are fixed and the host may not be asked; see `ON_DEVICE`.
    """
    name = schemas.name_of(target)
    if name is not None:
        return ON_DEVICE.get(name, BODIES[name]) if on_device else BODIES[name]
    if find_rule(target) is None and is_pure(target):
        return partial(_on_dense, target)
    return _FOR_TORCH.get(str(target), target)


def _on_dense(target: Any, *args: Any, **kwargs: Any) -> Any:
    """An op of which nothing is known: some want dense operands, and copies were removed."""
    dense = pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, (args, kwargs))
    return target(*dense[0], **dense[1])
