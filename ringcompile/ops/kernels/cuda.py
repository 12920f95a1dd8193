"""Attention of torch on CUDA: FlashAttention 2, cuDNN, memory-efficient attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ringcompile.ops.kernels.contract import (
    BlockCall,
    Provider,
    additive,
    blind_rows,
    masked,
    not_half,
    older_gpu,
    strided_last_dim,
    two_head_dims,
    unaligned,
)


def _flash(call: BlockCall) -> tuple[Tensor, Tensor]:
    """FlashAttention 2 of aten: groups heads itself, LSE as in the contract."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
        call.q, call.k, call.v, 0.0, call.causal, False, scale=call.scale
    )[:2]
    return out, lse.contiguous()


def _flash_refuses(call: BlockCall) -> str | None:
    return (
        masked(call)
        or not_half(call)
        or _wider(call, 256)
        or older_gpu(call, (8, 0))
        or two_head_dims(call)
        or strided_last_dim(call)
        or unaligned(call)
    )


def _cudnn(call: BlockCall) -> tuple[Tensor, Tensor]:
    """Attention of cuDNN: groups heads itself; LSE as a column."""
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        call.q, call.k, call.v, None, True, 0.0, call.causal, False, scale=call.scale
    )[:2]
    return out, lse.reshape(call.scores[:3]).contiguous()


def _cudnn_refuses(call: BlockCall) -> str | None:
    if call.q.shape[2] == 1 or call.k.shape[2] == 1:
        return "torch refuses sequences of one token to cuDNN"
    return _wider(call, 128) or older_gpu(call, (9, 0)) or _flash_refuses(call)


def _wider(call: BlockCall, head_dim: int) -> str | None:
    if call.q.shape[3] <= head_dim:
        return None
    return f"head_dim is {call.q.shape[3]}, it takes up to {head_dim}"


def _efficient(call: BlockCall) -> tuple[Tensor, Tensor]:
    """Memory-efficient attention of aten: KV heads repeated, LSE padded to 32 rows."""
    q, group_size = call.q, call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(group_size, 1) if group_size > 1 else x for x in (call.k, call.v))
    mask = bias = None
    if call.mask is not None:
        mask = additive(call.mask, q.dtype)
        # The kernel counts in base 2: times log2(e), the lowest numbers would become -inf there.
        rows = mask.clamp(min=max(torch.finfo(q.dtype).min, -1e38))
        rows.masked_fill_(mask == -math.inf, -math.inf)
        # Its alignment: rows are contiguous and start at multiples of 16 elements.
        num_keys = call.scores[3]
        rows = F.pad(rows.expand(-1, -1, -1, num_keys).contiguous(), (0, -num_keys % 16))
        bias = rows[..., :num_keys].expand(call.scores)
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, call.causal, scale=call.scale
    )[:2]
    lse = lse[..., : q.shape[2]].contiguous()
    if mask is not None:
        blind = blind_rows(mask, call)
        out.masked_fill_(blind.unsqueeze(-1), 0.0)
        lse.masked_fill_(blind, -math.inf)
    return out, lse


def _efficient_refuses(call: BlockCall) -> str | None:
    if call.q.dtype == torch.float64:
        return "dtype is torch.float64"
    if call.mask is not None and call.mask.dtype not in (torch.bool, call.q.dtype):
        # The kernel adds a bias of q's dtype: rounding a mask to that would change it silently.
        return f"the additive mask is {call.mask.dtype}, it takes {call.q.dtype} as in q"
    return strided_last_dim(call) or unaligned(call)


CUDA_FLASH = Provider("cuda-flash", "cuda", _flash_refuses, _flash)
CUDA_CUDNN = Provider("cuda-cudnn", "cuda", _cudnn_refuses, _cudnn)
CUDA_EFFICIENT = Provider("cuda-efficient", "cuda", _efficient_refuses, _efficient)
