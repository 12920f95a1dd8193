"""What people put between attention and the head: tokens merged, mixed, pooled, sorted, shifted.

Each kind on every axis, at lengths that divide and do not, in float64. A program whose length is
fixed by a weight runs at that length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.silent.small import CAPTURED, HEADS, WIDTH, Model, ids, matches
from tests.support import some_fast

Between = Callable[[Any, Tensor, Tensor], Tensor]


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    y = F.scaled_dot_product_attention(split(q), split(k), split(v), **options)
    return y.transpose(1, 2).flatten(2)


def merged_in_pairs(m: Any, x: Tensor, _: Tensor) -> Tensor:
    """Keys of two tokens each, an odd one with zeros."""
    pairs = m.pairs(F.pad(x, (0, 0, 0, x.shape[1] % 2)).reshape(x.shape[0], -1, 2 * WIDTH))
    return attended(x, pairs, pairs)


def over_all_tokens(m: Any, x: Tensor, _: Tensor) -> Tensor:
    return m.tokens(x.transpose(1, 2)).transpose(1, 2)


def gated_by_all_tokens(m: Any, x: Tensor, _: Tensor) -> Tensor:
    return x * (m.square[: x.shape[1], : x.shape[1]].tril() @ x) / 8


def through_latents(m: Any, x: Tensor, _: Tensor) -> Tensor:
    latents = attended(m.latents.expand(x.shape[0], -1, -1), x, x)
    return attended(x, latents, latents)


def chosen_tokens(m: Any, x: Tensor, _: Tensor) -> Tensor:
    """A mixture of depths: four tokens of each sequence go on."""
    chosen = x[..., 0].topk(4, 1).indices
    place = chosen.sort(1).values[..., None].expand(-1, -1, WIDTH)
    return torch.zeros_like(x).scatter(1, place, m.attention(x.gather(1, place)))


def every_other_key(m: Any, x: Tensor, _: Tensor) -> Tensor:
    return attended(x, x[:, ::2], x[:, ::2])


def keys_and_their_mean(m: Any, x: Tensor, _: Tensor) -> Tensor:
    keys = torch.cat([x, x.mean(1, keepdim=True)], 1)
    return attended(x, keys, keys)


def linear_attention(m: Any, x: Tensor, _: Tensor) -> Tensor:
    q, v = F.elu(split(x)) + 1, split(x)
    out = (q @ (q.transpose(-1, -2) @ v)) / (q @ q.sum(2)[..., None])
    return out.transpose(1, 2).flatten(2)


def transformed(m: Any, x: Tensor, _: Tensor) -> Tensor:
    return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=1).real / 16


def of_documents(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    document = (tokens % 7 == 3).cumsum(1)
    same = (document[:, :, None] == document[:, None]).unsqueeze(1)
    return attended(x, x, x, attn_mask=same)


def temperature_by_position(m: Any, x: Tensor, _: Tensor) -> Tensor:
    return attended(x * torch.arange(1, x.shape[1] + 1).double().log()[:, None], x, x)


def how_often(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return x * F.one_hot(tokens, 48).sum(1).gather(1, tokens)[..., None]


def padded_mean(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    kept = (tokens % 5 > 0).double()[..., None]
    return x - (x * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


KINDS: dict[str, tuple[Between, dict[str, Callable[[], Any]]]] = {
    "merged in pairs": (merged_in_pairs, {"pairs": lambda: nn.Linear(2 * WIDTH, WIDTH)}),
    "over all tokens": (over_all_tokens, {"tokens": lambda: nn.Linear(CAPTURED, CAPTURED)}),
    "gated by all tokens": (gated_by_all_tokens, {"square": lambda: weights(48, 48)}),
    "latents": (through_latents, {"latents": lambda: weights(5, WIDTH)}),
    "chosen tokens": (chosen_tokens, {}),
    "every other key": (every_other_key, {}),
    "keys and their mean": (keys_and_their_mean, {}),
    "linear attention": (linear_attention, {}),
    "fourier": (transformed, {}),
    "documents": (of_documents, {}),
    "temperature": (temperature_by_position, {}),
    "how often": (how_often, {}),
    "padded mean": (padded_mean, {}),
    "median": (lambda m, x, _: x - x.median(1, keepdim=True).values, {}),
    "sorted": (lambda m, x, _: x.sort(1).values, {}),
    "backwards": (lambda m, x, _: x.flip(1), {}),
    "rolled": (lambda m, x, _: x.roll(2, 1), {}),
    "later ones": (lambda m, x, _: F.pad(x, (0, 0, 0, 2))[:, 2:], {}),
    "differences": (lambda m, x, _: F.pad(x.diff(dim=1), (0, 0, 1, 0)), {}),
    "largest so far": (lambda m, x, _: x.cummax(1).values, {}),
    "products so far": (lambda m, x, _: x.sigmoid().cumprod(1), {}),
    "deviation": (lambda m, x, _: x / x.std(1, keepdim=True), {}),
    "third order": (lambda m, x, _: torch.einsum("bqd,bkd,bke->bqe", x, x, x) / 32, {}),
}
SPECS = ["ring=4", "ulysses=2", "ring=2,ulysses=2", "tp=2", "ring=2,tp=2", "ring=2,ulysses=2,tp=2",
         "pp=2", "dp=2", "time=2", "halves=2"]
FAST = {("merged in pairs", "dp=2"), ("over all tokens", "ring=2,tp=2"), ("latents", "ring=4"),
        ("chosen tokens", "time=2"), ("every other key", "ring=2,ulysses=2")}


@pytest.mark.parametrize(
    ("kind", "spec"), some_fast(KINDS, SPECS, fast=lambda kind, spec: (kind, spec) in FAST))
def test_right(kind: str, spec: str) -> None:
    between, made = KINDS[kind]
    model = Model(between, **{name: make() for name, make in made.items()})
    lengths = (CAPTURED,) if kind == "over all tokens" else (27, 5)
    matches(model, spec, lambda n: (ids(n),), lengths)
