"""Autocast, grad modes, vmap and control flow inside a forward: written out, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from tests.support import difference, run, some_fast

WIDTH, CAPTURED, LENGTH = 16, 13, 22


class Module(nn.Module):
    """A function of a test, with weights and attention at hand."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        q = self.up(x).unflatten(-1, (2, -1)).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return self.down(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def bf16(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled)


def x(length: int) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(length))


def autocast_off(m: Module, x: Tensor) -> Tensor:
    with bf16(False):
        angle = torch.arange(x.shape[1])[:, None].float() * 0.1
        return m.attend(x * angle.cos())


def autocast_on(m: Module, x: Tensor) -> Tensor:
    with bf16():
        return m.attend(x).float() + x


def autocast_nested(m: Module, x: Tensor) -> Tensor:
    with bf16():
        y = m.up(x)
        with bf16(False):
            y = m.down(y.float())
        return m.attend(y).float()


def autocast_layer_norm(m: Module, x: Tensor) -> Tensor:
    with bf16():
        return functional.layer_norm(m.attend(x), (WIDTH,)) + functional.softmax(m.up(x), -1)


@bf16()
def by_decorator(m: Module, x: Tensor) -> Tensor:
    return m.down(functional.gelu(m.up(x))).float() + m.attend(x).float()


def grad_on(m: Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = m.attend(x)
    return y + x


def grad_on_for_good(m: Module, x: Tensor) -> Tensor:
    torch.set_grad_enabled(True)
    return m.attend(x) + x


def grad_modes_nested(m: Module, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(True):
        y = m.up(x)
        with torch.no_grad(), bf16():
            y = m.attend(y)
        return y + x


def inference(m: Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return m.attend(x) * 2


def recomputed(m: Module, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(m.attend, x, use_reentrant=False)
    return result


def mapped(m: Module, x: Tensor) -> Tensor:
    return m.attend(torch.vmap(torch.vmap(lambda row: row / (1 + row.norm())))(x))


def in_place(m: Module, x: Tensor) -> Tensor:
    with torch.enable_grad(), bf16():
        y = m.attend(x)
        y[..., 0] = 1.0
        return y.add_(x)


WRITTEN_OUT = {
    f.__name__: f for f in (
        autocast_off, autocast_on, autocast_nested, autocast_layer_norm,
        by_decorator, grad_on, grad_on_for_good, grad_modes_nested, inference, recomputed, mapped,
        in_place,
    )
}  # fmt: skip


def dtypes(program: Program, op: str) -> list[torch.dtype]:
    """The dtypes of what the calls of an op give."""
    return [n.meta["type"].dtype for n in program.graph.nodes if op in str(n.target)]


FAST = {"autocast_off", "autocast_nested", "grad_modes_nested", "mapped"}


@pytest.mark.parametrize("name", some_fast(WRITTEN_OUT, fast=FAST.__contains__))
def test_written_out(name: str) -> None:
    module = Module(WRITTEN_OUT[name]).eval()
    grad = torch.is_grad_enabled()
    program = capture(module, (x(CAPTURED),))
    assert torch.is_grad_enabled() == grad
    with torch.no_grad():
        expected = module(x(LENGTH)).detach()
    limit = 2e-2 if "autocast" in name or torch.bfloat16 in dtypes(program, "linear") else 2e-5
    assert difference(run(transform(program, "ring=3"), (x(LENGTH),)).outputs, expected) < limit


@pytest.mark.slow
def test_what_autocast_computes_in_bfloat16() -> None:
    names = ("autocast_on", "autocast_nested", "autocast_off")
    captured = {n: capture(Module(WRITTEN_OUT[n]).eval(), (x(CAPTURED),)) for n in names}
    linear = {name: dtypes(program, "linear") for name, program in captured.items()}
    low, high = torch.bfloat16, torch.float32
    assert linear == {"autocast_on": [low, low], "autocast_nested": [low, high, low, low],
                      "autocast_off": [high, high]}
    assert dtypes(captured["autocast_on"], "scaled_dot_product") == [low]


def test_ops_in_a_region_keep_their_lines_and_dtypes() -> None:
    program = capture(Module(autocast_nested).eval(), (x(CAPTURED),))
    low, high = torch.bfloat16, torch.float32
    assert dtypes(program, "linear") == [low, high, low, low]
    lines = [n.meta["loc"].text for n in program.graph.nodes if "linear" in str(n.target)]
    assert lines[:2] == ["y = m.up(x)", "y = m.down(y.float())"]
    assert [n.meta["loc"].layer for n in program.graph.nodes if "linear" in str(n.target)] == [
        "up", "down", "up", "down"]


def branches(m: Module, x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def looped(m: Module, x: Tensor) -> Any:
    start = torch.zeros((), dtype=torch.long)
    return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (start, x))[1]


def mapped_in_turn(m: Module, x: Tensor) -> Any:
    return torch_map(lambda row: m.up(row), x)


def scanned(m: Module, x: Tensor) -> Any:
    return scan(lambda carry, y: (carry + y, carry + y), x[:, 0], x, dim=1)[1]


def branches_in_a_region(m: Module, x: Tensor) -> Any:
    with bf16():
        y = m.up(x)
        return torch.cond(y.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (y,))


def keeps_a_count(m: Module, x: Tensor) -> Any:
    m.count.add_(1)  # type: ignore[operator, union-attr]
    return x + m.count


def gradient(m: Module, x: Tensor) -> Any:
    with torch.enable_grad():
        z = x.detach().requires_grad_(True)
        return torch.autograd.grad(m.up(z).sum(), z)[0]


def casts_inside(m: Module, x: Tensor) -> Any:
    with bf16():
        return torch.einsum("bqd,bkd->bqk", m.up(x), x).float() @ x


ONE_PATH = "cannot be captured, because a compiled program has no control flow"
REFUSED = {
    branches: (f"torch.cond {ONE_PATH}", "compute both branches and choose with torch.where",
               "return torch.cond(x.sum() > 0"),
    looped: (f"while_loop {ONE_PATH}", "write a Python loop with a fixed number of steps",
             "return while_loop("),
    mapped_in_turn: (f"map {ONE_PATH}", "apply the function to the whole tensor, or use torch.vmap",
                     "return torch_map("),
    scanned: (f"scan {ONE_PATH}",
              "write a Python loop with a fixed number of steps, or use torch.cumsum",
              "return scan("),
    branches_in_a_region: (
        f"torch.cond {ONE_PATH}", "compute both branches and choose with torch.where",
        "return torch.cond(y.sum() > 0"),
    casts_inside: (
        "einsum is called under torch.autocast, which would cast the matmuls inside it",
        "write it with torch.matmul, or turn autocast off around it and cast what einsum takes",
        'return torch.einsum("bqd,bkd->bqk"'),
    keeps_a_count: (
        ("the model changes one of its own tensors (a buffer, say) while it runs; inference must "
         "not change state"),
        "call model.eval(), and turn caches and counters off", ""),
    gradient: (
        "the model keeps a tensor from an earlier call, or computes a gradient, while it runs",
        "compute it in each call with ordinary tensor operations", ""),
}  # fmt: skip


FAST_REFUSED = {branches, mapped_in_turn, casts_inside, gradient}


@pytest.mark.parametrize(
    "function", some_fast(REFUSED, fast=FAST_REFUSED.__contains__), ids=lambda f: f.__name__
)
def test_refused(function: Callable[..., Any]) -> None:
    message, hint, line = REFUSED[function]
    module = Module(function).eval()
    module.count = torch.zeros(1)  # type: ignore[assignment]
    with pytest.raises(RingCompileError) as caught:
        capture(module, (x(CAPTURED),))
    assert (caught.value.message, caught.value.hint) == (message, hint)
    found = caught.value.location.text if caught.value.location else ""
    assert found.startswith(line)
