"""Rows through the matrices of their experts, and on their way to them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_BYTES_PER_LOAD = 16
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
    if _groups_on_device(rows, matrices):
        product = _grouped
    else:
        product = _batched if on_device and expert.numel() <= _FEW_ROWS else _one_by_one
    return product(rows, chosen, matrices, bias).view(*x.shape[:-1], matrices.shape[1])


def _one_by_one(rows: Tensor, chosen: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """One product an expert that has rows. The host has to know which: on a GPU it waits."""
    out = rows.new_zeros(len(rows), matrices.shape[1])
    counts = torch.bincount(chosen, minlength=len(matrices)).tolist()
    by_expert = chosen.argsort().split(counts)[: len(matrices)]
    for i, taken in enumerate(by_expert):
        if len(taken):
            out[taken] = functional.linear(
                rows[taken], matrices[i], None if bias is None else bias[i]
            )
    return out


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


def _grouped(rows: Tensor, chosen: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """One launch for all experts, which finds each one's rows on the device."""
    num_experts = len(matrices)
    group = chosen.long().clamp(max=num_experts)  # the last: no expert
    order = group.argsort()
    counts = group.new_zeros(num_experts + 1).scatter_add_(0, group, torch.ones_like(group))
    ends = counts[:num_experts].cumsum(0).to(torch.int32)
    product = torch._grouped_mm(rows[order], matrices.mT, offs=ends)
    out = torch.empty_like(product).index_copy_(0, order, product)
    if bias is not None:
        out += bias[group.clamp(max=num_experts - 1)]
    # Rows behind the last end were not written.
    return out.masked_fill_((group == num_experts).unsqueeze(1), 0.0)


def _groups_on_device(rows: Tensor, matrices: Tensor) -> bool:
    """Whether torch has the grouped product as one kernel; elsewhere it asks the host, as we do."""
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or not len(rows):
        return False
    if torch.cuda.get_device_capability(rows.device)[0] not in (9, 10):
        return False
    sizes = (rows.shape[1], matrices.shape[1])
    return not any(size * rows.element_size() % _BYTES_PER_LOAD for size in sizes)


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
