"""What each kernel provider is said to fit, and the shapes that its contract is tested on."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.ops.contract import (
    BF16,
    FP16,
    FP32,
    FP64,
    Case,
)

CASES = {
    "heads": Case((4, 4), (33, 47), (64, 64)),
    "grouped": Case((6, 2), (33, 47), (64, 64)),
    "one-kv-head": Case((4, 1), (33, 47), (64, 64)),
    "one-head": Case((1, 1), (33, 47), (64, 64)),
    "head-dim-8": Case((4, 2), (17, 31), (8, 8)),
    "head-dim-512": Case((4, 2), (33, 47), (512, 512)),
    "narrow-value": Case((4, 2), (33, 47), (64, 32)),
    "wide-value": Case((4, 2), (33, 47), (32, 64)),
    "one-key": Case((4, 2), (33, 1), (64, 64)),
    "one-query": Case((4, 2), (1, 47), (64, 64)),
    "one-of-each-causal": Case((4, 2), (1, 1), (64, 64), causal=True),
    "causal": Case((4, 4), (64, 64), (64, 64), causal=True),
    "causal-grouped-odd": Case((6, 2), (65, 65), (64, 64), causal=True),
    "causal-head-dim-512": Case((4, 2), (65, 65), (512, 512), causal=True),
    "causal-narrow-value": Case((4, 2), (65, 65), (64, 32), causal=True),
    # Longer than the kernels' own blocks (CPU flash: 512 keys), so that they merge inside.
    "long": Case((4, 2), (300, 1100), (64, 64), batch=1),
    "causal-long": Case((4, 2), (1025, 1025), (64, 64), causal=True, batch=1),
}


@dataclass(frozen=True)
class Kernel:
    """What a provider is said to fit; the contract is tested on all of it."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    masks: bool = True
    two_head_dims: bool = True
    head_dim: int = 512
    min_rows: int = 1

    def fits(self, case: Case) -> bool:
        return (
            case.dims[0] <= self.head_dim
            and min(case.rows) >= self.min_rows
            and (self.two_head_dims or len(set(case.dims)) == 1)
        )


KERNELS = {
    "math": Kernel("cpu", (FP64, FP32, FP16, BF16)),
    "cpu-flash": Kernel("cpu", (FP64, FP32, FP16, BF16), two_head_dims=False),
    "cuda-flash": Kernel("cuda", (FP16, BF16), masks=False, two_head_dims=False, head_dim=256),
    "cuda-cudnn": Kernel(
        "cuda", (FP16, BF16), masks=False, two_head_dims=False, head_dim=128, min_rows=2
    ),
    "cuda-efficient": Kernel("cuda", (FP32, FP16, BF16)),
}


def kernel_params(select: Callable[[Kernel], bool] = lambda kernel: True) -> list[object]:
    return [
        pytest.param(
            name,
            dtype,
            id=f"{name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.gpu] if kernel.device == "cuda" else [],
        )
        for name, kernel in KERNELS.items()
        for dtype in kernel.dtypes
        if select(kernel)
    ]


every_kernel = pytest.mark.parametrize(("provider", "dtype"), kernel_params())
every_kernel_of_one_row = pytest.mark.parametrize(
    ("provider", "dtype"), kernel_params(lambda kernel: kernel.min_rows == 1)
)
every_masking_kernel = pytest.mark.parametrize(
    ("provider", "dtype"), kernel_params(lambda kernel: kernel.masks)
)


def zeros(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)
