"""What fused groups cost: the bytes that they move, on GPUs, and their ops one by one on CPUs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.capture.loaders import load_model
from ringcompile.cost.fusing import fused
from ringcompile.cost.hardware import load_cluster
from ringcompile.cost.kernels import Kernel, time_of
from ringcompile.cost.layers import cut, find_stack, repeat
from ringcompile.cost.ops import kernels_of
from ringcompile.cost.rank import RankCost, cost_of
from ringcompile.cost.scaling import with_batch
from ringcompile.cost.values import Values, bind_lengths
from ringcompile.ir.program import Program
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
    """Those of the module's ops one by one, and of its fused groups; without views."""
    program = rc.transform(rc.capture(module, (torch.randn(1, TOKENS, WIDTH),)), "dp=1").rank(0)
    values = Values(program, bind_lengths(program, TOKENS))
    alone = {n: kernels_of(values, n) for n in program.graph.nodes if n.op == "call_function"}
    one, together = ([k for each in found.values() for k in each]
                     for found in (alone, fused(values, alone)[0]))
    return one, together


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


CASES = [
    ("dense-4l-tiny", "ring=4"), ("dense-4l-tiny", "pp=2,tp=2"), ("llama-tiny", "ring=2,tp=2"),
    pytest.param("moe-4l-tiny", "ring=2,ep=2", marks=pytest.mark.slow),
    ("moe-4l-tiny", "ulysses=2"),
]


@pytest.mark.parametrize(("model", "spec"), CASES)
def test_kernels_of_models(model: str, spec: str) -> None:
    program = captured(model)
    apart = rc.transform(program, spec, fuse=False).ranks()
    for rank, alone in zip(rc.transform(program, spec).ranks(), apart, strict=True):
        plain, together = cost_of(alone, 64), cost_of(rank, 64)
        assert together.flops == plain.flops
        assert together.bytes_sent == plain.bytes_sent
        moved = [sum(k.num_bytes for step in cost.steps for k in step.kernels)
                 for cost in (plain, together)]
        assert moved[1] < moved[0]
        assert together.num_nodes < plain.num_nodes


def captured(model: str) -> Program:
    loaded = load_model(model, weights=False)
    return captured_once(loaded.module, loaded.args, loaded.kwargs, name=model)


def seconds(cost: RankCost, table: str) -> float:
    device = load_cluster(table).device
    return sum(time_of(k, device).seconds for step in cost.steps for k in step.kernels)


def test_a_cpu_runs_the_ops_of_a_group_one_by_one() -> None:
    program = captured("llama-tiny")
    plain, together = (
        cost_of(rc.transform(program, "ring=2", fuse=fuse).rank(1), 64) for fuse in (False, True)
    )
    assert seconds(together, "cpu") == pytest.approx(seconds(plain, "cpu"), rel=1e-12)
    assert seconds(together, "h100x16") < 0.8 * seconds(plain, "h100x16")


@pytest.mark.parametrize(
    ("model", "tolerance"),
    # In a model that ends with its last block, the one block does not show what follows on a block.
    [("llama-tiny", 1e-3), ("gpt-tiny", 1e-3), ("moe-4l-tiny", 2e-2)],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_one_block_repeated_costs_what_all_blocks_cost(
    model: str, tolerance: float, batch: int
) -> None:
    """A group reaches over the end of each block: the residual sum and the next block's norm."""
    program = captured(model)
    stack = find_stack(program)
    assert stack is not None
    one = rc.transform(cut(program, stack, 1), "ring=1", length=4096)
    whole = rc.transform(program, "ring=1", length=4096)
    assert stack.num_layers > 1
    found = with_batch(repeat(cost_of(one.rank(0)), stack, stack.num_layers), batch)
    expected = with_batch(cost_of(whole.rank(0)), batch)
    assert seconds(found, "h100x16") == pytest.approx(seconds(expected, "h100x16"), rel=tolerance)
