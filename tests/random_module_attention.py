"""Pieces of random modules that attend, in forms and under masks; see random_module_grammar.py."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.random_module_grammar import (
    Context,
    Parts,
    piece,
)


def _heads(p: Parts, x: Tensor) -> list[Tensor]:
    projected = F.linear(x, p.qkv).chunk(3, -1)
    return [t.unflatten(-1, (p.sizes.H, -1)).transpose(1, 2) for t in projected]


def _index(x: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.arange(x.shape[1])
    return index[:, None], index[None, :]


def _filled(p: Parts, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask, written in one of several ways."""
    fill: Any = torch.finfo(dtype).min if p.fill == "lowest" else p.fill
    if p.way == 1 and fill != float("-inf"):
        return (1.0 - allowed.to(dtype)) * fill
    if p.way == 2:
        return torch.where(allowed, torch.zeros((), dtype=dtype), fill)
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, fill)


def _attend(p: Parts, x: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Attention under an additive or boolean mask, or the flag."""
    q, k, v = _heads(p, x)
    q = q * p.spread
    mask, causal = (None, False) if p.plain else (mask, causal)
    if p.form == "sdpa":
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return F.linear(y.transpose(1, 2).flatten(2), p.out)
    if causal:
        i, j = _index(x)
        mask = _filled(p, i >= j, x.dtype)
    if mask is not None and mask.dtype == torch.bool:
        mask = _filled(p, mask, x.dtype)
    if p.form == "matmul":
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    else:
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return F.linear((weights @ v).transpose(1, 2).flatten(2), p.out)


ATTENTION: Final = {"qkv": "3D D", "out": "D D"}


@piece("attention", **ATTENTION)
def attention_both_ways(p: Parts, x: Tensor, c: Context) -> Tensor:
    return _attend(p, x, None)


@piece("attention", **ATTENTION)
def attention_causal(p: Parts, x: Tensor, c: Context) -> Tensor:
    return _attend(p, x, None, causal=True)


@piece("attention", **ATTENTION)
def attention_window(p: Parts, x: Tensor, c: Context) -> Tensor:
    i, j = _index(x)
    allowed = (i >= j) & (i - j < p.width) if p.way % 2 else (i - j).abs() < p.width
    return _attend(p, x, _filled(p, allowed, x.dtype) if p.way > 1 else allowed)


@piece("attention", **ATTENTION)
def attention_chunked(p: Parts, x: Tensor, c: Context) -> Tensor:
    i, j = _index(x)
    return _attend(p, x, (i // p.width == j // p.width) & (i >= j))


@piece("attention", "mask", **ATTENTION)
def attention_padded(p: Parts, x: Tensor, c: Context) -> Tensor:
    """Keys that are padding are hidden; every token sees itself."""
    assert c.mask is not None
    i, j = _index(x)
    allowed = c.mask.bool()[:, None, None, :] | (i == j)
    if p.way % 2:
        allowed = allowed & (i >= j)
    return _attend(p, x, _filled(p, allowed, x.dtype) if p.way > 1 else allowed)


@piece("attention", "mask", **ATTENTION)
def attention_key_mask(p: Parts, x: Tensor, c: Context) -> Tensor:
    """Only keys are hidden, for all queries alike."""
    assert c.mask is not None
    allowed = c.mask.bool()[:, None, None, :]
    return _attend(p, x, _filled(p, allowed, x.dtype) if p.way > 1 else allowed)


@piece("attention", "bias", **ATTENTION)
def attention_biased(p: Parts, x: Tensor, c: Context) -> Tensor:
    """A mask with a head dim, from the caller."""
    return _attend(p, x, c.bias)


@piece("attention", slopes="H", **ATTENTION)
def attention_with_slopes(p: Parts, x: Tensor, c: Context) -> Tensor:
    i, j = _index(x)
    bias = p.slopes[:, None, None] * (i - j).abs().to(x.dtype)
    return _attend(p, x, bias + _filled(p, i >= j, x.dtype) if p.way % 2 else bias)


@piece("attention", relative="H 2T", **ATTENTION)
def attention_with_a_table(p: Parts, x: Tensor, c: Context) -> Tensor:
    """A learned bias by distance, cut off at the end of its table."""
    i, j = _index(x)
    distance = (i - j).clamp(-p.sizes.T, p.sizes.T - 1) + p.sizes.T
    return _attend(p, x, p.relative[:, distance])


@piece("attention", qkv="3D D", out="D D")
def attention_linear(p: Parts, x: Tensor, c: Context) -> Tensor:
    """Without softmax: a running product of keys and values, or one over all tokens."""
    q, k, v = _heads(p, x)
    q, k = q.softmax(-1), k.sigmoid()
    if p.way % 2:
        state = (k[..., :, None] * v[..., None, :]).cumsum(2)
        y = torch.einsum("bhsd,bhsde->bhse", q, state) / (k.cumsum(2) * q).sum(-1, keepdim=True)
    else:
        y = q @ (k.transpose(-1, -2) @ v) / x.shape[1]
    return F.linear(y.transpose(1, 2).flatten(2), p.out)
