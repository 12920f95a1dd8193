"""Rows through the matrices of their experts, and on their way to them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def expert_linear(
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Each row through the matrix of its own expert: one product an expert that has rows.

    Args:
        x: [..., I].
        expert: [...], the index of each row's expert; a row whose index is not below E has no
            expert and gives 0.
        weight: [E,O,I], or [E,I,O] if transposed.
        bias: [E,O].
        transposed: whether the matrices are stored as input by output.

    Returns:
        [..., O], in x's dtype.
    """
    matrices = weight.mT if transposed else weight
    rows, chosen = x.reshape(-1, x.shape[-1]), expert.reshape(-1)
    out = rows.new_zeros(len(rows), matrices.shape[1])
    counts = torch.bincount(chosen, minlength=len(matrices)).tolist()
    by_expert = chosen.argsort().split(counts)[: len(matrices)]
    for i, taken in enumerate(by_expert):
        if len(taken):
            out[taken] = functional.linear(
                rows[taken], matrices[i], None if bias is None else bias[i]
            )
    return out.view(*x.shape[:-1], out.shape[1])


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
