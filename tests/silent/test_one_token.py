"""Sequences of one token: run where the captured graph holds for them, refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ringcompile.errors import RingCompileError
from tests.silent.small import CAPTURED, WIDTH, Model, ids, matches
from tests.support import compiled, run, some_fast

Tensor = torch.Tensor
SPECS = ["ring=4", "tp=2", "pp=2", "ulysses=2", "ring=16", "ring=4,ulysses=4", "time=4"]


def rotary(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    angle = torch.arange(x.shape[1])[:, None].double() * torch.linspace(0.1, 1, WIDTH).double()
    return m.down(m.up(x * angle.cos()))


def asks_without_need(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x + x
    return x * 2


def last_three(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 2, 0))[:, 2:] - x.mean(1, keepdim=True)


def shifted(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def convolved(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return m.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


RIGHT: dict[str, Callable[..., Tensor]] = {
    "positions": rotary,
    "a branch that changes nothing": asks_without_need,
    "padding and a mean": last_three,
    "shifted by one": shifted,
    "a causal convolution": convolved,
    "a length as a number": lambda m, x, t: x / x.shape[1],
    "its last token": lambda m, x, t: x * x[:, -1:],
    "a running sum": lambda m, x, t: x.cumsum(1),
}


def model(between: Callable[..., Tensor] | None) -> nn.Module:
    return Model(between, conv=nn.Conv1d(WIDTH, WIDTH, 3))


@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast(list(RIGHT), SPECS, fast=lambda kind, spec: (kind, spec) in
              {("positions", "ring=4"), ("shifted by one", "tp=2")}),
)
def test_from_one_token_on(kind: str, spec: str) -> None:
    matches(model(RIGHT[kind]), spec, lengths=(1, 2, 3))


def test_on_sixteen_ranks() -> None:
    matches(model(None), "ring=8,ulysses=2", lengths=(1, 2))


def another_formula(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return x * 3 if x.shape[1] == 1 else x * 2


def two_at_least(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return m.conv(F.pad(x.transpose(1, 2), (1, 0))).mean(-1)[:, None]


def no_dim_of_one(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return x * (tokens[:1].squeeze() > 3)[..., None]


def the_first_two(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return x * x[:, :2].sum(1, keepdim=True) / x[:, :2].shape[1]


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "another formula": (another_formula, "does not compute what the model computes"),
    "a convolution": (two_at_least, "the model as it is called, because that raises RuntimeError"),
}


@pytest.mark.parametrize("kind", some_fast(REFUSED, fast=lambda kind: kind == "another formula"))
def test_where_it_is_not_alike(kind: str) -> None:
    between, reason = REFUSED[kind]
    parallel = compiled(model(between), (ids(CAPTURED),), "ring=4")
    with pytest.raises(RingCompileError, match="sequence length 1 is outside 2") as caught:
        run(parallel, (ids(1),))
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("one token alone is refused: ")
    assert reason in caught.value.hint
    matches(model(between), "ring=4", lengths=(2, 7))


@pytest.mark.parametrize("between", [
    pytest.param(no_dim_of_one, marks=pytest.mark.slow), the_first_two
])
def test_right_or_refused(between: Callable[..., Tensor]) -> None:
    try:
        matches(model(between), "ring=4", lengths=(1,))
    except RingCompileError as error:
        assert "one token alone is refused" in (error.hint or "")  # noqa: PT017
