"""Ops along and across the sequence, as functions of a small module's attention and its length.

Each takes the module and what attention made, [B, S, 16], and returns what the module puts out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.own_modules.attentions import Item, index


def along(function: Any) -> Item:
    """A function of [B, 16, S], of what is [B, S, 16]."""
    return lambda m, y: function(y.transpose(1, 2)).transpose(1, 2)


def column(y: Tensor, values: Tensor) -> Tensor:
    return y + values.to(y.dtype)[:, None]


def classes(y: Tensor) -> Tensor:
    return (y[..., 0] > 0).long() + (y[..., 1] > 0)


def whole(y: Tensor) -> Tensor:
    """Whole numbers from -4 to 4."""
    return (y * 2).clamp(-4, 4).round().long()


def shifted_loss(m: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(y[:, :-1].reshape(-1, 16), classes(y)[:, 1:].reshape(-1))


def bags(m: Any, y: Tensor) -> Tensor:
    bag = F.embedding_bag((whole(y) + 4).flatten(0, 1), m.relative)
    return bag.view(y.shape[0], y.shape[1], 4)


def bags_by_offset(m: Any, y: Tensor) -> Tensor:
    tokens = (whole(y)[..., 0] + 4).flatten()
    offsets = torch.arange(y.shape[0]) * y.shape[1]
    return F.embedding_bag(tokens, m.relative, offsets, mode="sum")


def gram(m: Any, y: Tensor) -> Tensor:
    return torch.einsum("bsd,btd->bst", y, y).diagonal(dim1=1, dim2=2)


def take_along(m: Any, y: Tensor) -> Tensor:
    return torch.take_along_dim(y, y.argsort(1), 1)


def scattered(m: Any, y: Tensor) -> Tensor:
    return torch.zeros_like(y).index_add(1, index(y).flip(0), y)


def moving_average(m: Any, y: Tensor) -> Tensor:
    lag = (index(y)[:, None] - index(y)[None]).clamp(min=0).to(y.dtype)
    return torch.einsum("ts,bsd->btd", torch.tril(0.9**lag), y)


OPS: dict[str, Item] = {
    "std": lambda m, y: y / y.std(1, keepdim=True),
    "std, biased": lambda m, y: y / y.std(1, unbiased=False, keepdim=True),
    "var": lambda m, y: y / (1 + y.var(1, keepdim=True)),
    "var_mean": lambda m, y: sum(torch.var_mean(y, 1, correction=0)),
    "std_mean": lambda m, y: sum(torch.std_mean(y, 1)),
    "std of all": lambda m, y: y / y.std(),
    "instance_norm": along(F.instance_norm),
    "group_norm": along(lambda t: F.group_norm(t, 4)),
    "batch statistics": along(lambda t: (t - t.mean(2, keepdim=True)) / (t.amax(2, True) + 3)),
    "local_response_norm": along(lambda t: F.local_response_norm(t, 3)),
    "normalize over tokens": lambda m, y: F.normalize(y, dim=1),
    "hstack": lambda m, y: torch.hstack([y, y * 2]),
    "vstack": lambda m, y: torch.vstack([y, y * 2]),
    "dstack": lambda m, y: torch.dstack([y, y * 2]),
    "column_stack": lambda m, y: torch.column_stack([y, y * 2]),
    "left shift": lambda m, y: y * (whole(y) << 2),
    "right shift": lambda m, y: y * (whole(y) >> 1),
    "shift by positions": lambda m, y: column(y, (index(y) << 1) >> 2),
    "bitwise and, or": lambda m, y: y * ((whole(y) & 3) | (whole(y) & 4)),
    "bitwise xor, not": lambda m, y: y * (~whole(y) ^ 5),
    "bits of positions": lambda m, y: column(y, index(y) & 1),
    "kthvalue over tokens": lambda m, y: y - y.kthvalue(2, 1, keepdim=True).values,
    "kthvalue over features": lambda m, y: y - y.kthvalue(2, -1, keepdim=True).values,
    "embedding_bag": bags,
    "embedding_bag by offsets": bags_by_offset,
    "cdist over tokens": lambda m, y: torch.cdist(y, y).mean(-1),
    "cdist, p = 1": lambda m, y: torch.cdist(y, y, p=1.0).amax(-1),
    "cdist to centres": lambda m, y: torch.cdist(y, m.centres),
    "bilinear": lambda m, y: F.bilinear(y, y, m.cube),
    "bilinear, bias": lambda m, y: F.bilinear(y, y * 2, m.cube, m.mix[0]),
    "cross_entropy": lambda m, y: F.cross_entropy(y.flatten(0, 1), classes(y).flatten()),
    "cross_entropy, each token": lambda m, y: F.cross_entropy(
        y.transpose(1, 2), classes(y), reduction="none"),
    "cross_entropy, shifted": shifted_loss,
    "cross_entropy, smoothed": lambda m, y: F.cross_entropy(
        y.flatten(0, 1), classes(y).flatten(), label_smoothing=0.1),
    "nll_loss": lambda m, y: F.nll_loss(y.log_softmax(-1).flatten(0, 1), classes(y).flatten()),
    "kl_div": lambda m, y: F.kl_div(y.log_softmax(-1), y.flip(-1).softmax(-1), reduction="sum"),
    "mse_loss": lambda m, y: F.mse_loss(y, y.roll(1, -1)),
    "smooth_l1_loss": lambda m, y: F.smooth_l1_loss(y, y.roll(1, -1), reduction="none"),
    "binary_cross_entropy": lambda m, y: F.binary_cross_entropy_with_logits(y, y.sigmoid()),
    "cosine_embedding": lambda m, y: 1 - F.cosine_similarity(y, y.roll(1, -1), dim=-1),
    "cosine of neighbours": lambda m, y: F.cosine_similarity(y[:, 1:], y[:, :-1], dim=-1),
    "pairwise_distance": lambda m, y: F.pairwise_distance(y, y.roll(1, -1)),
    "linspace(0, 1, s)": lambda m, y: column(y, torch.linspace(0, 1, y.shape[1], dtype=y.dtype)),
    "log(s)": lambda m, y: y * math.log(y.shape[1]),
    "log2(s)": lambda m, y: y * math.log2(y.shape[1]),
    "sqrt(s)": lambda m, y: y * math.sqrt(y.shape[1]),
    "1 / s": lambda m, y: y * (1 / y.shape[1]),
    "s ** -0.5": lambda m, y: y * y.shape[1] ** -0.5,
    "s ** 0.5": lambda m, y: y * y.shape[1] ** 0.5,
    "exp(1 / s)": lambda m, y: y * math.exp(1 / y.shape[1]),
    "s as a tensor": lambda m, y: y * torch.log(torch.tensor(y.shape[1], dtype=y.dtype)),
    "float(s)": lambda m, y: y / float(y.shape[1]),
    "max(s, 20)": lambda m, y: y / max(y.shape[1], 20),
    "float arange": lambda m, y: column(y, torch.arange(y.shape[1], dtype=y.dtype) / y.shape[1]),
    "float arange of a float": lambda m, y: column(y, torch.arange(float(y.shape[1]))),
    "arange from 0.5": lambda m, y: column(y, torch.arange(0.5, y.shape[1] + 0.5)),
    "arange by 1 / s": lambda m, y: column(y, torch.arange(0, 1, 1 / y.shape[1])[: y.shape[1]]),
    "arange backwards": lambda m, y: column(y, torch.arange(y.shape[1] - 1, -1, -1)),
    "log of positions": lambda m, y: y * torch.log1p(index(y))[:, None],
    "every other token": lambda m, y: y[:, ::2],
    "every third from one": lambda m, y: y[:, 1::3] * 2,
    "odd less even": lambda m, y: y[:, 1::2] - y[:, ::2][:, : y.shape[1] // 2],
    "max_pool1d": along(lambda t: F.max_pool1d(t, 3, 1, 1)),
    "max_pool1d, stride 2": along(lambda t: F.max_pool1d(t, 2)),
    "max_pool1d with indices": along(lambda t: F.max_pool1d(t, 2, return_indices=True)[1]),
    "avg_pool1d": along(lambda t: F.avg_pool1d(t, 3, 1, 1)),
    "avg_pool1d, stride 3": along(lambda t: F.avg_pool1d(t, 3, ceil_mode=True)),
    "lp_pool1d": along(lambda t: F.lp_pool1d(t.abs(), 2, 3, 2)),
    "adaptive_avg_pool1d": along(lambda t: F.adaptive_avg_pool1d(t, 4)),
    "adaptive_max_pool1d": along(lambda t: F.adaptive_max_pool1d(t, 4)),
    "max_pool2d over all": lambda m, y: F.max_pool2d(y, 2),
    "repeat_interleave": lambda m, y: y.repeat_interleave(2, 1),
    "repeat_interleave by s": lambda m, y: y + y.mean(1, True).repeat_interleave(y.shape[1], 1),
    "repeated and cut": lambda m, y: y[:, ::2].repeat_interleave(2, 1)[:, : y.shape[1]],
    "expand by s": lambda m, y: y * m.mix[0].repeat(4).expand(y.shape[1], -1),
    "tile": lambda m, y: y.tile(1, 2, 1),
    "rand": lambda m, y: y + 0 * torch.rand(y.shape[1], 1),
    "rand_like": lambda m, y: y + 0 * torch.rand_like(y),
    "randn": lambda m, y: y + 0 * torch.randn(y.shape),
    "randint": lambda m, y: y + 0 * torch.randint(0, 5, (y.shape[1], 1)),
    "randperm": lambda m, y: y[:, torch.randperm(y.shape[1])].sum(1),
    "bernoulli": lambda m, y: y + 0 * torch.bernoulli(y.sigmoid()),
    "quantile over tokens": lambda m, y: y - y.quantile(0.3, dim=1, keepdim=True),
    "quantile over features": lambda m, y: y - y.quantile(0.3, dim=-1, keepdim=True),
    "median": lambda m, y: y - y.median(1, keepdim=True).values,
    "mode": lambda m, y: whole(y).mode(1).values,
    "cov of features": lambda m, y: torch.cov(y.flatten(0, 1).T),
    "corrcoef": lambda m, y: torch.corrcoef(y[0].T),
    "diff": lambda m, y: torch.diff(y, dim=1, prepend=y[:, :1]),
    "trapezoid": lambda m, y: torch.trapezoid(y, dim=1),
    "cumulative_trapezoid": lambda m, y: torch.cumulative_trapezoid(y, dim=1),
    "cumprod": lambda m, y: torch.cumprod(y.sigmoid() + 0.4, 1),
    "cummax": lambda m, y: torch.cummax(y, 1).values,
    "logcumsumexp": lambda m, y: torch.logcumsumexp(y, 1),
    "cumsum, float mean": lambda m, y: y.cumsum(1) / (index(y) + 1)[:, None],
    "flip": lambda m, y: y.flip(1) + y,
    "roll": lambda m, y: y.roll(1, 1) - y,
    "roll all": lambda m, y: y.roll(3) - y,
    "rot90": lambda m, y: torch.rot90(y, 2, (1, 2)),
    "interpolate": along(lambda t: F.interpolate(t, scale_factor=2)),
    "interpolate linear": along(lambda t: F.interpolate(t, scale_factor=2, mode="linear")),
    "windows by unfold": lambda m, y: F.pad(y, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1),
    "windows by F.unfold": lambda m, y: F.unfold(y[:, None], (3, 16)).transpose(1, 2),
    "bincount": lambda m, y: torch.bincount((whole(y) + 4).flatten(), minlength=9),
    "histc": lambda m, y: torch.histc(y, 8, -4, 4),
    "searchsorted": lambda m, y: torch.searchsorted(m.mix[0].sort().values, y),
    "bucketize": lambda m, y: torch.bucketize(y, m.mix[0].sort().values),
    "argsort and take": take_along,
    "sort": lambda m, y: y.sort(1, descending=True).values,
    "topk over tokens": lambda m, y: y.topk(3, 1).values,
    "msort": lambda m, y: torch.msort(y.transpose(0, 1)),
    "aminmax": lambda m, y: sum(torch.aminmax(y, dim=1)),
    "argmax of all": lambda m, y: y.argmax(),
    "tensor_split": lambda m, y: y.tensor_split(4, 2)[1],
    "meshgrid": lambda m, y: y + torch.stack(
        torch.meshgrid(index(y), torch.arange(16), indexing="ij")).sum(0),
    "diagonal of the pairs": gram,
    "diag_embed": lambda m, y: torch.diag_embed(y[..., :3]),
    "tril of pairs": lambda m, y: (y @ y.transpose(1, 2)).tril() @ y / 99,
    "pairs, summed": lambda m, y: (y @ y.transpose(1, 2)).sum(-1),
    "gram of features": lambda m, y: y.transpose(1, 2) @ y,
    "outer of a row": lambda m, y: y[..., :, None] * y[..., None, :3],
    "kron": lambda m, y: torch.kron(y, m.mix[:1]),
    "index_add": scattered,
    "moving average": moving_average,
    "fft over tokens": lambda m, y: torch.fft.fft(y, dim=1).real,
    "rfft and back": lambda m, y: torch.fft.irfft(torch.fft.rfft(y, dim=-1), dim=-1),
    "renorm": lambda m, y: torch.renorm(y, 2.0, 2, 1.5),
    "logaddexp, hypot": lambda m, y: torch.logaddexp(y, torch.hypot(y, y * 2)),
    "vander": lambda m, y: torch.vander(y[0, :, 0].tanh(), 3),
    "cross": lambda m, y: torch.linalg.cross(y[..., :3], y[..., 3:6]),
    "matrix norm": lambda m, y: torch.linalg.matrix_norm(y),
    "vector norm": lambda m, y: torch.linalg.vector_norm(y, dim=1),
    "softmax over tokens": lambda m, y: y * y.softmax(1),
    "gumbel without noise": lambda m, y: F.one_hot(y.argmax(-1), 16) * y,
    "lerp, addcmul": lambda m, y: torch.addcmul(y.lerp(y.flip(-1), 0.3), y, y, value=0.5),
    "nan_to_num": lambda m, y: torch.nan_to_num(y.log()),
    "polar": lambda m, y: torch.view_as_real(torch.polar(y.abs(), y)).flatten(2),
    "prelu": lambda m, y: F.prelu(y, m.mix[0, :1]),
    "bitwise from bools": lambda m, y: y * ((y > 0) ^ (y > 1)),
}
