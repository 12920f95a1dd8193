"""How Hugging Face models attend while they are captured: one attention op, and its mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ringcompile.errors import RingCompileError
from ringcompile.ops.schemas import op

# What models hand on besides, for kernels that do not take the mask, and for the model around.
# Anything else might change the result, and is refused.
_WITHOUT_EFFECT = frozenset({
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "kernel_options",
    "layer_idx", "max_length_k", "max_length_q", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "position_embeddings", "position_ids", "return_dict", "seq_idx",
    "sliding_window", "use_cache",
})  # fmt: skip


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One attention op: [B,H,S,D] queries, un-expanded keys and values -> [B,S,H,E].

    Raises:
        RingCompileError: the model asks for something that attention here has no place for.
    """
    _check(module, query, s_aux, kwargs)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    by_flag = bool(causal) and attention_mask is None
    if by_flag:
        _check_causal(module, query, key)
    if softcap is None and s_aux is None and position_bias is None:
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=by_flag,
            scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        )
    else:
        _check_dropout(module, dropout)
        out = op("attention")(
            query, key, value, None, _with_bias(attention_mask, position_bias), s_aux,
            scale=scaling if scaling is not None else query.shape[3] ** -0.5,
            softcap=softcap,
            lower=0 if by_flag else None,
        )
    return out.transpose(1, 2).contiguous(), None


def _check(
    module: nn.Module, query: torch.Tensor, sink: torch.Tensor | None, kwargs: dict[str, Any]
) -> None:
    without_effect = _WITHOUT_EFFECT | _in_the_mask(module)
    for name, value in kwargs.items():
        if name not in without_effect and value is not None and value is not False:
            raise RingCompileError(
                f"{type(module).__name__} uses attention with '{name}', which is not supported",
                hint="see `ringcompile check` for what is supported",
            )
    if sink is not None and tuple(sink.shape) != (query.shape[1],):
        raise RingCompileError(
            f"{type(module).__name__} has sinks of shape {list(sink.shape)}; only one number per "
            "head is supported"
        )


def _in_the_mask(module: nn.Module) -> frozenset[str]:
    """What a module's indexer writes into the mask for "sdpa", and hands on for kernels besides."""
    writes = hasattr(getattr(module, "indexer", None), "build_block_mask")
    return frozenset({"block_indices"} if writes else ())


def _check_causal(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> None:
    if query.shape[2] != key.shape[2]:
        raise RingCompileError(
            f"{type(module).__name__} is causal over {key.shape[2]} keys for {query.shape[2]} "
            "queries and gives no mask: which keys a query sees is not defined",
            hint="capture the model without a cache",
        )


def _check_dropout(module: nn.Module, dropout: float) -> None:
    if dropout:
        raise RingCompileError(
            f"attention dropout with p={dropout} is left on in {type(module).__name__}",
            hint="call model.eval() before capture",
        )


def _with_bias(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    """A mask and what the model adds to the scores; a sum, in which the mask can still be read."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, float("-inf")).to(bias.dtype)
    return bias + mask


def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The boolean mask from positions, never skipped in favour of a flag elsewhere.

    It is written for all positions at once, by broadcasting: `torch.vmap`, which models ask for
    where they add to a mask's function, cannot be captured where a function looks up a position.
    """
    from transformers import masking_utils

    kwargs.update(
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=False
    )
    return masking_utils.sdpa_mask(*args, **kwargs)
