"""The linear recurrence, block by block, against a loop over its entries."""

from __future__ import annotations

import pytest
import torch

from ringcompile.ops.running import recurrence
from tests.support import some_fast


def by_loop(factor: torch.Tensor, term: torch.Tensor, dim: int) -> torch.Tensor:
    states = [torch.zeros_like(term.select(dim, 0))]
    for a, b in zip(factor.unbind(dim), term.unbind(dim), strict=True):
        states.append(a * states[-1] + b)
    return torch.stack(states[1:], dim)


@pytest.mark.parametrize(
    ("size", "dim"),
    some_fast((1, 2, 31, 32, 33, 64, 1000, 1025), (0, 1, -1), fast=lambda size, dim: (
        dim == 1 or size == 33
    )),
)
def test_it_is_the_loop(size: int, dim: int) -> None:
    torch.manual_seed(size)
    shape = [3, 2, 4]
    shape[dim] = size
    # Factors of all sizes, 0 among them: what came before is forgotten, and cannot be undone.
    factor = torch.randn(shape, dtype=torch.float64).clamp(-1.1, 1.1)
    factor = factor * (torch.rand(shape) > 0.1)
    term = torch.randn(shape, dtype=torch.float64)
    found, expected = recurrence(factor, term, dim=dim), by_loop(factor, term, dim % 3)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_a_nan_spreads_forwards_only() -> None:
    factor, term = torch.full((1, 70), 0.5), torch.ones(1, 70)
    term[0, 40] = torch.nan
    found = recurrence(factor, term, dim=1)
    assert found.isnan().equal(torch.arange(70)[None] >= 40)
