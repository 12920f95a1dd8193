"""Arithmetic of sizes is remembered while a model is captured; programs are those without it."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.sym_node import SymNode

from ringcompile.capture import export
from ringcompile.capture.export import capture
from ringcompile.capture.remembered_sizes import sizes_remembered

CAPTURED = 12
METHODS = ("_mul", "_eq", "_ge")


class Sizes(nn.Module):
    """Computes with sizes, compares them, and asks for what is otherwise for one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length = x.shape[:2]
        if batch * 2 >= 4:
            x = x * 2
        heads = self.linear(x).view(batch, length, 4, 4).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        rows = out.transpose(1, 2).reshape(batch * length, 16)
        scale = (length + 3) // 2 + max(length, 7) - min(batch, 3) + length % 5
        return (rows * scale).view(batch, length, 16) * (length * 2 - length)


def captured() -> tuple[Any, ...]:
    torch.manual_seed(0)
    program = capture(Sizes().eval(), (torch.randn(2, CAPTURED, 16),))
    return str(program), program.notes, program.length_range


def test_the_program_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = captured()
    monkeypatch.setattr(export, "sizes_remembered", contextlib.nullcontext)
    assert with_it == captured()
    assert "one sequence alone is refused" in with_it[1][0]  # what is asked of sizes is noted


def test_each_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: Counter[Any] = Counter()

    def counted(name: str, original: Any) -> Any:
        def operation(size: SymNode, other: SymNode) -> SymNode:
            if get_proxy_mode() is None:
                computed[name, id(size.shape_env), size.expr, other.expr, size.pytype] += 1
            return original(size, other)

        return operation

    for name in METHODS:
        monkeypatch.setattr(SymNode, name, counted(name, getattr(SymNode, name)))
    captured()
    assert {key[0] for key in computed} == set(METHODS)
    assert max(computed.values()) == 1
    monkeypatch.setattr(export, "sizes_remembered", contextlib.nullcontext)
    captured()
    assert max(computed.values()) > 20


def test_torchs_own_methods_are_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(vars(SymNode))
    with contextlib.suppress(KeyError), sizes_remembered():
        assert vars(SymNode)["_mul"] is not before["_mul"]
        raise KeyError
    assert dict(vars(SymNode)) == before
    monkeypatch.delattr(SymNode, "_sym_max")  # another torch may call it otherwise
    with sizes_remembered():
        assert not hasattr(SymNode, "_sym_max")
