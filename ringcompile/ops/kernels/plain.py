"""Attention in plain torch: it takes whatever `attend` admits, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringcompile.ops.kernels.contract import BlockCall, Provider, additive


def _math(call: BlockCall) -> tuple[Tensor, Tensor]:
    """Plain torch in float32 or float64. Holds all B x H x Sq x Sk scores in memory, twice."""
    q, k, v = (x.to(call.accumulator) for x in (call.q, call.k, call.v))
    # The rows of a query group go through one matmul with their KV head, which is not repeated.
    grouped = q.reshape(*k.shape[:2], -1, q.shape[3])
    scores = (grouped @ k.mT).view(call.scores).mul_(call.scale)
    if call.softcap is not None:
        scores.div_(call.softcap).tanh_().mul_(call.softcap)
    if call.mask is not None:
        scores += additive(call.mask, scores.dtype)
    if call.causal:
        visible = torch.ones(call.scores[2:], dtype=torch.bool, device=q.device).tril()
        scores.masked_fill_(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    # softmax, not exp(scores - lse): where an additive mask hides a whole row by the dtype's
    # lowest number, lse has no digits left for the number of keys.
    weights = scores.softmax(-1).masked_fill_(lse.isneginf().unsqueeze(-1), 0.0)
    out = weights.view(*grouped.shape[:3], k.shape[2]) @ v
    out = out.view(*q.shape[:3], v.shape[3])
    return out if call.wide else out.to(call.q.dtype), lse


MATH = Provider("math", None, lambda call: None, _math, softcap=True)
