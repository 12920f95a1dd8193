"""A call at known sizes, and the kernels that most ops are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ringcompile.cost.kernels import Kernel
from ringcompile.cost.values import Value, Values, distinct_bytes
from ringcompile.ir.calls import Call


class Work:
    """A call at known sizes.

    Attributes:
        node: the call.
        call: its arguments by name.
        out: its result.
    """

    def __init__(self, values: Values, node: fx.Node) -> None:
        self.values, self.node, self.call = values, node, Call(node)
        self.out = values.of[node]

    def __getitem__(self, name: str) -> Any:
        """An argument, nodes in it as values."""
        value = self.call[name]
        if isinstance(value, list | tuple):
            return [self.values.argument(entry) for entry in value]
        return self.values.argument(value)

    @property
    def operands(self) -> list[torch.Tensor]:
        """All tensors it reads, one entry a node."""
        return [t for node in self.node.all_input_nodes for t in tensors(self.values.of[node])]

    @property
    def results(self) -> tuple[torch.Tensor, ...]:
        """The tensors it returns."""
        return tensors(self.out)


def tensors(value: Value) -> tuple[torch.Tensor, ...]:
    """A value's tensors."""
    return value if isinstance(value, tuple) else (value,)


def kernel(kind: str, read: list[torch.Tensor], written: list[torch.Tensor]) -> Kernel:
    """One that goes over these tensors once."""
    num_bytes = sum(map(distinct_bytes, read)) + sum(map(distinct_bytes, written))
    return Kernel(kind, (written or read)[0].dtype, num_bytes)


def product(batch: int, rows: int, inner: int, columns: int, dtype: torch.dtype) -> Kernel:
    """`batch` products of rows x inner by inner x columns."""
    moved = batch * (rows * inner + inner * columns + rows * columns) * dtype.itemsize
    flops = 2 * batch * rows * inner * columns
    return Kernel("matmul", dtype, moved, flops, rows, inner, columns, batch)
