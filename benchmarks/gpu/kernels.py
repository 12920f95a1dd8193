"""Block attention: TFLOP/s and errors of each provider, beside the best that torch has."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import device, errors, kernel_seconds, on_gpu
from ringcompile.errors import RingCompileError
from ringcompile.ops.kernels import attend, attend_merge, providers

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Shape:
    """A block of queries over a block of keys."""

    head_dim: int
    num_queries: int
    num_keys: int
    causal: bool = False
    num_heads: int = 16
    dtype: torch.dtype = torch.float16
    group_size: int = 1  # query heads of a KV head

    @property
    def flops(self) -> float:
        """Four for every visible pair and column; half of all pairs are, where it is causal."""
        pairs = self.num_queries * self.num_keys / (2 if self.causal else 1)
        return 4 * pairs * self.head_dim * self.num_heads

    def draw(self) -> Tensors:
        """Random q, k and v."""
        num_kv_heads = self.num_heads // self.group_size
        sizes = [(self.num_heads, self.num_queries), *[(num_kv_heads, self.num_keys)] * 2]
        return tuple(
            torch.randn(1, *size, self.head_dim, device=device(), dtype=self.dtype)
            for size in sizes
        )

    @property
    def scale(self) -> float:
        """As models have it."""
        return self.head_dim**-0.5

    def columns(self) -> dict[str, Any]:
        """For a row of the table."""
        mode = "causal" if self.causal else "full"
        return {"dtype": str(self.dtype).removeprefix("torch."), "head_dim": self.head_dim,
                "group": self.group_size, "queries": self.num_queries, "keys": self.num_keys,
                "mask": mode}


def shapes(dry: bool) -> list[Shape]:
    """The issue's shapes first."""
    if dry:
        return [Shape(512, 64, 96, num_heads=2), Shape(512, 64, 64, causal=True, num_heads=2),
                Shape(64, 1, 96, num_heads=4, group_size=2)]
    full = [Shape(512, 1024, keys) for keys in (1024, 2048, 4096, 8192, 16384)]
    causal = [Shape(512, rows, rows, causal=True) for rows in (1024, 2048, 4096)]
    half = [Shape(512, 1024, 4096, dtype=torch.bfloat16), Shape(320, 1024, 4096)]
    narrow = [Shape(dim, 2048, 2048, causal, 32 if dim == 128 else 16)
              for dim in (128, 256) for causal in (False, True)]
    decoding = [Shape(dim, queries, keys, num_heads=32, group_size=8, dtype=torch.bfloat16)
                for dim, queries, keys in ((128, 1, 8192), (128, 1, 131072), (128, 8, 8192),
                                           (512, 1, 8192))]
    return [*full, *causal, *half, *narrow, *decoding]


def run(report: Report, *, dry: bool, seconds: float) -> None:
    """Errors, then speeds, as long as there is time."""
    end = time.monotonic() + seconds
    names = _present(dry)
    for shape in shapes(dry):
        for name in names:
            if time.monotonic() > end:
                return
            _measure(report, shape, name, _attend(shape, name))
        if shape.head_dim == 512 and not shape.causal and shape.num_keys <= 4096:
            for name in names:
                _measure(report, shape, f"{name} +merge", _fold(shape, name))
    if on_gpu() and not dry:
        for shape in (Shape(512, 1024, 4096), Shape(512, 4096, 4096, causal=True)):
            if time.monotonic() < end - 25:
                _measure(report, shape, "flex_attention", _flex(shape))


def _present(dry: bool) -> list[str]:
    wanted = ("decode", "hopper", "triton", "ffpa", "cuda-flash", "cuda-cudnn", "cuda-efficient")
    return ["cpu-flash", "math"] if dry or not on_gpu() else [n for n in wanted if n in providers()]


def _measure(report: Report, shape: Shape, name: str, call: Callable[..., Any]) -> None:
    """One row; nothing where the provider refuses."""
    torch.manual_seed(0)
    # About 400 MB of inputs, so that none is still in the cache when its turn comes again.
    size = sum(x.nbytes for x in shape.draw())
    inputs = [shape.draw() for _ in range(max(1, min(6, math.ceil(4e8 / size)) if on_gpu() else 1))]
    try:
        out = call(*inputs[0])
        taken = kernel_seconds(call, inputs)
    except RingCompileError:
        return
    except Exception as error:  # torch's kernels fail in many ways, and the rest is worth having
        why = f"{type(error).__name__}: {error}"[:150]
        report.add(**shape.columns(), provider=name, failed=why)
        return
    largest, rms = _errors(shape, inputs[0], out)
    report.add(**shape.columns(), provider=name, microseconds=taken * 1e6,
               tflops=shape.flops / taken / 1e12, gigabytes_per_second=size / taken / 1e9,
               max_error=largest, rms_error=rms)


def _attend(shape: Shape, name: str) -> Callable[..., torch.Tensor]:
    return lambda q, k, v: attend(
        q, k, v, scale=shape.scale, causal=shape.causal, provider=name
    )[0]


def _fold(shape: Shape, name: str) -> Callable[..., torch.Tensor]:
    """A block folded into an accumulator that has seen nothing: the same output."""
    size = (1, shape.num_heads, shape.num_queries)
    out = torch.zeros(*size, shape.head_dim, device=device())
    lse = torch.full(size, -math.inf, device=device())

    def fold(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attend_merge(out, lse, q, k, v, scale=shape.scale, provider=name)
        measured = out.is_cuda and torch.cuda.is_current_stream_capturing()
        return out if measured else out.clone()

    return fold


def _flex(shape: Shape) -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled, with tiles small enough for its accumulators."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if shape.causal:
        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, shape.num_queries, shape.num_keys, device="cuda"
        )
    options = {"BLOCK_M": 64, "BLOCK_N": 32, "num_stages": 1, "num_warps": 8}
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(
        q, k, v, block_mask=mask, scale=shape.scale, kernel_options=options
    )


def _errors(shape: Shape, inputs: Tensors, out: torch.Tensor) -> tuple[float, float]:
    """Of the first two heads, against float64."""
    parts = [errors(out[:, h], want) for h, want in enumerate(_references(shape, inputs))]
    return max(part[0] for part in parts), max(part[1] for part in parts)


def _references(shape: Shape, inputs: Tensors) -> Iterator[torch.Tensor]:
    for head in range(2):
        q, k, v = (x[:, head // (shape.group_size if n else 1)].double()
                   for n, x in enumerate(inputs))
        scores = q @ k.mT * shape.scale
        if shape.causal:
            visible = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril()
            scores.masked_fill_(~visible, -math.inf)
        yield scores.softmax(-1) @ v
