"""Linear attention block by block, and token by token with what is kept, against a loop."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ringcompile.ops.cached import KEPT_STATES, KEPT_TOKENS, running_linear_attention
from ringcompile.ops.linear_attention import chained_states, linear_attention, linear_state
from tests.support import some_fast

HEADS, SIZE, FEATURES, EXACT = 3, 4, 5, 1e-12


# Whether each feature has a decay, and whether it is by the delta rule.
KINDS = [(False, False), (True, False), (False, True), (True, True)]


def drawn(size: int, features: bool = False, delta: bool = False) -> dict[str, torch.Tensor]:
    """Of heads that forget little, much, and nearly all; here and there everything."""
    torch.manual_seed(size)
    q, k = (torch.randn(2, HEADS, size, SIZE, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, HEADS, size, FEATURES, dtype=torch.float64)
    rates = torch.tensor([0.01, 1, 50], dtype=torch.float64)[:, None, None]
    decay = -torch.rand(2, HEADS, size, SIZE if features else 1, dtype=torch.float64) * rates
    decay[torch.rand(decay.shape) < 0.03] = -torch.inf
    found = {"q": q, "k": k, "v": v, "decay": decay if features else decay.squeeze(-1)}
    if delta:
        found |= {"k": F.normalize(k, dim=-1), "beta": 2 * torch.rand(2, HEADS, size).double()}
    return found


def by_loop(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor,
    beta: torch.Tensor | None = None, state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    state = v.new_zeros(2, HEADS, SIZE, FEATURES) if state is None else state
    left = (decay if decay.dim() == 4 else decay[..., None]).exp()
    read = []
    for t in range(q.shape[2]):
        state, key, taken = left[:, :, t, :, None] * state, k[:, :, t], v[:, :, t]
        if beta is not None:
            taken = beta[:, :, t, None] * (taken - (key[..., None, :] @ state).squeeze(2))
        state = state + key[..., None] * taken[..., None, :]
        read.append((q[:, :, t, None, :] @ state).squeeze(2))
    return torch.stack(read, 2), state


@pytest.mark.parametrize(
    ("size", "kind"),
    some_fast((1, 2, 16, 17, 63, 64, 65, 1000, 64 * 64 + 1), KINDS,
              fast=lambda size, kind: size in (1, 17, 64) or (size, kind) == (1000, KINDS[0])),
)
def test_it_is_the_loop(size: int, kind: tuple[bool, bool]) -> None:
    given = drawn(size, *kind)
    begun = torch.randn(2, HEADS, SIZE, FEATURES, dtype=torch.float64)
    for state in (None, begun):
        expected, last = by_loop(**given, state=state)
        found = linear_attention(**given, state=state)
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
        total = linear_state(**{name: x for name, x in given.items() if name != "q"})
        if "beta" in given:
            total = total[..., SIZE:] + total[..., :SIZE] @ (0 * begun if state is None else begun)
        if "beta" in given or state is None:
            torch.testing.assert_close(total, last, rtol=EXACT, atol=EXACT)


def test_states_of_runs_are_chained() -> None:
    given = drawn(40, delta=True)
    runs = [{name: x[:, :, part] for name, x in given.items() if name != "q"}
            for part in (slice(0, 7), slice(7, 8), slice(8, 40))]
    totals = torch.stack([linear_state(**run) for run in runs], 2)
    found = chained_states(totals)
    for run, end in enumerate((7, 8, 40)):
        _, last = by_loop(**{name: x[:, :, :end] for name, x in given.items()})
        torch.testing.assert_close(found[:, :, run], last, rtol=EXACT, atol=EXACT)


def test_what_is_far_away_is_not_lost_behind_what_forgets_a_lot() -> None:
    """Behind -1000, decays of -1e-4 count in full: a difference of sums would lose them."""
    q, k, v, decay = (x.float() for x in drawn(60).values())
    decay = torch.full_like(decay, -1e-4)
    decay[..., 0] = -1000
    expected, _ = by_loop(*(x.double() for x in (q, k, v, decay)))
    torch.testing.assert_close(linear_attention(q, k, v, decay).double(), expected, rtol=1e-5,
                               atol=2e-5)


def test_half_precision_is_computed_in_float32() -> None:
    q, k, v, decay = (x.to(torch.bfloat16) for x in drawn(300).values())
    expected = linear_attention(*(x.float() for x in (q, k, v, decay)))
    found = linear_attention(q, k, v, decay)
    assert found.dtype == torch.bfloat16
    assert found.equal(expected.to(torch.bfloat16))
    assert linear_state(k, v, decay).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_from_what_is_kept(kind: tuple[bool, bool]) -> None:
    """Calls that end in, on and across blocks; back by up to 32 tokens; nothing is read unset."""
    given = drawn(260, *kind)
    expected, _ = by_loop(**given)
    kept = {
        name: torch.full_like(given[name][:, :, :1], torch.nan).expand_as(
            given[name][:, :, :KEPT_TOKENS]).clone()
        for name in ("k", "v", "decay", "beta") if name in given
    }
    states = torch.full((2, HEADS, KEPT_STATES, SIZE, FEATURES), torch.nan, dtype=torch.float64)
    length = 0
    for step in (1, 6, 1, 40, 2, 14, 1, 32, 1, -32, 5, 1, -6, 3, -3, 100, -32, 33, -1, 31, 1):
        if step > 0:
            now, places = slice(length, length + step), torch.arange(length, length + step)
            new = [given[x][:, :, now] if x in given else None
                   for x in ("q", "k", "v", "decay", "beta")]
            held = [kept.get(x) for x in ("k", "v", "decay", "beta")]
            found = running_linear_attention(*new, *held, states, places)
            torch.testing.assert_close(found, expected[:, :, now], rtol=EXACT, atol=EXACT)
        length += step
    assert length == 198
