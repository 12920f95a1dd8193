"""Attention as people write it out: each way as a function of projections and inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS, DIM, MAX = 4, 6, 64
WIDTH = HEADS * DIM
INF, MIN = float("-inf"), torch.finfo(torch.float32).min

Style = Callable[["Weights", Tensor], object]


class Weights(nn.Module):
    """What the styles have in common: projections, buffers, and inputs of [B, S, 24]."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * 2 * DIM)
        self.positions = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("tril", torch.tril(torch.ones(MAX, MAX)).view(1, 1, MAX, MAX))
        self.register_buffer("flags", torch.ones(MAX, MAX, dtype=torch.bool).tril())
        self.register_buffer("above", torch.full((MAX, MAX), INF).triu(1))
        self.register_buffer("fill", torch.tensor(-1e9))
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, 4, 1, 1))
        self.root = torch.sqrt(torch.tensor(float(DIM)))
        self.sinks = nn.Parameter(torch.tensor([0.3, -1.0, 2.0, 0.0]))
        self.temperature = nn.Parameter(torch.tensor([0.3, 1.0, 0.7, 0.5]).view(1, 4, 1, 1))
        self.relative = nn.Embedding(32, HEADS)
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> object:
        return self.style(self, x)

    def parts(self, x: Tensor) -> list[Tensor]:
        """q, k, v, [B,S,H,D] each."""
        return [y.unflatten(-1, (HEADS, DIM)) for y in self.qkv(x).chunk(3, -1)]

    def heads(self, x: Tensor) -> list[Tensor]:
        """q, k, v, [B,H,S,D] each."""
        return [y.transpose(1, 2) for y in self.parts(x)]

    def groups(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B,4,S,D], k and v [B,2,S,D]."""
        k, v = (y.unflatten(-1, (2, DIM)).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        return self.heads(x)[0], k, v


def merged(y: Tensor) -> Tensor:
    """[B,H,S,D] -> [B,S,H*D]."""
    return y.transpose(1, 2).flatten(2)


def query(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[:, None]


def key(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[None, :]


def real(x: Tensor) -> Tensor:
    """A padding mask from the data, [B,S]; the first token is always there."""
    return (x[:, :, 0] > -0.5) | (torch.arange(x.shape[1]) == 0)


def plain(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return merged((q @ k.transpose(-2, -1) / math.sqrt(DIM)).softmax(-1) @ v)


def nano_gpt(m: Weights, x: Tensor) -> Tensor:
    (q, k, v), size = m.heads(x), x.shape[1]
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(m.tril[:, :, :size, :size] == 0, INF)
    return merged(F.dropout(F.softmax(att, dim=-1), 0.1, m.training) @ v)


def nano_gpt_in_place(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    att = q @ k.mT
    att *= DIM**-0.5
    att.masked_fill_(torch.triu(torch.ones(x.shape[1], x.shape[1]), 1).bool(), INF)
    return merged(att.softmax(-1) @ v)


def xglm(m: Weights, x: Tensor) -> Tensor:
    """Scores that a mask pushed below the lowest number are lifted to it."""
    (q, k, v), size = m.heads(x), x.shape[1]
    lowest = torch.finfo(x.dtype).min
    mask = torch.full((size, size), lowest, dtype=x.dtype).triu(1)
    scores = q @ k.transpose(-1, -2) * DIM**-0.5 + mask
    scores = torch.max(scores, torch.tensor(lowest, dtype=x.dtype))
    return merged(scores.softmax(-1) @ v)


def gpt2(m: Weights, x: Tensor) -> Tensor:
    (q, k, v), size = m.heads(x), x.shape[1]
    w = torch.matmul(q, k.transpose(-1, -2))
    w = w / torch.full([], v.size(-1) ** 0.5, dtype=w.dtype)
    value = torch.full([], torch.finfo(w.dtype).min, dtype=w.dtype)
    w = torch.where(m.flags[None, None, :size, :size], w, value)
    w = w + torch.zeros(x.shape[0], 1, 1, size).masked_fill(~real(x)[:, None, None], INF)
    return merged(torch.matmul(F.softmax(w, dim=-1).type(v.dtype), v))


def gpt_neo(m: Weights, x: Tensor) -> Tensor:
    (q, k, v), size = m.heads(x), x.shape[1]
    w = torch.matmul(q.float(), k.float().transpose(-1, -2))
    return merged(torch.where(m.flags[:size, :size], w, torch.tensor(MIN)).softmax(-1) @ v)


def annotated_transformer(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    mask = real(x)[:, None, None, :] & (query(x) >= key(x))
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(DIM)
    return merged(torch.matmul(scores.masked_fill(mask == 0, -1e9).softmax(dim=-1), v))


def bert(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    extended = (1.0 - real(x)[:, None, None, :].to(x.dtype)) * MIN
    return merged(nn.Softmax(dim=-1)(q @ k.transpose(-1, -2) / math.sqrt(DIM) + extended) @ v)


def llama(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.groups(x)
    k, v = (y[:, :, None].expand(-1, -1, 2, -1, -1).reshape(*q.shape[:3], DIM) for y in (k, v))
    mask = torch.full((x.shape[1], x.shape[1]), MIN).triu(1)
    w = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(DIM) + mask[None, None]
    return merged(torch.matmul(F.softmax(w, dim=-1, dtype=torch.float32).to(q.dtype), v))


def llama_of_meta(m: Weights, x: Tensor) -> Tensor:
    """Heads repeated before they are moved, as in the reference code."""
    q = m.parts(x)[0].transpose(1, 2)
    k, v = (y.unflatten(-1, (2, DIM)) for y in m.kv(x).chunk(2, -1))
    k, v = (y[:, :, :, None].expand(-1, -1, -1, 2, -1).reshape(*x.shape[:2], HEADS, DIM)
            .transpose(1, 2) for y in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(DIM) + m.above[: x.shape[1],
                                                                         : x.shape[1]]
    return merged(torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v))


def repeat_interleave(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.groups(x)
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    return merged((q * DIM**-0.5 @ k.mT + torch.triu(torch.full((x.shape[1],) * 2, INF), 1))
                  .softmax(-1) @ v)


def five_dims(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.groups(x)
    q = q.unflatten(1, (2, 2))
    scores = q @ k[:, :, None].mT * 0.4
    scores = scores.masked_fill((query(x) < key(x))[None, None, None], INF)
    return merged((scores.softmax(-1) @ v[:, :, None]).flatten(1, 2))


def five_dims_in_turns(m: Weights, x: Tensor) -> Tensor:
    """Neighbouring heads read different keys: these are no runs."""
    q, k, v = m.groups(x)
    p = (q.unflatten(1, (2, 2)) @ k[:, None].mT).softmax(-1)
    return merged((p @ v[:, None]).flatten(1, 2))


def multi_query(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.groups(x)
    k, v = k[:, :1], v[:, :1]
    return merged((q @ k.mT).masked_fill(query(x) < key(x), INF).softmax(-1) @ v)


def opt(m: Weights, x: Tensor) -> Tensor:
    """bmm over [B*H, S, D], masked in 4 dims in between."""
    q, k, v = (y.reshape(-1, x.shape[1], DIM) for y in m.heads(x))
    q = q * DIM**-0.5
    mask = torch.full((x.shape[1], x.shape[1]), MIN).triu(1)[None, None]
    w = torch.bmm(q, k.transpose(1, 2)).view(x.shape[0], HEADS, x.shape[1], x.shape[1]) + mask
    p = F.softmax(w.view(-1, x.shape[1], x.shape[1]), dim=-1)
    return merged(torch.bmm(p, v).view(x.shape[0], HEADS, x.shape[1], DIM))


def bmm_only(m: Weights, x: Tensor) -> Tensor:
    """Three dims all the way, a mask for each head."""
    q, k, v = (y.flatten(0, 1) for y in m.heads(x))
    mask = torch.where(query(x) >= key(x), 0.0, INF).expand(x.shape[0] * HEADS, -1, -1)
    y = torch.bmm(torch.softmax(torch.bmm(q, k.mT) + mask, -1), v)
    return merged(y.unflatten(0, (x.shape[0], HEADS)))


def one_head(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    scores = q @ k.transpose(1, 2) / WIDTH**0.5
    return scores.masked_fill(query(x) < key(x), INF).softmax(2) @ v


def bloom(m: Weights, x: Tensor) -> Tensor:
    """baddbmm of ALiBi by key, [B*H, 1, S]; the keys turned before they are merged."""
    q, k, v = m.heads(x)
    q, v = (y.reshape(-1, x.shape[1], DIM) for y in (q, v))
    k = k.permute(0, 1, 3, 2).reshape(-1, DIM, x.shape[1])
    places = ((real(x).cumsum(-1) - 1) * real(x))[:, None, :]
    alibi = (m.slopes.view(HEADS, 1) * places).reshape(x.shape[0] * HEADS, 1, x.shape[1])
    scores = alibi.baddbmm(batch1=q, batch2=k, beta=1.0, alpha=DIM**-0.5)
    w = scores.view(x.shape[0], HEADS, x.shape[1], -1)
    hidden = (query(x) < key(x)) | ~real(x)[:, None, None, :]
    w = w + torch.zeros_like(hidden, dtype=w.dtype).masked_fill(hidden, INF)
    p = F.softmax(w, dim=-1, dtype=torch.float32).to(q.dtype)
    y = torch.bmm(p.view(x.shape[0] * HEADS, x.shape[1], -1), v)
    return merged(y.view(x.shape[0], HEADS, x.shape[1], DIM))


def mpt(m: Weights, x: Tensor) -> Tensor:
    """ALiBi by distance, then the mask in place of the scores."""
    q, k, v = m.heads(x)
    bias = -(query(x) - key(x)).abs() * m.slopes
    w = torch.matmul(q, k.transpose(-1, -2)) * DIM**-0.5 + bias[0]
    w = w.masked_fill(query(x) < key(x), MIN)
    return merged(torch.matmul(F.softmax(w.float(), dim=-1).to(v.dtype), v))


def falcon(m: Weights, x: Tensor) -> Tensor:
    """The bias is scaled with the scores."""
    q, k, v = m.heads(x)
    w = q @ k.mT + (m.slopes * torch.arange(x.shape[1])).view(1, HEADS, 1, -1)
    w *= DIM**-0.5
    return merged(F.softmax(w + m.above[: x.shape[1], : x.shape[1]], -1, dtype=x.dtype) @ v)


def gpt_j(m: Weights, x: Tensor) -> Tensor:
    (q, k, v), size = m.heads(x), x.shape[1]
    w = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2)) / m.root
    w = torch.where(m.flags[:size, :size], w, m.fill.to(w.dtype))
    return merged(torch.matmul(F.softmax(w, -1).to(v.dtype), v))


def t5(m: Weights, x: Tensor) -> Tensor:
    """No scale, and a learned bias by the distance."""
    q, k, v = m.heads(x)
    apart = (key(x) - query(x)).clamp(-15, 15) + 15
    bias = m.relative(apart).permute(2, 0, 1).unsqueeze(0)
    scores = torch.einsum("bnqd,bnkd->bnqk", q, k)
    scores += bias
    return merged(torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v))


def einsum(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(DIM)
    scores = scores.masked_fill(query(x) < key(x), INF)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def einsum_keys_first(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    p = torch.einsum("... k h d, ... q h d -> ... h q k", k, q).softmax(-1)
    return torch.einsum("...khd,...hqk->...qhd", v, p).flatten(2)


def einsum_groups(m: Weights, x: Tensor) -> Tensor:
    q = m.parts(x)[0].unflatten(2, (2, 2))
    k, v = (y.unflatten(-1, (2, DIM)) for y in m.kv(x).chunk(2, -1))
    scores = torch.einsum("bqgrd,bkgd->bgrqk", q, k)
    scores = torch.where(query(x) >= key(x), scores, INF)
    return torch.einsum("bgrqk,bkgd->bqgrd", F.softmax(scores, -1), v).flatten(2)


def xlnet_content(m: Weights, x: Tensor) -> Tensor:
    """Tokens first."""
    q, k, v = (y.transpose(0, 1) for y in m.parts(x))
    scores = torch.einsum("ibnd,jbnd->bnij", q, k) * 0.5
    scores = scores - 1e30 * torch.einsum("ijbn->bnij", (query(x) < key(x)).float()[..., None,
                                                                                  None])
    return torch.einsum("bnij,jbnd->ibnd", scores.softmax(3), v).transpose(0, 1).flatten(2)


def gemma2(m: Weights, x: Tensor) -> Tensor:
    """A soft cap."""
    q, k, v = m.heads(x)
    w = torch.tanh(q @ k.mT * 0.7 / 2.0) * 2.0
    return merged((w + m.above[: x.shape[1], : x.shape[1]]).softmax(-1) @ v)


def gpt_oss(m: Weights, x: Tensor) -> Tensor:
    """A sink for each head, left out behind the softmax."""
    q, k, v = m.groups(x)
    k, v = (y[:, :, None].expand(-1, -1, 2, -1, -1).reshape(*q.shape[:3], DIM) for y in (k, v))
    w = q @ k.mT * DIM**-0.5 + m.above[: x.shape[1], : x.shape[1]]
    sinks = m.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    both = torch.cat([w, sinks], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    return merged(F.softmax(both, dim=-1, dtype=both.dtype)[..., :-1] @ v)


def one_more_in_the_sum(m: Weights, x: Tensor) -> Tensor:
    """A column of zeros in front: softmax1."""
    q, k, v = m.heads(x)
    zeros = x.new_zeros(x.shape[0], HEADS, x.shape[1], 1)
    return merged(torch.cat([zeros, q @ k.mT], -1).softmax(-1)[..., 1:] @ v)


def stable_softmax(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    w = q @ k.mT + m.above[: x.shape[1], : x.shape[1]]
    return merged((w - w.amax(-1, keepdim=True)).softmax(-1) @ v)


def temperatures(m: Weights, x: Tensor) -> Tensor:
    """A learned scale for each head, and one of the length."""
    q, k, v = m.heads(x)
    w = q @ k.mT / m.temperature * math.log(2) * x.shape[1] / 20
    return merged(w.masked_fill(query(x) < key(x), INF).softmax(-1) @ v)


def even_rows(m: Weights, x: Tensor) -> Tensor:
    """Rows whose keys are all hidden by a finite number weigh all keys evenly."""
    q, k, v = m.heads(x)
    there = (x[:, :, 0] > 0)[:, None, None, :]
    w = q @ k.mT * 0.5 - 0.1 * (query(x) - key(x))
    return merged(w.masked_fill((query(x) < key(x)) | ~there, -1e9).softmax(-1) @ v)


def even_rows_of_some(m: Weights, x: Tensor) -> Tensor:
    """The same, among the keys that -inf does not hide."""
    q, k, v = m.heads(x)
    w = (q @ k.mT).masked_fill(query(x) < key(x), INF)
    return merged(w.masked_fill((x[:, :, 0] < 0)[:, None, None, :], MIN).softmax(-1) @ v)


def even_rows_before_others(m: Weights, x: Tensor) -> Tensor:
    """The same, the other way round: -inf has the last word."""
    q, k, v = m.heads(x)
    w = (q @ k.mT).masked_fill(((x[:, :, 0] < 0) & (x[:, :, 1] < 1))[:, None, None, :], MIN)
    return merged(torch.where(query(x) <= key(x), w, INF).softmax(-1) @ v)


def zeros_behind(m: Weights, x: Tensor) -> Tensor:
    """Rows whose keys are all hidden give zeros."""
    q, k, v = m.heads(x)
    hidden = (x[:, :, 0] < 0)[:, None, None, :] | (query(x) < key(x))
    return merged((q @ k.mT).masked_fill(hidden, MIN).softmax(-1).masked_fill(hidden, 0) @ v)


def added_twice(m: Weights, x: Tensor) -> Tensor:
    """A bias first, scores and bias in either order, and a window."""
    q, k, v = m.heads(x)
    w = 0.05 * (key(x) - query(x)) + q @ k.mT
    w = m.above[: x.shape[1], : x.shape[1]] + w
    return merged(w.masked_fill(query(x) - key(x) >= 5, INF).softmax(-1) @ v)


def scores_of_positions(m: Weights, x: Tensor) -> Tensor:
    """A second product added to the scores: one is the attention's, the other its bias."""
    q, k, v = m.heads(x)
    places = m.positions(torch.arange(x.shape[1])[:, None] * torch.linspace(0, 0.1, WIDTH).to(x))
    r = places.unflatten(-1, (HEADS, DIM)).transpose(0, 1)
    return merged((q @ k.mT + q @ r.mT).softmax(-1) @ v)


def other_value_dim(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return merged((q @ k.mT).softmax(-1) @ torch.cat([v, v.tanh()], -1))


def to_memory(m: Weights, x: Tensor) -> Tensor:
    """Keys of another length: split queries, whole keys."""
    q, _, _ = m.heads(x)
    _, k, v = m.heads(m.relative.weight.flatten()[: 5 * WIDTH].view(1, 5, WIDTH))
    return merged((q @ k.mT).softmax(-1) @ v)


def to_one_more(m: Weights, x: Tensor) -> Tensor:
    """A learned key and value in front."""
    q, k, v = m.heads(x)
    k, v = (torch.cat([y.new_ones(x.shape[0], HEADS, 1, DIM), y], 2) for y in (k, v))
    return merged((q @ k.mT).softmax(-1) @ v)


def torch_module(m: Weights, x: Tensor) -> Tensor:
    """nn.MultiheadAttention with weights that nobody reads."""
    return m.mha(x, x, x, attn_mask=m.above[: x.shape[1], : x.shape[1]])[0]


def behind_a_router(m: Weights, x: Tensor) -> Tensor:
    """Another softmax that is none of attention's."""
    gates = m.positions(x).softmax(-1)
    return plain(m, x) * gates
