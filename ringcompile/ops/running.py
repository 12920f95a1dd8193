"""Scans along a dim: what each is over a whole chunk, and how what came before goes into it.

A scan goes on from chunk to chunk by one number for each: what the chunk comes to in all. The
operation is associative, so those of the chunks before it may be put together first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Running:
    """One kind of scan.

    Attributes:
        name: what it gives, in arguments and dumps.
        scan: the operator, which takes a tensor and a dim.
        total: the operator for all entries along a dim.
        one_dim: whether that operator takes one dim, not a list of them.
        typed: whether both take a dtype for the result.
        combine: the operator that puts two results together.
        identity: what changes nothing when it is put together with anything.
    """

    name: str
    scan: Any
    total: Any
    one_dim: bool
    typed: bool
    combine: Any
    identity: float

    def over(self, dim: int) -> tuple[Any, bool]:
        """The arguments of `total` behind the tensor: the dim, which stays with size 1."""
        return dim if self.one_dim else [dim], True

    def dtype(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """The keyword argument for the dtype of a result, where there is one."""
        return {"dtype": dtype} if self.typed else {}


_ALL = (
    Running("sum", aten.cumsum.default, aten.sum.dim_IntList, False, True, aten.add.Tensor, 0),
    Running("product", aten.cumprod.default, aten.prod.dim_int, True, True, aten.mul.Tensor, 1),
    Running("logsumexp", aten.logcumsumexp.default, aten.logsumexp.default, False, False,
            aten.logaddexp.default, -math.inf),
)
SCANS = {str(kind.scan): kind for kind in _ALL}
BY_NAME = {kind.name: kind for kind in _ALL}


def is_scan(node: fx.Node) -> bool:
    """Whether a call is one of these scans."""
    return str(node.target) in SCANS
