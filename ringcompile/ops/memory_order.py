"""The order in memory of weights that few tokens are multiplied with, on CPUs.

A matmul with one row is as fast as its weight is read. BLAS libraries read a weight [out, in] row
by row, one dot product after another, which reaches the memory's bandwidth only where rows are
long; stored column by column, the same weight is read in long runs. `benchmarks/weight_order.py`
measures both. Matmuls of many rows are equally fast on both.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ringcompile.ir.calls import target_name
from ringcompile.ir.program import Program

# Halves are multiplied by other kernels, which want rows.
_DTYPES = (torch.float32, torch.float64)


def read_by_few(program: Program, placeholders: Iterable[str]) -> set[str]:
    """The placeholders whose weights a program with a cache multiplies its new tokens with."""
    wanted = set(placeholders)
    if not program.state:
        return set()
    return {
        node.name
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in wanted
        and any(target_name(user.target) == "aten.linear.default" and user.args[1] is node
                for user in node.users)
    }


def column_by_column(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] with the same entries, stored column by column if that is read faster."""
    rows, columns = weight.shape
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or rows < columns:
        return weight
    return weight.t().contiguous().t()
