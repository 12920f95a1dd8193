"""The line of a node, and of an error, is the one on which the op stands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from tests.capture import elsewhere

EXAMPLE = torch.randn(2, 13, 8)


class Lines(nn.Module):
    """Each op occurs once, at a line whose comment says where that is."""

    def __init__(self) -> None:
        super().__init__()
        self.block = elsewhere.Block()
        self.function = lambda x: x.cosh()  # in a lambda

    @elsewhere.wrapped
    def decorated(self, x: Tensor) -> Tensor:
        return x.sin()  # decorated

    @property
    def scale(self) -> Tensor:
        return torch.tensor([2.0]).exp2()  # in a property

    def forward(self, x: Tensor) -> Tensor:
        def nested(x: Tensor) -> Tensor:
            return x.cos()  # in a nested function

        x = self.function(nested(x))
        x = sum([
            y.erf()  # in a comprehension
            for y in (x,)
        ])  # type: ignore[assignment]
        x = next(
            y.atan()  # in a generator
            for y in (x,)
        )
        x = self.block(self.decorated(elsewhere.helper(x)))
        return x * self.scale + torch.vmap(
            lambda y: y.sigmoid()  # in vmap
        )(x)


WHERE = {
    "cosh": "in a lambda", "sin": "decorated", "sinh": "in a decorator", "tan": "in a helper",
    "cos": "in a nested function", "erf": "in a comprehension", "atan": "in a generator",
    "asinh": "in a module elsewhere", "exp2": "in a property", "sigmoid": "in vmap",
}  # fmt: skip


def test_lines_of_ops() -> None:
    program = capture(Lines().eval(), (EXAMPLE,))
    found = {str(n.target).split(".")[1]: n.meta["loc"] for n in program.graph.nodes
             if n.op == "call_function"}  # fmt: skip
    assert {op: found[op].text.partition("# ")[2] for op in WHERE} == WHERE
    assert found["asinh"].layer == "block"
    assert found["asinh"].file == elsewhere.__file__


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def sized_by_data(x: Tensor) -> Tensor:
    count = int(x.sum())  # a size from data
    return x[:, :count] * torch.arange(count)[:, None]


def as_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() + 1)  # to numpy


def a_list(x: Tensor) -> Tensor:
    return x * max(x[0, :, 0].tolist())  # to a list


def a_loop(x: Tensor) -> Tensor:
    for _ in range(int(x.abs().max())):  # counted by data
        x = x + 1
    return x


BY_DATA: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a branch in a helper": (elsewhere.branch, "decided by data"),
    "a branch in a lambda": (
        lambda x: -x if (x > 0).any() else x,  # by any
        "by any",
    ),
    "a size": (sized_by_data, "a size from data"),
    "a count of loops": (a_loop, "counted by data"),
    "numpy": (as_numpy, "to numpy"),
    "a list": (a_list, "to a list"),
}


@pytest.mark.parametrize("name", BY_DATA)
def test_what_the_host_would_read(name: str) -> None:
    function, line = BY_DATA[name]
    with pytest.raises(RingCompileError) as caught:
        capture(Calls(function).eval(), (EXAMPLE,))
    assert caught.value.message == (
        "control flow or a size depends on the values of a tensor, not on shapes"
    )
    assert caught.value.location is not None
    assert caught.value.location.text.partition("# ")[2] == line


def test_a_refusal_shows_the_line_of_the_op() -> None:
    """Not that of the `forward` which calls the helper."""

    def helper(x: Tensor) -> Tensor:
        return torch.linalg.qr(x)[0]  # in a helper

    with pytest.raises(RingCompileError, match="has no sharding rule") as caught:
        transform(capture(Calls(helper).eval(), (EXAMPLE,)), "ring=2")
    assert caught.value.location is not None
    assert caught.value.location.text == "return torch.linalg.qr(x)[0]  # in a helper"


@functools.lru_cache
def table(length: int) -> Tensor:
    return torch.arange(length)[:, None] * 0.1


def test_a_cache_by_length() -> None:
    with pytest.raises(RingCompileError) as caught:
        capture(Calls(lambda x: x * table(x.shape[1])).eval(), (EXAMPLE,))  # by length
    assert caught.value.message == (
        "a size that may vary is used as a key of a cache (such as functools.lru_cache), a dict "
        "or a set"
    )
    assert caught.value.location is not None
    assert caught.value.location.text.endswith("# by length")


def test_a_mistake_of_the_users() -> None:
    with pytest.raises(RingCompileError) as caught:
        capture(Calls(lambda x: x @ x).eval(), (EXAMPLE,))  # shapes
    assert caught.value.message.startswith("torch.export cannot capture the model: RuntimeError")
    assert caught.value.location is not None
    assert caught.value.location.text.endswith("# shapes")
