"""The step of one token, op by op and as a CUDA graph; its attention, by our kernels and SDPA."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gpu.programs import captured
from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import device, errors, event_seconds, kernel_seconds, on_gpu
from benchmarks.gpu.weights import DrawnWeights
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.ops.blocks import Band
from ringcompile.ops.kernels import attend, providers
from ringcompile.ops.slots import bucket_of
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.alone import Alone
from ringcompile.runtime.drive import drive
from ringcompile.runtime.runner import OpenWeights, Runner, Settings, computed
from ringcompile.runtime.tasks import CARRIED, Extend, of_kind

_STEPS = 64  # that a cache has room for behind its context
_WARM_UPS = 3  # one is watched, one recorded


def run(report: Report, *, dry: bool, seconds: float) -> None:
    """Attention first, then whole steps of one rank, as long as there is time."""
    end = time.monotonic() + seconds
    small = dry or not on_gpu()
    for shape in _shapes(small):
        if time.monotonic() < end:
            _attention(report, shape)
    model = "dense-4l-tiny" if small else "dense-4l"
    plans = ("ring=1", "ring=2") if small else ("ring=1", "tp=8", "ring=8")
    for context in (40,) if small else (8192, 65536):
        for parallel in plans:
            if time.monotonic() > end - (0 if small else 20):
                return
            _step(report, model, parallel, context)
            if on_gpu():
                torch.cuda.empty_cache()


# -- attention -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    """One query over the keys of a bucket, of which some are in use."""

    used: int
    slots: int
    head_dim: int = 128
    num_heads: int = 32
    num_kv_heads: int = 4
    dtype: torch.dtype = torch.bfloat16

    @property
    def read(self) -> int:
        """The slots of the bucket."""
        return bucket_of(self.used, self.slots)

    def draw(self) -> list[torch.Tensor]:
        """Random q, k and v, and a mask that hides slots that are not in use."""
        sizes = [(self.num_heads, 1), *[(self.num_kv_heads, self.read)] * 2]
        q, k, v = (torch.randn(1, *size, self.head_dim, device=device(), dtype=self.dtype)
                   for size in sizes)
        places = torch.arange(self.read, device=device())
        mask = Band(0).mask(places.new_tensor([self.used - 1]), places)
        return [q, k, v, mask]


def _shapes(small: bool) -> list[_Shape]:
    if small:
        return [_Shape(300, 512, 16, 4, 2, torch.float32)]
    return [_Shape(used, 1 << 18) for used in (1000, 8000, 32000, 130000)]


def _attention(report: Report, shape: _Shape) -> None:
    """A row for each of our kernels, with a mask and on the slots in use alone, and for torch's."""
    torch.manual_seed(0)
    inputs = [tuple(shape.draw()) for _ in range(4 if on_gpu() else 1)]
    scale, used = shape.head_dim**-0.5, shape.used
    q, k, v, mask = inputs[0]
    want = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask, scale=scale, enable_gqa=True
    )

    def ours(name: str, masked: bool) -> Any:
        def call(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
            if not masked:
                k, v, mask = k[:, :, :used], v[:, :, :used], None
            return attend(q, k, v, scale=scale, mask=mask, provider=name)[0]

        return call

    def theirs(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)

    names = ("decode", "cuda-flash", "cuda-efficient") if on_gpu() else ("cpu-flash", "math")
    ways = {f"{name}{' +mask' * masked}": ours(name, masked)
            for name in names if name in providers() for masked in (False, True)}
    for name, call in {**ways, "sdpa +mask": theirs}.items():
        try:
            largest, _ = errors(call(*inputs[0]), want)
            taken = kernel_seconds(call, inputs)
        except RingCompileError:  # it does not take them
            continue
        num_bytes = sum(x.nbytes for x in (k, v)) * used // shape.read
        report.add(keys=used, read=shape.read, group=shape.num_heads // shape.num_kv_heads,
                   kernel=name, microseconds=taken * 1e6,
                   gigabytes_per_second=num_bytes / taken / 1e9, max_error=largest)


# -- whole steps -----------------------------------------------------------------------------------


@lru_cache
def _compiled(model: str, parallel: str, capacity: int) -> ParallelProgram:
    return transform(captured(model), parallel, cache=capacity)


@torch.no_grad()
def _step(report: Report, model: str, parallel: str, context: int) -> None:
    """What the first rank takes for a token, alone: what others would send is noise."""
    made = of_kind(_compiled(model, parallel, context + _STEPS), CARRIED)
    source = DrawnWeights(model, device())
    weights = OpenWeights(source, device())
    hidden = torch.randn(1, context, source.config.hidden_size)
    hidden = hidden.to(made.rank(0).inputs[0].type.dtype)
    row = {"model": model, "parallel": parallel, "context": context}
    taken = {}
    for name, how in (("eager", "off"), ("graph", "auto" if on_gpu() else "rehearse")):
        runner = Runner(lambda kind: made.rank(0), weights, Settings(cuda_graphs=how))
        token = _Token(runner, Alone(made.mesh, device()), hidden)
        taken[name] = event_seconds(token.step)
        row[f"{name}_ms"] = taken[name] * 1e3
        told = "; ".join(runner.notes())
        del runner, token
    report.add(**row, graph_of_eager=taken["graph"] / taken["eager"], notes=told)


class _Token:
    """The next token of a sequence, again and again.

    Args:
        runner: a rank's.
        alone: answers what it asks of others.
        hidden: what the context is made of; its keys are not computed, and are zeros.
    """

    def __init__(self, runner: Runner, alone: Alone, hidden: torch.Tensor) -> None:
        self.runner, self.alone, self.hidden = runner, alone, hidden
        self.name = runner.open(CARRIED).program.inputs[0].name
        self.runner.prepare(Extend({self.name: hidden}, hidden.shape[1]))
        for _ in range(_WARM_UPS):
            self.step()

    def step(self) -> None:
        """One token."""
        task = Extend({self.name: self.hidden[:, :1]}, 1)
        drive(computed(self.runner.prepare(task)), self.alone.answer)
