"""Linear attention block by block, and token by token with what is kept, against a loop."""

from __future__ import annotations

import pytest
import torch

from ringcompile.ops.cached import KEPT_STATES, KEPT_TOKENS, running_linear_attention
from ringcompile.ops.linear_attention import linear_attention, linear_state
from tests.support import some_fast

HEADS, SIZE, FEATURES, EXACT = 3, 4, 5, 1e-12
Tensors = tuple[torch.Tensor, ...]


def drawn(size: int, dtype: torch.dtype = torch.float64) -> Tensors:
    """Of heads that forget little, much, and nearly all; here and there everything."""
    torch.manual_seed(size)
    q, k = (torch.randn(2, HEADS, size, SIZE, dtype=dtype) for _ in range(2))
    v = torch.randn(2, HEADS, size, FEATURES, dtype=dtype)
    decay = -torch.rand(2, HEADS, size, dtype=dtype) * torch.tensor([0.01, 1, 50])[:, None]
    decay[torch.rand(decay.shape) < 0.03] = -torch.inf
    return q, k, v, decay.to(dtype)


def by_loop(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor,
    state: torch.Tensor | None = None,
) -> Tensors:
    state = v.new_zeros(2, HEADS, SIZE, FEATURES) if state is None else state
    read = []
    for t in range(q.shape[2]):
        left = decay[:, :, t, None, None].exp()
        state = left * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        read.append((q[:, :, t, None, :] @ state).squeeze(2))
    return torch.stack(read, 2), state


@pytest.mark.parametrize(
    ("size", "begun"),
    some_fast((1, 2, 63, 64, 65, 1000, 64 * 64 + 1), (False, True),
              fast=lambda size, begun: size in (2, 64, 1000) or (size, begun) == (1, True)),
)
def test_it_is_the_loop(size: int, begun: bool) -> None:
    q, k, v, decay = drawn(size)
    state = torch.randn(2, HEADS, SIZE, FEATURES, dtype=v.dtype) if begun else None
    expected, last = by_loop(q, k, v, decay, state)
    found = linear_attention(q, k, v, decay, state)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    if not begun:
        torch.testing.assert_close(linear_state(k, v, decay), last, rtol=EXACT, atol=EXACT)


def test_what_is_far_away_is_not_lost_behind_what_forgets_a_lot() -> None:
    """Behind -1000, decays of -1e-4 count in full: a difference of sums would lose them."""
    q, k, v, decay = (x.float() for x in drawn(60))
    decay = torch.full_like(decay, -1e-4)
    decay[..., 0] = -1000
    expected, _ = by_loop(*(x.double() for x in (q, k, v, decay)))
    torch.testing.assert_close(linear_attention(q, k, v, decay).double(), expected, rtol=1e-5,
                               atol=2e-5)


def test_half_precision_is_computed_in_float32() -> None:
    q, k, v, decay = (x.to(torch.bfloat16) for x in drawn(300))
    expected = linear_attention(*(x.float() for x in (q, k, v, decay)))
    found = linear_attention(q, k, v, decay)
    assert found.dtype == torch.bfloat16
    assert found.equal(expected.to(torch.bfloat16))
    assert linear_state(k, v, decay).dtype == torch.float32


def test_token_by_token_from_what_is_kept() -> None:
    """Calls that end in, on and across blocks; back by up to 32 tokens; nothing is read unset."""
    q, k, v, decay = drawn(260)
    expected, _ = by_loop(q, k, v, decay)
    kept = [
        torch.full((2, HEADS, *shape), torch.nan, dtype=v.dtype)
        for shape in ((KEPT_TOKENS, SIZE), (KEPT_TOKENS, FEATURES), (KEPT_TOKENS,),
                      (KEPT_STATES, SIZE, FEATURES))
    ]
    length = 0
    for step in (1, 6, 1, 40, 2, 14, 1, 32, 1, -32, 5, 1, -6, 3, -3, 100, -32, 33, -1, 31, 1):
        if step > 0:
            now, places = slice(length, length + step), torch.arange(length, length + step)
            new = [x[:, :, now] for x in (q, k, v, decay)]
            found = running_linear_attention(*new, *kept, places)
            torch.testing.assert_close(found, expected[:, :, now], rtol=EXACT, atol=EXACT)
        length += step
    assert length == 198
