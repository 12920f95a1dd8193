"""All ranks of the paper's models on one device, in lock-step, against float64."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu import exact
from benchmarks.gpu.programs import compiled
from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import device, errors, on_gpu
from benchmarks.gpu.weights import DrawnWeights
from ringcompile.runtime.inprocess import run_lockstep

# A mixture may send a token elsewhere where two experts score alike; the error is then of order 1.
_ALLOWED = 5e-3


def run(report: Report, *, dry: bool, seconds: float) -> None:
    """The dense model, then the mixture, as long as there is time."""
    end = time.monotonic() + seconds
    ranks, tokens = (4, 64) if dry or not on_gpu() else (16, 16384)
    for model in ("dense-4l", "moe-4l"):
        if time.monotonic() < end - seconds / 4:
            _measure(report, f"{model}-tiny" if dry else model, f"ring={ranks}", tokens)


def _measure(report: Report, model: str, parallel: str, tokens: int) -> None:
    weights = DrawnWeights(model, device())
    made = compiled(model, parallel)
    torch.manual_seed(1)
    size, dtype = weights.config.hidden_size, made.program.inputs[0].type.dtype
    hidden = torch.randn(1, tokens, size, device=device()).to(dtype)
    started = time.monotonic()
    found = run_lockstep(made.ranks(), made.mesh, weights, (hidden,), device=device())
    _wait()
    taken = time.monotonic() - started
    peak = torch.cuda.max_memory_allocated() if on_gpu() else None
    outputs = found.outputs
    del weights, found
    if on_gpu():
        torch.cuda.empty_cache()
    want = exact.forward(DrawnWeights(model, device(), cached=False), hidden)
    report.add(model=model, parallel=parallel, tokens=tokens, seconds=taken,
               peak_gib=None if peak is None else peak / 2**30, **compared(outputs, want))


def compared(found: torch.Tensor, want: torch.Tensor) -> dict[str, Any]:
    """Errors of all tokens, and of those that took the same way through a mixture."""
    largest, rms = errors(found, want)
    off = (found.double() - want).abs().amax(-1) / want.abs().max()
    same = off <= _ALLOWED
    rest = errors(found[same], want[same]) if bool(same.any()) else (1.0, 1.0)
    return {"max_error": largest, "rms_error": rms,
            "tokens_off": int((~same).sum()), "max_of_rest": rest[0], "rms_of_rest": rest[1]}


def _wait() -> None:
    if on_gpu():
        torch.cuda.synchronize()
