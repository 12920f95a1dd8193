"""Rows through the matrices of their experts, and on their way to them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ringcompile.ops.kernels import grouped

# Rows for which a GPU takes as long to multiply a matrix as to read it, or longer.
_FEW_ROWS = 128
# To copy a matrix and multiply the copy takes as long as reading so many.
_A_COPY = 3


def expert_linear(
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    on_device: bool = False,
) -> Tensor:
    """Each row through the matrix of its own expert.

    Args:
        x: [..., I].
        expert: [...], the index of each row's expert; a row whose index is not below E has no
            expert and gives 0.
        weight: [E,O,I], or [E,I,O] if transposed.
        bias: [E,O].
        transposed: whether the matrices are stored as input by output.
        on_device: whether few rows, as in decoding, are multiplied without asking the device.

    Returns:
        [..., O], in x's dtype.
    """
    matrices = weight.mT if transposed else weight
    rows, chosen = x.reshape(-1, x.shape[-1]), expert.reshape(-1)
    few = on_device and expert.numel() <= _FEW_ROWS and not grouped.takes_torch(rows, matrices)
    product = _batched if few else _sorted
    return product(rows, chosen, matrices, bias).view(*x.shape[:-1], matrices.shape[1])


def sort_rows(expert: Tensor, *, num_experts: int) -> list[Tensor]:
    """Rows in the order of their experts; those without an expert come last.

    Args:
        expert: [...], the index of each row's expert; one that is not below `num_experts` is none.
        num_experts: how many there are.

    Returns:
        the rows' numbers in that order, int64 [rows]; the place of each row in it, int64 [rows];
        the place behind each expert's last row, int32 [num_experts].
    """
    group = expert.reshape(-1).long().clamp(max=num_experts)  # the last: no expert
    order = group.argsort(stable=True)
    numbers = torch.arange(len(order), device=order.device)
    place = torch.empty_like(order).scatter_(0, order, numbers)
    # `bincount` would ask the device for its largest index.
    counts = group.new_zeros(num_experts + 1).scatter_add_(0, group, torch.ones_like(group))
    return [order, place, counts[:num_experts].cumsum(0).to(torch.int32)]


def grouped_linear(
    x: Tensor,
    ends: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Rows that are sorted by expert, each through the matrix of its own.

    Args:
        x: [N,...,I], all dims but the first and the last of size 1.
        ends: int32 [E], the row behind each expert's last one; of rows behind the last end nothing
            is computed, and what the result has there is of no use.
        weight: [E,O,I], or [E,I,O] if transposed.
        bias: [E,O].
        transposed: whether the matrices are stored as input by output.

    Returns:
        [N,...,O], in x's dtype.
    """
    matrices = weight.mT if transposed else weight
    rows = x.reshape(-1, x.shape[-1])
    out = grouped.in_one_launch(rows, ends, matrices)
    if out is None:
        out = _one_by_one(rows, ends, matrices, bias)
    elif bias is not None:
        number = torch.arange(len(rows), device=rows.device, dtype=torch.int32)
        out += bias[torch.searchsorted(ends, number, right=True).clamp_(max=len(matrices) - 1)]
    return out.view(*x.shape[:-1], matrices.shape[1])


def _one_by_one(rows: Tensor, ends: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """One product an expert that has rows. The host has to know which: on a GPU it waits."""
    out = rows.new_empty(len(rows), matrices.shape[1])
    start = 0
    for i, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = functional.linear(
                rows[start:end], matrices[i], None if bias is None else bias[i]
            )
        start = end
    out[start:] = 0.0
    return out


def _sorted(rows: Tensor, chosen: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """All rows of an expert side by side, then each where it was."""
    order, place, ends = sort_rows(chosen, num_experts=len(matrices))
    product = grouped_linear(rows[order], ends, matrices, bias)
    # Rows behind the last end were not written.
    return product[place].masked_fill_((chosen >= len(matrices)).unsqueeze(1), 0.0)


def _batched(rows: Tensor, chosen: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """All rows at once: by copies of their experts' matrices, or by every expert's."""
    num_experts, group = len(matrices), chosen.long()
    index = group.clamp(max=num_experts - 1)
    if _A_COPY * len(rows) < num_experts:
        out = torch.bmm(matrices.index_select(0, index), rows.unsqueeze(2)).squeeze(2)
    else:
        every = torch.matmul(rows, matrices.mT)  # [experts, rows, O]
        out = every.gather(0, index.view(1, -1, 1).expand(1, *every.shape[1:])).squeeze(0)
    if bias is not None:
        out = out + bias.index_select(0, index)
    return out.masked_fill((group >= num_experts).unsqueeze(1), 0.0)


def route(expert: Tensor, *, each: int, ways: int) -> list[Tensor]:
    """Rows in the order of the ranks that have their experts.

    Args:
        expert: [...], the index of each row's expert; one that is no expert goes to the last rank.
        each: experts of a rank.
        ways: ranks.

    Returns:
        the rows' numbers in that order, [rows]; how many go to each rank, [ways].
    """
    owner = (expert.reshape(-1) // each).clamp(max=ways - 1)
    return [owner.argsort(stable=True), torch.bincount(owner, minlength=ways)]
