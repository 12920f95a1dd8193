"""Ops that `partition` writes anew where they are split: held against one device, compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.ir.rules import RULES
from ringcompile.passes.shares.partition import _STEPS
from tests.support import compiled, difference, run, some_fast

H, ORDERS = 12, ("contiguous", "zigzag")
KEYS = torch.linspace(-1, 1, 5 * H).reshape(1, 5, H)


class Lambda(nn.Module):
    """A function of hidden states [2, S, 12] as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], 3, 4).transpose(1, 2)


def attend(q: Tensor, k: Tensor, **options: object) -> Tensor:
    y = F.scaled_dot_product_attention(heads(q), heads(k), heads(k + 1), **options)  # type: ignore[arg-type]
    return y.transpose(1, 2).flatten(2)


def seen(x: Tensor) -> Tensor:
    """Key j of five is seen from position 2j on."""
    return torch.arange(x.shape[1])[:, None] >= 2 * torch.arange(5)[None, :]


def recur(factor: Tensor, term: Tensor, dim: int) -> Tensor:
    """y[t] = factor[t] * y[t - 1] + term[t]."""
    return associative_scan(
        lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (factor, term), dim,
        combine_mode="generic",
    )[1]


def linear(x: Tensor, decay: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
    """Linear attention of x [.., S, D] to itself."""
    if decay is None:
        decay = F.logsigmoid(x[..., 0])
    return rc.linear_attention(x, x if beta is not None else x + 1, x / 2, decay, beta)


def places(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda x: x.cumsum(1),
    "tokens, from the end": lambda x: x.cumsum(-2),
    "tokens, counted": lambda x: (x > 0).cumsum(1),
    "tokens, as another dtype": lambda x: (x * 4).int().cumsum(1, dtype=torch.float32),
    "tokens, counted in few bits": lambda x: (x > 0).cumsum(1, dtype=torch.int32),
    "features": lambda x: x.cumsum(-1),
    "tokens of all samples": lambda x: x.reshape(-1, H).cumsum(0),
    "tokens with their features": lambda x: x.reshape(2, -1).cumsum(1),
    "everything": lambda x: x.reshape(-1).cumsum(0),
    "tokens, then features": lambda x: x.cumsum(1).cumsum(2),
    "a sum of sums": lambda x: x.cumsum(1).cumsum(1),
    "as positions": lambda x: F.embedding((x[..., 0] > 0).cumsum(1), torch.eye(64)),
}
PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda x: x.cumprod(1),
    "tokens, of zeros too": lambda x: x.relu().cumprod(1),
    "tokens, as another dtype": lambda x: (x > -1).cumprod(1, dtype=torch.float32),
    "tokens of all samples": lambda x: x.sigmoid().reshape(-1, H).cumprod(0),
}
LOGARITHMS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda x: x.logcumsumexp(1),
    "tokens, of nothing at first": lambda x: x.masked_fill(
        places(x)[:, None] < 7, float("-inf")).logcumsumexp(1).exp(),
    "everything": lambda x: x.reshape(-1).logcumsumexp(0),
}
RECURRENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda x: recur(x.sigmoid() * (x > -1), x, 1),
    "tokens of all samples": lambda x: recur(*(y.reshape(-1, H) for y in (x.sigmoid(), x)), 0),
    "features": lambda x: recur(x.sigmoid(), x, 2),
}
LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda x: linear(heads(x)).transpose(1, 2).flatten(2),
    "tokens of all samples": lambda x: linear(x.reshape(-1, H)),
    "tokens that forget all": lambda x: linear(x, (-1.0 / (x[..., 0] > -1))),
    "features": lambda x: linear(x[..., None]).squeeze(-1),
    "tokens, feature by feature": lambda x: linear(x, F.logsigmoid(x)),
    "tokens, by the delta rule": lambda x: linear(
        F.normalize(x, dim=-1), F.logsigmoid(x[..., 0]), x[..., 1].sigmoid()),
}
POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "one by one": lambda x: x + places(x)[:, None],
    "from three in twos": lambda x: x + torch.arange(3, 3 + 2 * x.shape[1], 2)[:, None],
    "backwards": lambda x: x * torch.arange(x.shape[1], 0, -1)[:, None],
    "as numbers": lambda x: x + torch.arange(x.shape[1], dtype=torch.float32)[:, None] / 3,
    "of all samples": lambda x: x.reshape(-1, H) + torch.arange(2 * x.shape[1])[:, None],
    "of a part": lambda x: x[:, 1:] + torch.arange(1, x.shape[1])[:, None],
}
ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {
    "to itself": lambda x: attend(x, x),
    "causal": lambda x: attend(x, x, is_causal=True),
    "to keys that are whole": lambda x: attend(x, KEYS.expand(2, 5, H)),
    "to keys that are whole, by position": lambda x: attend(
        x, KEYS.expand(2, 5, H), attn_mask=seen(x)),
    "of one token": lambda x: attend(x[:, -1:], x),
}
MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "gathered": lambda x: x.softmax(1),
    "gathered out of several": lambda x: x.reshape(-1, H).softmax(0),
    "gathered, then cut": lambda x: x.flip(1) + x,
    "cut into several": lambda x: (x.flip(1) + x).reshape(-1, H) * x.reshape(-1, H),
}
CASES = {
    f"{kind}: {name}": function
    for kind, table in (
        ("cumsum", SUMS), ("cumprod", PRODUCTS), ("logcumsumexp", LOGARITHMS),
        ("recurrence", RECURRENCES), ("linear_attention", LINEAR),
        ("arange", POSITIONS), ("attention", ATTENTION), ("redistribute", MOVED),
    )
    for name, function in table.items()
}


def test_these_are_the_ops_that_partition_rewrites() -> None:
    kinds = {name.split(":")[0] for name in CASES}
    elsewhere = {"embedding"}  # of a table that tp splits: tests/test_parallel.py
    assert kinds | elsewhere == {name.split(".")[1] for name in _STEPS}
    assert set(_STEPS) - set(RULES) == {"ringcompile.redistribute.default"}


def in_turns(name: str, order: str) -> bool:
    """Each case in one order, cases of a kind in both."""
    return order == ORDERS[list(CASES).index(name) % 2]


@pytest.mark.parametrize(("name", "order"), some_fast(CASES, ORDERS, fast=in_turns))
def test_written_anew_it_gives_the_same(name: str, order: str) -> None:
    """Whether the length divides, leaves padding, or leaves ranks with nothing else."""
    module = Lambda(CASES[name]).eval()
    parallel = compiled(module, (torch.randn(2, 16, H),), "ring=3", order=order)
    for length in (3, 13, 24):
        x = torch.randn(2, length, H)
        assert difference(run(parallel, (x,)).outputs, module(x)) < 2e-6, length


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e9])
def test_a_running_sum_before_a_large_number_does_not_know_of_it(value: float, order: str) -> None:
    def function(x: Tensor) -> Tensor:
        return x.reshape(-1, H).cumsum(0)

    parallel = compiled(Lambda(function), (torch.randn(2, 16, H),), "ring=3", order=order)
    for place in (6, 12, 20):
        x = torch.randn(2, 13, H)
        x.view(-1, H)[place] = value
        torch.testing.assert_close(
            run(parallel, (x,)).outputs, function(x), rtol=2e-6, atol=2e-6, equal_nan=True
        )


@pytest.mark.parametrize(("spec", "order"), some_fast(
    ["ring=3", "ring=2,ulysses=2", "ulysses=2", "ring=2,ep=2"], ORDERS,
    fast=lambda spec, order: (order == "zigzag") == (spec in ("ring=3", "ring=2,ulysses=2")),
))
def test_a_split_moves_from_one_dim_to_another(spec: str, order: str) -> None:
    """A bias that is made by key and wanted by query: whole in the one, split in the other."""

    def function(x: Tensor) -> Tensor:
        heads = x.reshape(*x.shape[:2], 2, -1).transpose(1, 2)
        by_key = (x[..., 0] > 0).cumsum(-1)[:, None, None, :].to(x.dtype)
        distance = torch.arange(x.shape[1])[:, None] * by_key
        return F.scaled_dot_product_attention(heads, heads, heads, 0.01 * distance)

    parallel = compiled(Lambda(function), (torch.randn(2, 16, H),), spec, order=order)
    for length in (5, 13, 24):
        x = torch.randn(2, length, H)
        assert difference(run(parallel, (x,)).outputs, function(x)) < 2e-6, length
