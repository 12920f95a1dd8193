"""What a compiled program costs: which nodes share a kernel, and the bytes that it moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.capture.loaders import load_model
from ringcompile.cost.fusing import fused, groups
from ringcompile.cost.kernels import Kernel
from ringcompile.cost.ops import kernels_of
from ringcompile.cost.rank import cost_of
from ringcompile.cost.values import Values, bind_lengths
from ringcompile.ir.calls import target_name
from tests.support import captured_once

TOKENS, WIDTH = 6, 16
ROW = TOKENS * WIDTH * 4  # the bytes of one value


class Pointwise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x * 2) + x


class Residual(nn.Module):
    """The norm and the last sum both read x; the matmul lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return h + self.linear(normed)


class Halves(nn.Module):
    """Rotary positions: x as a whole, and its halves in another order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = torch.cat([-x[..., WIDTH // 2:], x[..., : WIDTH // 2]], -1)
        return x * 3 + turned * 4


def kernels(module: nn.Module) -> tuple[list[Kernel], list[Kernel]]:
    """Those of the module's ops one by one, and of the compiled module; without views."""
    program = rc.transform(rc.capture(module, (torch.randn(1, TOKENS, WIDTH),)), "dp=1").rank(0)
    values = Values(program, bind_lengths(program, TOKENS))
    alone = {n: kernels_of(values, n) for n in program.graph.nodes if n.op == "call_function"}
    return tuple([k for each in found.values() for k in each]
                 for found in (alone, fused(values, alone)))  # type: ignore[return-value]


def test_a_chain_reads_once_and_writes_once() -> None:
    alone, together = kernels(Pointwise())
    assert len(alone) == 3
    (kernel,) = together
    assert kernel.num_bytes == 2 * ROW


def test_what_a_matmul_lies_between_is_not_one_kernel() -> None:
    _, together = kernels(Residual())
    norm, matmul, last = together
    assert matmul.kind == "matmul"
    # x in, h and the normed tokens out; h and the product in, the sum out.
    assert (norm.kind, norm.num_bytes) == ("reduction", 3 * ROW)
    assert (last.kind, last.num_bytes) == ("stream", 3 * ROW)


def test_views_of_one_value_are_read_once() -> None:
    (kernel,) = kernels(Halves())[1]
    assert kernel.num_bytes == 2 * ROW


def nodes_between(group: dict[fx.Node, None], nodes: list[fx.Node]) -> list[fx.Node]:
    """Nodes outside of a group that one of its nodes reads, and that read another, by any way."""
    after: set[fx.Node] = set()
    for node in nodes:
        if any(operand in group or operand in after for operand in node.all_input_nodes):
            after |= set() if node in group else {node}
    before: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(user in group or user in before for user in node.users):
            before |= set() if node in group else {node}
    return [node for node in nodes if node in after and node in before]


CASES = [
    ("dense-4l-tiny", "ring=4"), ("dense-4l-tiny", "pp=2,tp=2"), ("llama-tiny", "ring=2,tp=2"),
    pytest.param("moe-4l-tiny", "ring=2,ep=2", marks=pytest.mark.slow),
    ("moe-4l-tiny", "ulysses=2"),
]


@pytest.mark.parametrize(("model", "spec"), CASES)
def test_kernels_of_models(model: str, spec: str) -> None:
    loaded = load_model(model, weights=False)
    program = captured_once(loaded.module, loaded.args, loaded.kwargs, name=model)
    shared: list[Any] = []
    for rank in rc.transform(program, spec).ranks():
        values = Values(rank, bind_lengths(rank, 64))
        nodes = [node for node in rank.graph.nodes if node.op == "call_function"]
        for group in groups({node: kernels_of(values, node) for node in nodes}):
            assert not nodes_between(group, nodes)
            assert not {"ringcompile.wait.default", "aten.linear.default"} & {
                target_name(node.target) for node in group
            }
            shared.append(len(group))
        plain, together = cost_of(rank, 64), cost_of(rank, 64, compiled=True)
        assert together.flops == plain.flops
        assert together.bytes_sent == plain.bytes_sent
        moved = [sum(k.num_bytes for step in cost.steps for k in step.kernels)
                 for cost in (plain, together)]
        assert moved[1] < moved[0]
        assert together.num_nodes < plain.num_nodes
    assert max(shared) > 4
