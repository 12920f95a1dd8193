"""PyTorch's flex_attention, read as attention: its mask as a mask, its scores as scores.

Its mask and score functions are ordinary code over the indices of one score. While a model is
captured they are applied to all of them, so that the graph holds a mask from positions, and scores
written out, which the passes then read like any other. Tables of blocks are not computed: they say
where the mask is known, and nothing else.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ringcompile.errors import RingCompileError

_MODULE = "torch.nn.attention.flex_attention"
_Indices = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@contextlib.contextmanager
def read_as_attention() -> Iterator[None]:
    """While inside, calls of flex_attention become attention that every pass knows."""
    flex: Any = sys.modules.get(_MODULE)
    ours: dict[str, Any] = {
        "flex_attention_hop": _attention,
        "create_mask": _no_mask,
        "_convert_mask_to_block_mask": _no_blocks,
        "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG": True,  # else it would compile the call, and
        "setup_compilation_env": lambda: contextlib.nullcontext("eager"),  # hide it from export
    }
    if flex is None or not all(hasattr(flex, name) for name in ours):
        yield
        return
    with mock.patch.multiple(flex, **ours):
        yield


def _no_mask(_: Any, batch: int | None, heads: int | None, *__: Any, **___: Any) -> torch.Tensor:
    """In place of a mask [B, H, Q, K], of which only the first dims are asked for."""
    return torch.ones(batch or 1, heads or 1, 1, 1, dtype=torch.bool)


def _no_blocks(mask: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of the blocks [B, H, Q/128, K/128] of which a part, or all, is visible."""
    return mask.to(torch.int8), mask.to(torch.int8)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What flex_attention returns: its output [B, H, Q, E]; nothing beside it is captured."""
    if kernel_options.get("OUTPUT_LOGSUMEXP") or kernel_options.get("OUTPUT_MAX"):
        raise RingCompileError(
            "flex_attention is called to also return its log-sum-exps or largest scores, which is "
            "not supported",
            hint="leave return_lse and return_aux out",
        )
    flex: Any = sys.modules[_MODULE]
    mask_mod = block_mask[-1]
    indices = _indices(query, key)
    mask = None if mask_mod is flex.noop_mask else _everywhere(mask_mod)(*indices)
    if score_mod is flex._identity:
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    else:
        out = _written_out(query, key, value, score_mod, mask, scale, indices)
    empty = query.new_empty(0)
    return out, empty, empty


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    mask: torch.Tensor | None,
    scale: float,
    indices: _Indices,
) -> torch.Tensor:
    """Attention as two matmuls with a softmax of changed scores between them."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = (query @ key.transpose(-2, -1)).float() * scale
    scores = _everywhere(score_mod, of_scores=True)(scores, *indices)
    if mask is not None:
        scores = torch.where(mask, scores, float("-inf"))
    return scores.softmax(-1).to(query.dtype) @ value


def _indices(query: torch.Tensor, key: torch.Tensor) -> _Indices:
    """The numbers of all sequences, heads, queries and keys."""
    sizes = (*query.shape[:3], key.shape[2])
    b, h, q, k = (torch.arange(size, device=query.device) for size in sizes)
    return b, h, q, k


def _everywhere(function: Callable[..., Any], of_scores: bool = False) -> Callable[..., Any]:
    """A function of one score's indices as one of all: its result is [B, H, Q, K]."""
    score = (0,) if of_scores else ()
    for dim in reversed(range(4)):
        index = tuple(0 if i == dim else None for i in range(4))
        function = torch.vmap(function, in_dims=(*score, *index))

    def everywhere(*arguments: torch.Tensor) -> Any:
        with _ReadByIndex():
            return function(*arguments)

    return everywhere


class _ReadByIndex(TorchFunctionMode):
    """`table[h]` as an op: torch would read the number in `h`, of which vmap knows only many."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.__getitem__:
            table, index = args
            indices = list(index) if isinstance(index, tuple | list) else [index]
            if all(isinstance(i, torch.Tensor) for i in indices):
                return torch.ops.aten.index.Tensor(table, indices)
        return function(*args, **(kwargs or {}))
