"""Experts whose result depends on the number of a token's sequence, beside dp and pp."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from tests.silent.small import WIDTH, Model, ids, matches
from tests.support import compiled

EXPERTS = 5


def by_row(m: nn.Module, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Tokens sorted by their expert, each weighed by the number of its sequence."""
    tokens, row = x.reshape(-1, WIDTH), torch.arange(x.shape[0] * x.shape[1]) // x.shape[1]
    weight, expert = m.router(tokens).softmax(-1).max(-1)
    order = expert.argsort(stable=True)
    out = torch.bmm(F.silu(tokens[order][:, None]), m.experts[expert[order]])[:, 0]
    out = out * (weight * (row + 1))[order][:, None]
    return torch.zeros_like(tokens).index_add(0, order, out).view_as(x)


def model() -> Model:
    return Model(
        by_row, router=nn.Linear(WIDTH, EXPERTS),
        experts=nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH)),
    )


@pytest.mark.parametrize("spec", ["ring=2", "pp=2,ring=2"])
def test_each_row_has_its_own_number(spec: str) -> None:
    """A pipeline takes the batch as one microbatch: row 2 is not row 0 of its own part."""
    matches(model(), spec, inputs=lambda n: (ids(n, 4),), lengths=(17,))


def test_with_dp_it_is_refused() -> None:
    with pytest.raises(rc.RingCompileError, match="this mixes the sequences of a batch"):
        compiled(model(), (ids(24),), "dp=2,ring=2")
