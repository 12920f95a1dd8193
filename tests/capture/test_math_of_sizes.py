"""Numbers that a model computes of its length: roots, logarithms, quotients, linspace."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ringcompile as rc
from ringcompile.dump.python_view import python_view
from ringcompile.errors import RingCompileError
from ringcompile.ir.printer import print_program
from tests.support import compiled, some_fast

D, HEADS = 16, 4


class Scaled(nn.Module):
    """Causal attention with a scale of the length, and then something else of the length."""

    def __init__(self, scale: Callable[[int], float], after: Callable[[Tensor, int], Tensor]):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.scale, self.after = scale, after

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * self.scale(length)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, length, D)
        return self.after(self.out(mixed), length)


def _half(_: int) -> float:
    return 0.5


def _same(x: Tensor, _: int) -> Tensor:
    return x


SCALES: dict[str, Callable[[int], float]] = {
    "log of the length": lambda n: math.log(n) / math.log(512),
    "log to a base": lambda n: math.log(n, 512),
    "log2": lambda n: math.log2(n + 1) * 0.1,
    "root": lambda n: 1 / math.sqrt(n),
    "power": lambda n: n**-0.5,
    "quotient": lambda n: 3 / n,
}
AFTER: dict[str, Callable[[Tensor, int], Tensor]] = {
    "a product": lambda x, n: x * (1 / n),
    "a sum": lambda x, n: x + math.sqrt(n),
    "positions from 0 to 1": lambda x, n: x + torch.linspace(0, 1, n, dtype=x.dtype)[:, None],
    "positions from 2 down": lambda x, n: x * torch.linspace(2, -1, n, dtype=x.dtype)[:, None],
    "whole tokens": lambda x, n: x * (torch.arange(n) * (n / 2))[:, None],
    "half of the tokens": lambda x, n: x * (torch.arange(n) < math.floor(n / 2))[:, None],
    "what rounding decides": lambda x, n: (
        x * (torch.arange(1, n + 1, dtype=x.dtype) <= n / 49 * 49)[:, None]
    ),
    "a quarter, rounded up": lambda x, n: x * (torch.arange(n) < math.ceil(n / 4))[:, None],
}


@cache
def _scaled(scale: Callable[[int], float], after: Callable[[Tensor, int], Tensor]) -> nn.Module:
    """A module is captured once for all specs."""
    return Scaled(scale, after).double().eval()


def _check(model: nn.Module, spec: str) -> None:
    example = torch.randn(2, 12, D, dtype=torch.float64)
    parallel = compiled(model, (example,), spec)
    for length in (1, 2, 17, 24):
        x = torch.randn(2, length, D, dtype=torch.float64)
        torch.testing.assert_close(rc.run(parallel, (x,)), model(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "spec"),
    some_fast(
        SCALES, ["ring=2", "tp=2"],
        fast=lambda name, spec: (spec == "ring=2") == (list(SCALES).index(name) % 2 == 0),
    ),
)
def test_scales(name: str, spec: str) -> None:
    _check(_scaled(SCALES[name], _same), spec)


@pytest.mark.parametrize(
    ("name", "spec"),
    some_fast(
        AFTER, ["ring=3", "pp=2,ulysses=2"],
        fast=lambda name, spec: (spec == "ring=3") == (list(AFTER).index(name) % 2 == 0),
    ),
)
def test_after_attention(name: str, spec: str) -> None:
    _check(_scaled(_half, AFTER[name]), spec)


@pytest.mark.parametrize(
    "rounded", [lambda n: math.floor(0.7 * n), lambda n: math.ceil((n / 49) * 49)]
)
def test_sizes_that_rounding_decides_are_refused(rounded: Callable[[int], int]) -> None:
    model = Scaled(_half, lambda x, n: x * (torch.arange(n) < rounded(n))[:, None])
    with pytest.raises(RingCompileError) as caught:
        rc.capture(model.eval(), (torch.randn(2, 12, D),))
    assert caught.value.message == (
        "a size is rounded from a number that depends on how floating point rounds"
    )
    assert caught.value.hint == (
        "use whole numbers, for example (7 * n) // 10 in place of floor(0.7 * n)"
    )
    assert caught.value.location is not None


def test_dumps_and_artifacts_hold_them(tmp_path: Path) -> None:
    model = Scaled(SCALES["root"], AFTER["a product"]).eval()
    x = torch.randn(2, 12, D)
    parallel = rc.transform(rc.capture(model, (x,)), "ring=2")
    text, view = print_program(parallel.rank(0)), python_view(parallel.rank(0))
    assert "float(1/sqrt(s))" in text
    assert "float(1/s)" in text
    assert "float(1/s)" in view
    parallel.save(tmp_path / "out")
    saved = rc.load(tmp_path / "out")
    assert print_program(saved.rank(0)) == text
