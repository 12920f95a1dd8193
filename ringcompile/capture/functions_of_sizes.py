"""Functions of torch that ask sizes for numbers while they are exported, by others that do not.

Each takes the original, and gives one for its place that computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F


def _linspace_of(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def linspace(start: Any, end: Any, steps: Any, **settings: Any) -> torch.Tensor:
        if not isinstance(steps, torch.SymInt) or isinstance(start, torch.Tensor) or isinstance(
            end, torch.Tensor
        ) or settings.get("out") is not None:
            return original(start, end, steps, **settings)
        dtype = settings.pop("dtype", None) or torch.get_default_dtype()
        settings = {key: value for key, value in settings.items() if value is not None}
        count: Any = steps
        index: Any = torch.arange(count, dtype=dtype, **settings)
        step = (end - start) / torch.sym_max(steps - 1, 1)
        # As torch does it: counted from the nearer end, so that both ends are exact.
        below, above = start + step * index, end - step * (count - 1 - index)
        return torch.where(index < torch.sym_max(steps // 2, 1), below, above)

    return linspace


def _max_pool1d_of(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """As a pool over two dims, the first of size 1; torch.export takes the pool over one apart."""

    def max_pool1d(
        x: torch.Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> torch.Tensor:
        size, step, pad, spread = (
            value[0] if isinstance(value, list | tuple) and value else value
            for value in (kernel_size, stride, padding, dilation)
        )
        step = size if step in (None, (), []) else step
        return torch.max_pool2d(
            x.unsqueeze(-2), (1, size), (1, step), (0, pad), (1, spread), ceil_mode
        ).squeeze(-2)

    return max_pool1d


def _embedding_bag_of(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Bags that are the rows of the indices: rows of the table, and their sum, mean or largest."""

    def embedding_bag(
        indices: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None = None,
        max_norm: float | None = None, norm_type: float = 2, scale_grad_by_freq: bool = False,
        mode: str = "mean", sparse: bool = False,
        per_sample_weights: torch.Tensor | None = None, include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> torch.Tensor:
        plain = offsets is None and max_norm is None and padding_idx is None
        if not plain or indices.dim() != 2 or mode not in ("sum", "mean", "max"):
            return original(
                indices, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse,
                per_sample_weights, include_last_offset, padding_idx,
            )
        rows = F.embedding(indices, weight)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.unsqueeze(-1)
        return rows.amax(1) if mode == "max" else getattr(rows, mode)(1)

    return embedding_bag


# Where each stands, its name, and what makes the function for its place of the original.
FUNCTIONS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (torch, "linspace", _linspace_of),
    (torch, "max_pool1d", _max_pool1d_of),
    (F, "embedding_bag", _embedding_bag_of),
)
