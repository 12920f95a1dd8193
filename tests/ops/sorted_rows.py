"""The checks of the kernel that multiplies rows which are sorted by expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ringcompile.ops.kernels import grouped


def _check(
    provider: str, device: str, *, ends: list[int], rows: int, sizes: tuple[int, int] = (40, 72),
    dtype: torch.dtype = torch.float32, transposed: bool = False,
) -> None:
    """Against one product an expert, in float64; rows without an expert give 0."""
    inner, columns = sizes
    x = torch.randn(rows, inner).to(dtype)
    shape = (len(ends), inner, columns) if transposed else (len(ends), columns, inner)
    weight = torch.randn(shape).to(dtype)
    matrices = weight.mT if transposed else weight
    moved = (x.to(device), torch.tensor(ends, dtype=torch.int32, device=device))
    assert grouped.takes_ours(moved[0])
    grouped_torch, grouped.takes_torch = grouped.takes_torch, lambda *_: False
    try:
        found = grouped.in_one_launch(*moved, matrices.to(device))
    finally:
        grouped.takes_torch = grouped_torch
    assert found is not None
    expected, start = torch.zeros(rows, columns, dtype=torch.float64), 0
    for number, end in enumerate(ends):
        expected[start:end] = x[start:end].double() @ matrices[number].double().T
        start = end
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.cpu().double(), expected, atol=64 * eps, rtol=8 * eps)


Check = Callable[[str, str], None]
CHECKS: dict[str, Check] = {
    "float32": partial(_check, ends=[3, 50, 90], rows=90),
    "float16": partial(_check, ends=[3, 50, 90], rows=90, dtype=torch.float16),
    "bfloat16": partial(_check, ends=[3, 50, 90], rows=90, dtype=torch.bfloat16),
    "transposed": partial(_check, ends=[3, 50, 90], rows=90, transposed=True),
    "experts-without-rows": partial(_check, ends=[0, 0, 33, 33, 64], rows=64),
    "rows-without-an-expert": partial(_check, ends=[5, 9], rows=101),
    "no-expert-has-rows": partial(_check, ends=[0, 0], rows=7),
    "whole-tiles": partial(_check, ends=[128, 128, 256], rows=256, sizes=(64, 128)),
    "one-row": partial(_check, ends=[0, 1, 1, 1], rows=1, sizes=(5, 3)),
    "wide": partial(_check, ends=[20, 70], rows=80, sizes=(130, 260)),
}
