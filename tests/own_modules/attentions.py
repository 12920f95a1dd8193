"""Attention in other words than a softmax of scaled and masked scores.

They are functions of a small module. Each takes the module and hidden states [B, S, 16], and
returns what the module puts out. Queries, keys and values are [B, 4, S, 4].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Item = Callable[[Any, Tensor], Any]


def scores(m: Any, x: Tensor) -> Tensor:
    q, k, _ = m.heads(x)
    return q @ k.transpose(-1, -2) / 2


def index(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def causal(x: Tensor) -> Tensor:
    return index(x)[:, None] >= index(x)[None, :]


def distance(x: Tensor) -> Tensor:
    return (index(x)[:, None] - index(x)[None, :]).clamp(-7, 7) + 7


def weigh(m: Any, x: Tensor, weights: Tensor) -> Tensor:
    return m.merged(weights @ m.heads(x)[2])


def positive(x: Tensor, floor: float = -30.0) -> Tensor:
    """Exponentials of scores less the largest of their row."""
    return torch.exp((x - x.amax(-1, keepdim=True)).clamp(min=floor))


def off_by_one(m: Any, x: Tensor) -> Tensor:
    e = scores(m, x).exp()
    return weigh(m, x, e / (1 + e.sum(-1, keepdim=True)))


def off_by_one_stable(m: Any, x: Tensor) -> Tensor:
    s = scores(m, x).masked_fill(~causal(x), -math.inf)
    top = s.amax(-1, keepdim=True).clamp(min=0)
    e = torch.exp(s - top)
    return weigh(m, x, e / (torch.exp(-top) + e.sum(-1, keepdim=True)))


def exp_over_sum(m: Any, x: Tensor, hidden: bool) -> Tensor:
    s = scores(m, x)
    e = (s.masked_fill(~causal(x), -math.inf) if hidden else s).exp()
    return weigh(m, x, e / e.sum(-1, keepdim=True))


def divided_afterwards(m: Any, x: Tensor) -> Tensor:
    e = (scores(m, x) - scores(m, x).amax(-1, keepdim=True)).exp() * causal(x)
    v = m.heads(x)[2]
    return m.merged((e @ v) / e.sum(-1, keepdim=True))


def talking(m: Any, x: Tensor, before: bool, after: bool) -> Tensor:
    s = scores(m, x)
    s = torch.einsum("bhqk,hg->bgqk", s, m.mix) if before else s
    p = s.masked_fill(~causal(x), -math.inf).softmax(-1)
    p = torch.einsum("bhqk,hg->bgqk", p, m.mix) if after else p
    return weigh(m, x, p)


def gpt1(m: Any, x: Tensor) -> Tensor:
    s, b = scores(m, x), causal(x).to(x.dtype)
    return weigh(m, x, (s * b + -1e4 * (1 - b)).softmax(-1))


def two_fills(m: Any, x: Tensor) -> Tensor:
    s = scores(m, x).masked_fill(~causal(x), -1e4)
    return weigh(m, x, s.masked_fill((x[:, None, None, :, 0] > 1), -1e9).softmax(-1))


def with_weights(m: Any, x: Tensor, what: Callable[[Tensor], Tensor]) -> Any:
    p = scores(m, x).masked_fill(~causal(x), -math.inf).softmax(-1)
    return weigh(m, x, p), what(p)


def deberta(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    where = distance(x).expand(x.shape[0], 4, -1, -1)
    c2p = torch.gather(q @ m.relative.T, -1, where)
    p2c = torch.gather(k @ m.relative.T, -1, where).transpose(-1, -2)
    return m.merged(((q @ k.transpose(-1, -2) + c2p + p2c) / 12**0.5).softmax(-1) @ v)


def shaw(m: Any, x: Tensor, values: bool) -> Tensor:
    q, _, v = m.heads(x)
    table = F.embedding(distance(x), m.relative)
    p = (scores(m, x) + torch.einsum("bhqd,qkd->bhqk", q, table)).softmax(-1)
    y = p @ v
    return m.merged(y + torch.einsum("bhqk,qkd->bhqd", p, table) if values else y)


def transformer_xl(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    n = x.shape[1]
    place = torch.arange(n - 1, -1, -1, dtype=x.dtype)[:, None] * m.relative[0] / 9
    bd = q @ place.cos().T
    bd = F.pad(bd, (1, 0)).reshape(x.shape[0], 4, n + 1, n)[:, :, 1:].reshape(bd.shape)
    s = (q @ k.transpose(-1, -2) + bd) / 2
    return m.merged(s.masked_fill(~causal(x), -math.inf).softmax(-1) @ v)


def two_differences(m: Any, x: Tensor) -> Tensor:
    t, u = x[..., 0], x[..., 1]
    bias = -(t[:, :, None] - t[:, None]) ** 2 - (u[:, :, None] - u[:, None]).abs()
    return weigh(m, x, (scores(m, x) + bias[:, None]).softmax(-1))


def forgetting(m: Any, x: Tensor) -> Tensor:
    gate = F.logsigmoid(m.gate(x)).cumsum(1).transpose(1, 2)
    s = scores(m, x) + gate[..., :, None] - gate[..., None, :]
    return weigh(m, x, s.masked_fill(~causal(x), -math.inf).softmax(-1))


def stick_breaking(m: Any, x: Tensor) -> Tensor:
    s = scores(m, x)
    left = F.logsigmoid(-s).masked_fill(~causal(x), 0.0)
    after = left.flip(-1).cumsum(-1).flip(-1) - left
    return weigh(m, x, torch.exp(F.logsigmoid(s) + after).masked_fill(~causal(x), 0.0))


def every_other_query(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return m.merged(F.scaled_dot_product_attention(q[:, :, ::2], k, v))


def every_other_key(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return m.merged((q @ k[:, :, ::2].transpose(-1, -2)).softmax(-1) @ v[:, :, ::2])


def pooled_keys(m: Any, x: Tensor) -> Tensor:
    pooled = F.avg_pool1d(x.transpose(1, 2), 2, ceil_mode=True).transpose(1, 2)
    (q, _, _), (_, k, v) = m.heads(x), m.heads(pooled)
    return m.merged(F.scaled_dot_product_attention(q, k, v))


def latents(m: Any, x: Tensor) -> Tensor:
    p = (m.mix @ m.heads(x)[1].transpose(-1, -2)).softmax(-1)
    _, k, v = m.heads(x)
    q = m.heads(x)[0]
    return m.merged((q @ (p @ k).transpose(-1, -2)).softmax(-1) @ (p @ v))


def indexer(m: Any, x: Tensor) -> Tensor:
    """The keys that a small scorer puts first are seen, as in DeepSeek V3.2."""
    s = (m.up(x)[..., :8] @ m.up(x)[..., 8:16].transpose(-1, -2)).relu()
    s = s.masked_fill(~causal(x), -math.inf)
    chosen = s.topk(4, -1).indices
    mask = torch.full_like(s, -math.inf).scatter(-1, chosen, 0.0)
    mask = mask.masked_fill(~causal(x), -math.inf)
    return weigh(m, x, (scores(m, x) + mask[:, None]).softmax(-1))


def gathered_keys(m: Any, x: Tensor) -> Tensor:
    """Keys and values of the chosen indices alone."""
    q, k, v = m.heads(x)
    chosen = scores(m, x).topk(3, -1).indices.flatten(2)[..., None].expand(-1, -1, -1, 4)
    shape = (*q.shape[:3], 3, 4)
    keys, values = k.gather(2, chosen).view(shape), v.gather(2, chosen).view(shape)
    p = (q[..., None, :] @ keys.transpose(-1, -2)).softmax(-1)
    return m.merged((p @ values).squeeze(-2))


def strongest(m: Any, x: Tensor) -> Tensor:
    s = scores(m, x)
    return weigh(m, x, s.masked_fill(s < s.topk(3, -1).values[..., -1:], -math.inf).softmax(-1))


def by_kth_value(m: Any, x: Tensor) -> Tensor:
    s = scores(m, x)
    return weigh(m, x, s.masked_fill(s < s.kthvalue(2, -1, keepdim=True).values, -1e9).softmax(-1))


def windows(m: Any, x: Tensor) -> Tensor:
    """Each query and the four keys up to its own, by `unfold`."""
    q, k, v = m.heads(x)
    keys, values = (F.pad(t, (0, 0, 3, 0)).unfold(2, 4, 1) for t in (k, v))
    s = torch.einsum("bhsd,bhsdw->bhsw", q, keys)
    seen = index(x)[:, None] >= 3 - torch.arange(4)[None]
    p = s.masked_fill(~seen, -math.inf).softmax(-1)
    return m.merged(torch.einsum("bhsw,bhsdw->bhsd", p, values))


def blocks(m: Any, x: Tensor) -> Tensor:
    """Blocks of four tokens, the last one padded."""
    n = x.shape[1]
    count = (n + 3) // 4
    q, k, v = (F.pad(t, (0, 0, 0, count * 4 - n)).reshape(x.shape[0], 4, count, 4, 4)
               for t in m.heads(x))
    s = (q @ k.transpose(-1, -2)).masked_fill(
        (torch.arange(count * 4) >= n).view(count, 1, 4), -math.inf)
    return m.merged((s.softmax(-1) @ v).flatten(2, 3)[:, :, :n])


def linear(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return m.merged((q @ (k.transpose(-1, -2) @ v)) / (q @ k.sum(-2)[..., None]))


def cosine(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
    return m.merged((s * 3).softmax(-1) @ v)


def distances(m: Any, x: Tensor, p: float) -> Tensor:
    q, k, _ = m.heads(x)
    return weigh(m, x, (-torch.cdist(q, k, p=p)).softmax(-1))


def additive(m: Any, x: Tensor) -> Tensor:
    q, k, _ = m.heads(x)
    s = torch.tanh(q[:, :, :, None] + k[:, :, None]) @ m.mix[0]
    return weigh(m, x, s.softmax(-1))


def sparsemax(m: Any, x: Tensor) -> Tensor:
    s = scores(m, x)
    z = s.sort(-1, descending=True).values
    count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    support = 1 + count * z > z.cumsum(-1)
    size = support.sum(-1, keepdim=True)
    tau = ((z * support).sum(-1, keepdim=True) - 1) / size
    return weigh(m, x, (s - tau).clamp(min=0))


def hard(m: Any, x: Tensor) -> Tensor:
    q, _, v = m.heads(x)
    best = scores(m, x).argmax(-1)
    return m.merged(v.gather(2, best[..., None].expand(q.shape)))


def sinkhorn(m: Any, x: Tensor) -> Tensor:
    p = scores(m, x)
    for _ in range(3):
        p = p - p.logsumexp(-1, keepdim=True)
        p = p - p.logsumexp(-2, keepdim=True)
    return weigh(m, x, p.exp())


def differential(m: Any, x: Tensor) -> Tensor:
    s = scores(m, x).masked_fill(~causal(x), -math.inf)
    first, second = s.chunk(2, 1)
    p = first.softmax(-1) - 0.3 * second.softmax(-1)
    return weigh(m, x, torch.cat([p, p], 1))


def t5(m: Any, x: Tensor) -> Tensor:
    bias = F.embedding(distance(x), m.relative).permute(2, 0, 1)
    return weigh(m, x, (scores(m, x) + bias).softmax(-1))


def retention(m: Any, x: Tensor) -> Tensor:
    lag = (index(x)[:, None] - index(x)[None]).to(x.dtype)
    decay = torch.where(causal(x), 0.9 ** lag.clamp(min=0), 0.0)
    s = scores(m, x) * decay
    return weigh(m, x, s / s.abs().sum(-1, keepdim=True).clamp(min=1))


def realformer(m: Any, x: Tensor) -> Tensor:
    first = scores(m, x)
    y = x + weigh(m, x, first.softmax(-1))
    return weigh(m, y, (first + scores(m, y)).softmax(-1))


def rollout(m: Any, x: Tensor) -> Any:
    first = scores(m, x).softmax(-1)
    y = x + weigh(m, x, first)
    second = scores(m, y).softmax(-1)
    return weigh(m, y, second), second.mean(1) @ first.mean(1)


def prefix_mean(m: Any, x: Tensor) -> Tensor:
    p = causal(x).to(x.dtype)
    return weigh(m, x, p / p.sum(-1, keepdim=True))


def min_max(m: Any, x: Tensor) -> Tensor:
    s = scores(m, x)
    low, high = s.amin(-1, keepdim=True), s.amax(-1, keepdim=True)
    return weigh(m, x, (s - low) / (high - low + 1) / x.shape[1])


def five_dims(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    q = q.unflatten(1, (2, 2))
    p = torch.einsum("bgrqd,bgkd->bgrqk", q, k[:, ::2]).sigmoid()
    return m.merged(torch.einsum("bgrqk,bgkd->bgrqd", p, v[:, ::2]).flatten(1, 2) / 9)


ATTENTIONS: dict[str, Item] = {
    "exp over its sum": lambda m, x: exp_over_sum(m, x, hidden=False),
    "exp over its sum, causal": lambda m, x: exp_over_sum(m, x, hidden=True),
    "divided behind the values": divided_afterwards,
    "softmax off by one": off_by_one,
    "softmax off by one, less the largest": off_by_one_stable,
    "log-softmax": lambda m, x: weigh(m, x, scores(m, x).log_softmax(-1).exp()),
    "sigmoid": lambda m, x: weigh(m, x, (scores(m, x) - math.log(x.shape[1])).sigmoid()),
    "sigmoid, causal": lambda m, x: weigh(
        m, x, scores(m, x).sigmoid().masked_fill(~causal(x), 0.0) / 9),
    "ReLU over the length": lambda m, x: weigh(m, x, scores(m, x).relu() / x.shape[1]),
    "ReLU squared, causal": lambda m, x: weigh(
        m, x, (scores(m, x).relu() ** 2).tril() / x.shape[1]),
    "softplus, normalised": lambda m, x: weigh(
        m, x, F.normalize(F.softplus(scores(m, x)), p=1, dim=-1)),
    "talking heads before": lambda m, x: talking(m, x, before=True, after=False),
    "talking heads after": lambda m, x: talking(m, x, before=False, after=True),
    "talking heads both": lambda m, x: talking(m, x, before=True, after=True),
    "scaled key by key": lambda m, x: weigh(
        m, x, (scores(m, x) * m.gate(x).transpose(1, 2)[:, :, None]).softmax(-1)),
    "scores times a mask, as GPT-1": gpt1,
    "two finite fills": two_fills,
    "a boolean mask added": lambda m, x: weigh(m, x, (scores(m, x) + causal(x)).softmax(-1)),
    "weights returned": lambda m, x: with_weights(m, x, lambda p: p),
    "weights returned, mean of heads": lambda m, x: with_weights(m, x, lambda p: p.mean(1)),
    "largest weight returned": lambda m, x: with_weights(m, x, lambda p: p.amax(-1)),
    "entropy returned": lambda m, x: with_weights(
        m, x, lambda p: -(p * (p + 1e-9).log()).sum(-1)),
    "weights that each key gets": lambda m, x: with_weights(m, x, lambda p: p.sum(-2)),
    "c2p and p2c, as DeBERTa": deberta,
    "relative keys": lambda m, x: shaw(m, x, values=False),
    "relative keys and values": lambda m, x: shaw(m, x, values=True),
    "shifted relative scores, as Transformer-XL": transformer_xl,
    "two outer differences": two_differences,
    "forget gates": forgetting,
    "stick-breaking": stick_breaking,
    "every other query": every_other_query,
    "every other key": every_other_key,
    "pooled keys": pooled_keys,
    "latents": latents,
    "chosen by an indexer": indexer,
    "keys gathered by index": gathered_keys,
    "the strongest keys": strongest,
    "above the k-th value": by_kth_value,
    "windows by unfold": windows,
    "blocks, padded": blocks,
    "linear": linear,
    "cosine": cosine,
    "Euclidean distances": lambda m, x: distances(m, x, 2.0),
    "Manhattan distances": lambda m, x: distances(m, x, 1.0),
    "additive": additive,
    "sparsemax": sparsemax,
    "one key each": hard,
    "softmax over queries": lambda m, x: weigh(m, x, scores(m, x).softmax(-2)),
    "over queries, then keys": lambda m, x: weigh(
        m, x, F.normalize(scores(m, x).softmax(-2), p=1, dim=-1)),
    "Sinkhorn": sinkhorn,
    "differential": differential,
    "a gate for each pair": lambda m, x: weigh(
        m, x, scores(m, x).softmax(-1) * scores(m, x).flip(1).sigmoid()),
    "weights scaled by head": lambda m, x: weigh(
        m, x, scores(m, x).softmax(-1) * m.mix[0][:, None, None]),
    "a temperature for each query": lambda m, x: weigh(
        m, x, (scores(m, x) * F.softplus(m.gate(x)).transpose(1, 2)[..., None]).softmax(-1)),
    "bias in buckets": t5,
    "retention": retention,
    "scores of the layer before": realformer,
    "weights times weights": rollout,
    "mean of the prefix": prefix_mean,
    "between least and largest": min_max,
    "weights clamped": lambda m, x: weigh(
        m, x, F.normalize(scores(m, x).softmax(-1).clamp(min=0.02), p=1, dim=-1)),
    "five dims, sigmoid": five_dims,
    "cubed": lambda m, x: weigh(m, x, scores(m, x) ** 3 / x.shape[1]),
    "hidden at random by data": lambda m, x: weigh(
        m, x, scores(m, x).where(scores(m, x) > -0.5, -1e9).softmax(-1)),
}
