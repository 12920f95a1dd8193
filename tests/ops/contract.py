"""The contract of block attention: inputs, the reference in float64, what rounding may do."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
INF = math.inf

# What rounding may do to the LSE and, times values of order 1, to the output. Scores of unit
# normals scaled by D**-0.5 are about 1; a dot product of D <= 512 terms is off by about
# D**0.5 units in the last place, 1.4e-6 in fp32, and 10 times that leaves room for exp and the
# sums. The CPU flash op takes a faster exp for halves, good to about 20 bits: 1e-4.
ATOL = {FP64: 1e-12, FP32: 1e-5, FP16: 1e-4, BF16: 1e-4}


@dataclass(frozen=True)
class Expected:
    """Attention in float64; `spread` is the mean of |v| under the same weights."""

    out: Tensor
    lse: Tensor
    spread: Tensor


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Expected:
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask, scores, -INF)
    elif mask is not None:
        scores = scores + mask.double()
    if causal:
        i, j = torch.arange(q.shape[2], device=q.device), torch.arange(k.shape[2], device=q.device)
        scores = torch.where(j <= i[:, None], scores, -INF)
    top = scores.amax(-1, keepdim=True).clamp(min=-1e300)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.log()).squeeze(-1)
    weights = weights / total.clamp(min=1e-300)
    return Expected(weights @ v, lse, weights @ v.abs())


def check(out: Tensor, lse: Tensor, want: Expected) -> None:
    """Within rounding of the reference.

    Half-precision kernels round the weights and the output once each, by at most eps / 2 of
    their size: together eps * sum(p * |v|). fp32 and fp64 round more often, each far below ATOL.
    """
    atol = ATOL[out.dtype]
    torch.testing.assert_close(lse.double(), want.lse, atol=atol, rtol=atol)
    error = (out.double() - want.out).abs()
    excess = error - torch.finfo(out.dtype).eps * want.spread - atol
    assert not error.isnan().any(), "NaN in the output"
    assert excess.max() <= 0, f"off by {error.max():.2e}"


@dataclass(frozen=True)
class Case:
    heads: tuple[int, int]
    rows: tuple[int, int]
    dims: tuple[int, int]
    causal: bool = False
    batch: int = 2

    def tensors(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
        (h, g), (sq, sk), (d, e) = self.heads, self.rows, self.dims
        shapes = ((h, sq, d), (g, sk, d), (g, sk, e))
        q, k, v = (torch.randn(self.batch, *shape).to(device, dtype) for shape in shapes)
        return q, k, v


def packed(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat([k, v], -1)
    return both[..., : k.shape[3]], both[..., k.shape[3] :]


def stacked(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.stack([k, v])
    return both[0], both[1]


def transposed(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)


def narrowed(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.cat([x, x, x], 2).narrow(2, x.shape[2], x.shape[2]) for x in tensors)


LAYOUTS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "packed-kv": lambda q, k, v: (q, *packed(k, v)),
    "stacked-kv": lambda q, k, v: (q, *stacked(k, v)),
    "transposed-kv": lambda q, k, v: (q, *transposed(k, v)),
    "transposed-qkv": lambda q, k, v: transposed(q, k, v),
    "packed-transposed-kv": lambda q, k, v: (
        q,
        *(x.transpose(1, 2) for x in packed(k.transpose(1, 2), v.transpose(1, 2))),
    ),
    "rows-of-longer": lambda q, k, v: narrowed(q, k, v),
}


def accumulator(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = FP64 if q.dtype == FP64 else FP32
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
    return out, torch.full(q.shape[:3], -INF, dtype=dtype, device=q.device)


def check_merged(out: Tensor, lse: Tensor, want: Expected, dtype: torch.dtype) -> None:
    """As `check`, with the block results' rounding to `dtype` once more in what was merged."""
    atol = ATOL[dtype]
    torch.testing.assert_close(lse.double(), want.lse, atol=atol, rtol=atol)
    # Block errors are averaged with weights that sum to 1; their |v| averages to `spread`.
    error = (out.double() - want.out).abs()
    assert (error <= torch.finfo(dtype).eps * want.spread + atol).all(), f"off by {error.max():.2e}"
