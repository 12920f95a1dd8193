"""What calibration needs of the device: rates by shape, copies, and the cost of a launch."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import device, event_seconds, kernel_seconds, on_gpu
from ringcompile.ops.kernels import attend

# Rows of a rank's share, and the matrices of the paper's models.
_ROWS = (64, 256, 1024, 4096, 16384)
_MATRICES = ((8192, 8192), (8192, 32768), (32768, 8192), (8192, 1024), (1024, 8192))


def matmul_rate(rows: int, inner: int, columns: int, batch: int = 1) -> float:
    """FLOP/s of [rows, inner] times [inner, columns], half precision (float32 on a CPU)."""
    dtype = torch.float16 if on_gpu() else torch.float32
    sets = 3 if on_gpu() else 1
    inputs = [
        (torch.randn(batch, rows, inner, device=device()).to(dtype),
         torch.randn(batch, columns, inner, device=device()).to(dtype).mT)
        for _ in range(sets)
    ]
    taken = kernel_seconds(torch.bmm if batch > 1 else _product, inputs)
    return 2.0 * batch * rows * inner * columns / taken


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[0] @ b[0]


def attention_rate(head_dim: int, rows: int, keys: int, *, causal: bool, heads: int = 16) -> float:
    """FLOP/s of the kernel that `attend` chooses; visible pairs only."""
    dtype = torch.float16 if on_gpu() else torch.float32
    q, k, v = (
        torch.randn(1, heads, n, head_dim, device=device()).to(dtype) for n in (rows, keys, keys)
    )
    taken = kernel_seconds(
        lambda: attend(q, k, v, scale=head_dim**-0.5, causal=causal)[0], [()]
    )
    return 4.0 * heads * rows * keys * head_dim / (2 if causal else 1) / taken


def copy_rate(num_bytes: int) -> float:
    """Bytes/s, read and written together."""
    source = torch.randn(num_bytes // 4, device=device())
    target = torch.empty_like(source)
    copies = max(1, 2**28 // num_bytes)  # enough for launches not to count

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    return 2.0 * source.nbytes * copies / event_seconds(copy)


def launch_seconds(*, graphed: bool) -> float:
    """What a kernel that does nothing to speak of takes, launched by torch or from a graph."""
    x = torch.zeros(8, device=device())
    if graphed:
        return kernel_seconds(lambda: x.add_(1), [()], per_replay=200)
    for _ in range(20):
        x.add_(1)
    _wait()
    started = time.perf_counter()
    for _ in range(500):
        x.add_(1)
    _wait()
    return (time.perf_counter() - started) / 500


def _wait() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def run(report: Report, *, dry: bool, seconds: float) -> None:
    """All of them, as long as there is time."""
    end = time.monotonic() + seconds
    small = dry or not on_gpu()
    for graphed in (False, True):
        report.add(launch="graph" if graphed else "eager",
                   microseconds=launch_seconds(graphed=graphed) * 1e6)
    for size in (2**16,) if small else (2**20, 2**24, 2**28, 2**32):
        report.add(copy_bytes=size, tb_per_second=copy_rate(size) / 1e12)
    for rows in (16,) if small else _ROWS:
        for inner, columns in ((32, 32),) if small else _MATRICES:
            report.add(op="linear", batch=1, rows=rows, inner=inner, columns=columns,
                       tflops=matmul_rate(rows, inner, columns) / 1e12)
    for rows in () if small else (40, 320, 1280):
        report.add(op="bmm", batch=8, rows=rows, inner=8192, columns=32768,
                   tflops=matmul_rate(rows, 8192, 32768, 8) / 1e12)
    shapes = ((64, 16, 16),) if small else (
        (512, 64, 64), (512, 512, 512), (512, 512, 1024), (512, 1024, 1024), (512, 1024, 2048),
        (512, 1024, 16384), (256, 1024, 1024), (128, 1024, 1024), (128, 4096, 4096),
    )
    for head_dim, rows, keys in shapes:
        for causal in (False, True) if rows == keys else (False,):
            if time.monotonic() > end:
                return
            report.add(op="attention", head_dim=head_dim, rows=rows, keys=keys, causal=causal,
                       tflops=attention_rate(head_dim, rows, keys, causal=causal) / 1e12)
