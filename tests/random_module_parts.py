"""Pieces of random modules that do not attend, and heads; see random_module_grammar.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.random_module_grammar import (
    Context,
    Parts,
    head,
    piece,
)


@piece("mixing", w="D D")
def running_sum(p: Parts, x: Tensor, c: Context) -> Tensor:
    total = F.linear(x, p.w).tanh().cumsum(1)
    return total / x.shape[1] if p.way % 2 else total / torch.arange(1, x.shape[1] + 1)[:, None]


@piece("mixing", w="D D")
def running_maximum(p: Parts, x: Tensor, c: Context) -> Tensor:
    return F.linear(x, p.w).cummax(1).values


@piece("mixing", w="D D")
def running_log_sum(p: Parts, x: Tensor, c: Context) -> Tensor:
    return F.linear(x, p.w).logcumsumexp(1)


@piece("mixing", w="D D", decay="D")
def decaying_scan(p: Parts, x: Tensor, c: Context) -> Tensor:
    """A linear recurrence, written with running sums."""
    step = torch.arange(x.shape[1])[:, None] * p.decay.sigmoid() * 0.1
    return (F.linear(x, p.w) * step.exp()).cumsum(1) * (-step).exp()


@piece("mixing", w="D D")
def shifted(p: Parts, x: Tensor, c: Context) -> Tensor:
    y = F.linear(x, p.w)
    if p.way == 0:
        return F.pad(y, (0, 0, 1, 0))[:, :-1]
    if p.way == 1:
        return torch.cat([y.new_zeros(y.shape[0], 1, y.shape[2]), y[:, :-1]], 1)
    return y.roll(1 if p.way == 2 else -2, 1)


@piece("mixing", w="D D 3")
def convolution(p: Parts, x: Tensor, c: Context) -> Tensor:
    y = x.transpose(1, 2)
    y = F.conv1d(F.pad(y, (2, 0)), p.w) if p.way % 2 else F.conv1d(y, p.w, padding=1)
    return y.transpose(1, 2)


@piece("mixing", w="D 1 4")
def convolution_by_feature(p: Parts, x: Tensor, c: Context) -> Tensor:
    y = F.conv1d(x.transpose(1, 2), p.w, padding=3, groups=p.sizes.D)
    return y[..., : x.shape[1]].transpose(1, 2)


@piece("mixing", w="D D")
def statistics_of_tokens(p: Parts, x: Tensor, c: Context) -> Tensor:
    y = F.linear(x, p.w)
    found = (y.mean, y.amax, lambda d, keepdim: y.var(d, correction=0, keepdim=keepdim), y.amin)
    return x * found[p.way](1, keepdim=True)


@piece("mixing", "mask", w="D D")
def mean_of_real_tokens(p: Parts, x: Tensor, c: Context) -> Tensor:
    assert c.mask is not None
    real = c.mask[..., None].to(x.dtype)
    return x * ((F.linear(x, p.w) * real).sum(1, keepdim=True) / real.sum(1, keepdim=True))


@piece("mixing", w="D D")
def softmax_over_tokens(p: Parts, x: Tensor, c: Context) -> Tensor:
    return F.linear(x, p.w).softmax(1) * x * x.shape[1]


@piece("mixing", w="D D")
def sorted_tokens(p: Parts, x: Tensor, c: Context) -> Tensor:
    y = F.linear(x, p.w)
    return y.sort(1, descending=bool(p.way % 2)).values if p.way < 2 else y.flip(1)


@piece("mixing", w="D D", r="D")
def gathered_in_order(p: Parts, x: Tensor, c: Context) -> Tensor:
    order = (x @ p.r + torch.arange(x.shape[1]) * 1e-3).argsort(1)
    return F.linear(x, p.w).gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


@piece("mixing", w="D D")
def one_token_for_all(p: Parts, x: Tensor, c: Context) -> Tensor:
    chosen = (x[:, :1], x[:, -1:], x[:, x.shape[1] // 2, None], x[:, ::2].mean(1, keepdim=True))
    return F.linear(chosen[p.way], p.w).sigmoid() * x


@piece("mixing", w="D D")
def products_of_tokens(p: Parts, x: Tensor, c: Context) -> Tensor:
    y = F.linear(x, p.w)
    return (y @ y.transpose(1, 2)).tril() @ x / (x.shape[1] * p.sizes.D)


# -- rows, batches, features -----------------------------------------------------------------------


@piece("batch", w="D D")
def size_of_the_batch(p: Parts, x: Tensor, c: Context) -> Tensor:
    return F.linear(x, p.w) / x.shape[0]


@piece("batch", w="D")
def number_of_the_row(p: Parts, x: Tensor, c: Context) -> Tensor:
    return torch.arange(x.shape[0])[:, None, None] * p.w + torch.zeros_like(x)


@piece("batch", w="D D")
def other_rows(p: Parts, x: Tensor, c: Context) -> Tensor:
    y = F.linear(x, p.w)
    found = (y - y.mean(0, keepdim=True), y.flip(0), y.cumsum(0), y - y.amax(0, keepdim=True))
    return found[p.way]


@piece("features", w="2D D", v="D 2D")
def largest_feature(p: Parts, x: Tensor, c: Context) -> Tensor:
    h = F.linear(x, p.w)
    return F.linear(torch.where(h == h.amax(-1, keepdim=True), h, 0.0), p.v)


@piece("features", w="2D D", v="D 2D")
def best_features(p: Parts, x: Tensor, c: Context) -> Tensor:
    h = F.linear(x, p.w)
    if p.way < 2:
        return F.linear(torch.where(h >= h.topk(3, -1).values[..., -1:], h, 0.0), p.v)
    return F.linear(h.cumsum(-1) if p.way == 2 else h.sort(-1).values, p.v) * 0.3


@piece("features", w="2D D", v="D 2D", n="2D")
def gated(p: Parts, x: Tensor, c: Context) -> Tensor:
    h = F.gelu(F.linear(x, p.w))
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * p.n if p.way % 2 else h
    return F.linear(h, p.v)


@piece("tokens", "tokens", table="V D")
def second_table(p: Parts, x: Tensor, c: Context) -> Tensor:
    assert c.tokens is not None
    y = F.embedding(c.tokens, p.table)
    return y if p.way % 2 else y * x.sigmoid()


@piece("tokens", "tokens", w="D V")
def one_hot_tokens(p: Parts, x: Tensor, c: Context) -> Tensor:
    assert c.tokens is not None
    return F.linear(F.one_hot(c.tokens, p.sizes.V).to(x.dtype).cumsum(1) / x.shape[1], p.w) + x


@piece("tokens", "tokens", w="D D")
def documents(p: Parts, x: Tensor, c: Context) -> Tensor:
    """Tokens number 0 separate documents; the mean of all tokens of one's own."""
    assert c.tokens is not None
    number = (c.tokens == 0).cumsum(1)
    same = (number[:, :, None] == number[:, None, :]).to(x.dtype)
    return same @ F.linear(x, p.w) / same.sum(-1, keepdim=True)


@piece("positions", table="T D")
def learned_positions(p: Parts, x: Tensor, c: Context) -> Tensor:
    if p.way % 2:
        return p.table[: x.shape[1]].expand_as(x)
    return F.embedding(torch.arange(x.shape[1]).clamp(max=p.sizes.T - 1), p.table).expand_as(x)


@piece("positions", w="D D")
def length_as_a_number(p: Parts, x: Tensor, c: Context) -> Tensor:
    return F.linear(x, p.w) * math.sqrt(x.shape[1]) / (1 + x.shape[1])


@piece("experts", router="E D", up="E D 2D", down="E 2D D")
def slots_of_experts(p: Parts, x: Tensor, c: Context) -> Tensor:
    """Each expert takes so many tokens: a constant, or a share of all; later ones are dropped."""
    flat, experts = x.reshape(-1, x.shape[-1]), p.sizes.E
    slots = p.slots if p.way % 2 else max(flat.shape[0] // experts, 1)
    weight, choice = F.linear(flat, p.router).softmax(-1).max(-1)
    one = F.one_hot(choice, experts)
    slot = ((one.cumsum(0) - 1) * one).sum(-1)
    if p.way < 2:  # every expert on every token, and what is dropped masked away
        every = torch.einsum("td,edf->etf", flat, p.up).tanh()
        every = torch.einsum("etf,efd->etd", every, p.down)
        kept = one.T[..., None] * (slot < slots)[:, None]
        return ((every * kept).sum(0) * weight[:, None]).reshape(x.shape)
    address = torch.where(slot < slots, choice * slots + slot, experts * slots)
    held = flat.new_zeros(experts * slots + 1, flat.shape[-1]).index_add(0, address, flat)
    out = torch.bmm(torch.bmm(held[:-1].reshape(experts, slots, -1), p.up).tanh(), p.down)
    out = out.reshape(-1, flat.shape[-1])
    out = torch.cat([out, out.new_zeros(1, out.shape[-1])])[address]
    return (out * weight[:, None]).reshape(x.shape)


# -- heads -----------------------------------------------------------------------------------------


@head(w="V D")
def logits(p: Parts, x: Tensor, c: Context) -> Tensor:
    return F.linear(x, p.w)


@head(w="V D")
def logits_and_states(p: Parts, x: Tensor, c: Context) -> Any:
    return {"logits": F.linear(x, p.w), "states": x, "pooled": x.mean(1)}


@head(w="V D", table="2 D")
def logits_and_table(p: Parts, x: Tensor, c: Context) -> Any:
    return F.linear(x, p.w), p.table + 1, None


@head("tokens", w="V D")
def last_of_each_row(p: Parts, x: Tensor, c: Context) -> Tensor:
    assert c.tokens is not None
    last = (c.tokens != 0).sum(-1).clamp(min=1) - 1 if p.way % 2 else c.tokens.argmax(-1)
    return F.linear(x[torch.arange(x.shape[0]), last], p.w)


@head(w="V D")
def one_of_each_row(p: Parts, x: Tensor, c: Context) -> Tensor:
    chosen = (x[:, 0], x[:, -1], x.mean(1), x.amax(1))
    return F.linear(chosen[p.way], p.w)


@head(w="V D")
def transposed(p: Parts, x: Tensor, c: Context) -> Tensor:
    y = F.linear(x, p.w)
    return y.transpose(0, 1) if p.way % 2 else y.flatten(0, 1)


@head(w="V D")
def choices(p: Parts, x: Tensor, c: Context) -> Any:
    y = F.linear(x, p.w)
    return y.argmax(-1), y.log_softmax(-1).amax(-1)
