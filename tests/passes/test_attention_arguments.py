"""Soft caps and sinks through all passes: in the ring, over whole keys, and whole on every rank."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor, fx, nn

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.dump.python_view import python_view
from ringcompile.dump.report import attention_of
from ringcompile.ir.calls import Call
from ringcompile.ir.printer import print_program
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.options import Options
from ringcompile.pass_list import front_passes, rank_passes
from ringcompile.passes.base import Pipeline
from tests.support import difference, run

HEADS, DIM, MEMORY = 3, 4, 7
SCALE, CAP = 1.25, 1.5
Mask = Callable[[Tensor], Tensor | None]


def split(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], HEADS, DIM).transpose(1, 2)


def dense(
    q: Tensor, k: Tensor, v: Tensor, key_mask: None, mask: Tensor | None, sink: Tensor | None, *,
    scale: float, softcap: float | None = None, lower: int | None = None,
) -> Tensor:
    """What the op means, with all scores in memory."""
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if lower is not None:
        scores = scores + torch.full(scores.shape[2:], -math.inf).triu(1 - lower)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if sink is None:
        return scores.softmax(-1) @ v
    column = sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


class Attend(nn.Module):
    """Attention over [B,S,12] with learned sinks; over a fixed memory where `memory` says so."""

    def __init__(self, mask: Mask, memory: str = "", lower: int | None = None) -> None:
        super().__init__()
        self.attention: Callable[..., Tensor] = op("attention")
        self.mask, self.memory, self.lower = mask, memory, lower
        self.sink = nn.Parameter(torch.tensor([-1.0, 0.5, 2.0]))
        self.fixed = nn.Parameter(torch.randn(1, MEMORY, HEADS * DIM))

    def forward(self, x: Tensor) -> Tensor:
        fixed = self.fixed.expand(x.shape[0], -1, -1)
        q = fixed if self.memory == "whole" else x
        k = fixed if self.memory else x
        out = self.attention(
            split(q), split(k.sin()), split(k - 1), None, self.mask(x), self.sink, scale=SCALE,
            softcap=CAP, lower=self.lower,
        )  # fmt: skip
        out = out.transpose(1, 2).flatten(2)
        return x + out.mean(1, keepdim=True) if self.memory == "whole" else out


def order(x: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(x.shape[1])
    return at[:, None], at[None, :]


def causal(x: Tensor) -> Tensor:
    query, key = order(x)
    return (key <= query)[None, None]


def window_and_padding(x: Tensor) -> Tensor:
    query, key = order(x)
    return (key <= query) & (query - key < 5) & (x[:, :, 0] > -1)[:, None, None, :]


def distance(x: Tensor) -> Tensor:
    query, key = order(x)
    return (query - key).abs()[None, None] * -0.1


def distance_and_causal(x: Tensor) -> Tensor:
    return distance(x) + torch.where(causal(x), 0.0, -math.inf)


def nothing(x: Tensor) -> None:
    return None


@dataclass(frozen=True)
class Case:
    mask: Mask
    says: str
    memory: str = ""
    lower: int | None = None


def without_kind(mask: str) -> str:
    """What is left over of a mask, without the word for what it is."""
    return re.sub(r"[a-z ]+ (?=f32\[)", " ", mask)


SINK = f"soft cap {CAP} + sink"
CASES = {
    "full": Case(nothing, f"full + {SINK}"),
    "causal by flag": Case(nothing, f"causal + {SINK}", lower=0),
    "causal by mask": Case(causal, f"causal + {SINK}"),
    "window and padding": Case(window_and_padding, f"causal window 5 + key mask + {SINK}"),
    "bias": Case(distance, f"full + f32[1, 1, s/ring, s] + {SINK}"),
    "bias and causal": Case(distance_and_causal, f"causal + f32[1, 1, s/ring, s] + {SINK}"),
    "over a memory": Case(nothing, f"full + {SINK}", memory="keys"),
    "of a memory": Case(nothing, f"full + {SINK}", memory="whole"),
}
cases = pytest.mark.parametrize("name", CASES)


@lru_cache
def captured(name: str) -> tuple[Attend, Program]:
    case = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = Attend(case.mask, case.memory, case.lower).eval()
        return module, capture(module, (torch.randn(2, 13, HEADS * DIM),))


@pytest.mark.parametrize("placed", ["contiguous", "zigzag"])
@cases
def test_numbers(name: str, placed: str) -> None:
    module, program = captured(name)
    parallel = transform(program, "ring=4", order=placed)
    [report] = attention_of(parallel.program)
    assert without_kind(report.mask) == CASES[name].says
    x = torch.randn(2, 22, HEADS * DIM)
    module.attention = dense
    with torch.no_grad():
        expected = module(x)
    assert difference(run(parallel, (x,)).outputs, expected) < 2e-6


def takers(program: Program, argument: str) -> Iterator[fx.Node]:
    """The calls of our ops that have such an argument."""
    for node in program.graph.nodes:
        if str(node.target).startswith("ringcompile.") and argument in Call(node).arguments:
            yield node


@cases
def test_every_pass_carries_them(name: str) -> None:
    program = captured(name)[1]
    mesh = Mesh.parse("ring=3")
    for step in [*front_passes(mesh, Options(order="zigzag")), *rank_passes(1, mesh)]:
        program = Pipeline([step]).run(program)
        assert {Call(node)["softcap"] for node in takers(program, "softcap")} == {CAP}, step.name
        [taker] = takers(program, "sink")
        assert Call(taker)["sink"] is not None, step.name


def test_they_are_told_in_dumps() -> None:
    program = transform(captured("causal by flag")[1], "ring=2")
    text, view = print_program(program.program), python_view(program.rank(1))
    assert "ring.attention(" in text
    assert "softcap=1.5 causal" in text
    assert "sink=@sink" in text
    assert "softcap    the bound c of scores" in text
    assert "sink       one more score for every query head" in text
    assert "softcap=1.5" in view
    assert 'sink=weights["sink"]' in view
