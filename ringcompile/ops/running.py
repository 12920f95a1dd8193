"""Scans along a dim: what each is over a whole chunk, and how what came before goes into it.

A scan goes on from chunk to chunk by what the chunk comes to in all: one number for each of its
columns, and for a linear recurrence two, the product of its factors and its last state. The
operation is associative, so those of the chunks before it may be put together first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ringcompile.ir.calls import Call

aten = torch.ops.aten
# Entries of a recurrence that are computed side by side.
_BLOCK = 32


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


# Ops that go along a dim from its first entry, and may go on from chunk to chunk.
ALONG = frozenset({
    *SCANS, "ringcompile.recurrence.default", "ringcompile.linear_attention.default",
})


def is_scan(node: fx.Node) -> bool:
    """Whether a call goes along a dim from its first entry."""
    return str(node.target) in ALONG


def dim_along(node: fx.Node) -> int:
    """The dim that such a call goes along, of its operands and of its result."""
    return Call(node).get("dim", -2)


def recurrence(factor: torch.Tensor, term: torch.Tensor, *, dim: int) -> torch.Tensor:
    """y[t] = factor[t] * y[t - 1] + term[t] along a dim, with 0 before the first entry.

    Blocks of entries are computed side by side from 0; what each comes to is a recurrence again,
    over blocks, and gives what each starts from (Blelloch, "Prefix sums and their applications").

    Args:
        factor: [.., S, ..].
        term: of the same shape and dtype.
        dim: the dim with the entries.
    """
    size, dim = term.shape[dim], dim % term.dim()
    if size <= _BLOCK:
        return _side_by_side(factor, term, dim)[1]
    missing = [0, 0] * (term.dim() - dim - 1) + [0, -size % _BLOCK]
    factor, term = (
        F.pad(x, missing, value=fill).unflatten(dim, (-1, _BLOCK))
        for x, fill in ((factor, 1.0), (term, 0.0))
    )
    product, state = _side_by_side(factor, term, dim + 1)
    last = [x.select(dim + 1, -1) for x in (product, state)]
    after = recurrence(*last, dim=dim)
    before = F.pad(after, [0, 0] * (after.dim() - dim - 1) + [1, -1])
    return (state + product * before.unsqueeze(dim + 1)).flatten(dim, dim + 1).narrow(dim, 0, size)


def _side_by_side(
    factor: torch.Tensor, term: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The products of factors and the states up to each entry, by doubling what is looked back."""
    size, step = term.shape[dim], 1
    while step < size:
        rest = size - step
        head, tail = factor.narrow(dim, 0, rest), factor.narrow(dim, step, rest)
        sums = term.narrow(dim, step, rest) + tail * term.narrow(dim, 0, rest)
        term = torch.cat([term.narrow(dim, 0, step), sums], dim)
        factor = torch.cat([factor.narrow(dim, 0, step), head * tail], dim)
        step *= 2
    return factor, term
