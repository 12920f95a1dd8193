"""Flash attention of aten for CPUs."""

from __future__ import annotations

import math
from dataclasses import replace

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
    shape, call = call.scores[:3], _heads_as_rows(call)
    # float32 even for halves, which the op allows; a wider one it would misread without a word.
    bias = None if call.mask is None else additive(call.mask, call.accumulator)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        call.q, call.k, call.v, 0.0, call.causal, attn_mask=bias, scale=call.scale
    )
    lse = lse.contiguous()
    if bias is not None:
        lse.masked_fill_(blind_rows(bias, call), -math.inf)
    return out.reshape(*shape, -1), lse.view(shape)


def _heads_as_rows(call: BlockCall) -> BlockCall:
    """A call of one query: heads that share a KV head as rows of one, which reads its keys once."""
    batch, heads, queries, width = call.q.shape
    groups, mask = call.k.shape[1], call.mask
    if queries != 1 or heads == groups:
        return call
    if mask is not None and mask.shape[1] == heads:
        mask = mask.reshape(mask.shape[0], groups, -1, mask.shape[3])
    q = call.q.reshape(batch, groups, -1, width)
    return replace(call, q=q, mask=mask, causal=False)


def _refuses(call: BlockCall) -> str | None:
    return two_head_dims(call) or strided_last_dim(call)


CPU_FLASH = Provider("cpu-flash", "cpu", _refuses, _flash)
