"""Flash attention of aten for CPUs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringcompile.ops.kernels.contract import (
    BlockCall,
    Provider,
    additive,
    blind_rows,
    strided_last_dim,
    two_head_dims,
)


def _flash(call: BlockCall) -> tuple[Tensor, Tensor]:
    """Groups heads itself; LSE strided, and 0 in blind rows."""
    # float32 even for halves, which the op allows; a wider one it would misread without a word.
    bias = None if call.mask is None else additive(call.mask, call.accumulator)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        call.q, call.k, call.v, 0.0, call.causal, attn_mask=bias, scale=call.scale
    )
    lse = lse.contiguous()
    if bias is not None:
        lse.masked_fill_(blind_rows(bias, call), -math.inf)
    return out, lse


def _refuses(call: BlockCall) -> str | None:
    return two_head_dims(call) or strided_last_dim(call)


CPU_FLASH = Provider("cpu-flash", "cpu", _refuses, _flash)
