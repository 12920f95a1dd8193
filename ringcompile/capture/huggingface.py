"""Capture of Hugging Face models: their attention and mask hooks, filled in with ours.

transformers asks two registries how to attend and how to build masks. Ours keep attention one op
with un-expanded key/value heads, and always write the mask out from positions, so that it can be
read from the graph. Both are registered together: attention alone would lose the mask.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ringcompile.errors import RingCompileError

_NAME = "ringcompile"
# Arguments that change the result and that attention as captured here has no place for.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One attention op: [B,H,S,D] queries, un-expanded keys and values -> [B,S,H,E]."""
    for argument in _UNSUPPORTED:
        if kwargs.get(argument) is not None:
            raise RingCompileError(
                f"{type(module).__name__} uses attention with '{argument}', which has no rule yet",
                hint="see `ringcompile check` for what is supported",
            )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    by_flag = bool(causal) and attention_mask is None
    if by_flag and query.shape[2] != key.shape[2]:
        raise RingCompileError(
            f"{type(module).__name__} is causal over {key.shape[2]} keys for {query.shape[2]} "
            "queries and gives no mask: which keys a query sees is not defined",
            hint="capture the model without a cache",
        )
    out = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=by_flag,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The boolean mask from positions, never skipped in favour of a flag elsewhere."""
    from transformers import masking_utils

    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return masking_utils.sdpa_mask(*args, **kwargs)


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """While inside, Hugging Face modules use our hooks and no cache; restored behind."""
    transformers = sys.modules.get("transformers")
    if transformers is None:  # a Hugging Face model cannot exist without it
        yield
        return
    from transformers import masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    models = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    configs = {id(m.config): m.config for m in models}.values()
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _mask)
    saved = [(c, c._attn_implementation, getattr(c, "use_cache", None)) for c in configs]
    try:
        for config in configs:
            config._attn_implementation = _NAME
            if hasattr(config, "use_cache"):
                config.use_cache = False
        yield
    finally:
        for config, implementation, use_cache in saved:
            config._attn_implementation = implementation
            if use_cache is not None:
                config.use_cache = use_cache
