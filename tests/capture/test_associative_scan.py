"""associative_scan is read as the scan that its function stands for, or refused with its line."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn
from torch._higher_order_ops.associative_scan import associative_scan

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from tests.support import difference, run

WIDTH = 6


class Module(nn.Module):
    """Hands what a scan takes and gives to a function of a test."""

    def __init__(self, scanned: Callable[..., Any]) -> None:
        super().__init__()
        self.scanned = scanned
        self.enter, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.scanned(self.gate(x).sigmoid(), self.enter(x))


def scan(combine: Callable[..., Any], of: Any, **options: Any) -> Any:
    return associative_scan(combine, of, 1, combine_mode="generic", **options)


def then(left: Any, right: Any) -> Any:
    return left[0] * right[0], right[0] * left[1] + right[1]


def then_by_name(left: Any, right: Any) -> Any:
    return {"h": right["a"] * left["h"] + right["h"], "a": left["a"] * right["a"]}


KINDS: dict[str, tuple[Callable[..., Any], str]] = {
    "sums": (lambda a, b: scan(torch.add, b), "aten.cumsum"),
    "products": (lambda a, b: scan(torch.mul, a), "aten.cumprod"),
    "largest": (lambda a, b: scan(torch.maximum, b), "aten.cummax"),
    "smallest": (lambda a, b: scan(lambda x, y: torch.where(x < y, x, y), b), "aten.cummin"),
    "logarithms of sums": (lambda a, b: scan(torch.logaddexp, b), "aten.logcumsumexp"),
    "recurrence": (lambda a, b: scan(then, (a, b))[1], "ringcompile.recurrence"),
    "its products": (lambda a, b: sum(scan(then, (a, b))), "ringcompile.recurrence"),
    "backwards": (lambda a, b: scan(then, (a, b), reverse=True)[1], "ringcompile.recurrence"),
    "by name": (lambda a, b: scan(then_by_name, {"h": b, "a": a})["h"], "ringcompile.recurrence"),
    "one factor for all": (
        lambda a, b: scan(then, (a[..., :1], b))[1], "ringcompile.recurrence"
    ),
    "along features": (
        lambda a, b: associative_scan(then, (a, b), 2, combine_mode="generic")[1],
        "ringcompile.recurrence",
    ),
}


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_it_is_the_scan_that_it_stands_for(name: str) -> None:
    scanned, op = KINDS[name]
    model = Module(scanned).double().eval()
    program = capture(model, (torch.randn(2, 13, WIDTH, dtype=torch.float64),))
    assert any(str(node.target).startswith(op) for node in program.graph.nodes)
    for spec in ("ring=4", "tp=2"):
        parallel = transform(program, spec)
        for length in (1, 27):
            x = torch.randn(2, length, WIDTH, dtype=torch.float64)
            assert difference(run(parallel, (x,)).outputs, model(x)) < 1e-12


def test_a_torch_with_other_names_captures_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("torch._higher_order_ops.associative_scan")
    monkeypatch.delattr(module, "_maybe_compile_and_run_fn")
    capture(nn.Linear(WIDTH, 2).eval(), (torch.randn(2, 13, WIDTH),))
    assert not hasattr(module, "_maybe_compile_and_run_fn")


UNKNOWN = {
    "of one": lambda a, b: scan(lambda x, y: x + y + x * y, b),
    "nearly a product": lambda a, b: scan(lambda x, y: (x * y).clamp(max=40.0), a),
    "of three": lambda a, b: scan(
        lambda x, y: (x[0] + y[0], x[1] * y[1], torch.maximum(x[2], y[2])), (a, b, a)
    )[0],
    "the other way round": lambda a, b: scan(
        lambda x, y: (x[0] * y[0], x[0] * y[1] + x[1]), (a, b)
    )[1],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_another_function_is_refused_with_its_line(name: str) -> None:
    with pytest.raises(RingCompileError) as refused:
        capture(Module(UNKNOWN[name]).eval(), (torch.randn(2, 13, WIDTH),))
    said = "associative_scan is called with a combining function that is not supported"
    assert refused.value.message == said
    assert "linear recurrence (a1 * a2, a2 * b1 + b2)" in str(refused.value)
    assert refused.value.location is not None
    assert refused.value.location.short.startswith("test_associative_scan.py:")
