"""Masks that differ from head to head go where the heads go, and no pass may lose one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import pytest
import torch
from torch import nn

from ringcompile.capture.export import capture
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.pass_list import front_passes, prepare, rank_passes
from ringcompile.passes.base import Builder, Pass, Pipeline
from tests.silent.small import CAPTURED, HEADS, Model, ids, matches, normal
from tests.support import some_fast

SPECS = ["ulysses=2", "ring=2,ulysses=2", "tp=2", "ulysses=2,tp=2", "ring=3", "ulysses=4"]
FAST = {
    ("[1,H,S,S]", "ring=2,ulysses=2"), ("[B,H,1,S]", "ulysses=2"), ("ALiBi", "ulysses=2"),
    ("boolean per head", "ulysses=2,tp=2"), ("minus infinity per head", "ring=2,ulysses=2"),
}

MASKS: dict[str, Callable[[int], torch.Tensor]] = {
    "[1,H,S,S]": lambda n: normal(1, HEADS, n, n) * 2,
    "[B,H,S,S]": lambda n: normal(2, HEADS, n, n) * 2,
    "[1,1,S,S]": lambda n: normal(1, 1, n, n) * 2,
    "[B,H,1,S]": lambda n: normal(2, HEADS, 1, n) * 2,
    "boolean per head": lambda n: (normal(1, HEADS, n, n) > 0) | torch.eye(n, dtype=torch.bool),
    "a window per head": lambda n: _distance(n) < torch.arange(1, 1 + HEADS)[:, None, None] * 3,
    "ALiBi": lambda n: -_distance(n).double() * 2.0 ** -torch.arange(HEADS)[:, None, None],
    "minus infinity per head": lambda n: torch.zeros(2, HEADS, n, n, dtype=torch.float64)
    .masked_fill(_distance(n) > torch.arange(1, 1 + HEADS)[:, None, None], -torch.inf),
}


def _distance(length: int) -> torch.Tensor:
    place = torch.arange(length)
    return (place[:, None] - place).abs()[None, None]


def with_mask(kind: str) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda n: (ids(n), MASKS[kind](n))


@pytest.mark.parametrize(
    ("kind", "spec"), some_fast(list(MASKS), SPECS, fast=lambda *case: case in FAST)
)
def test_a_mask_that_the_caller_passes(kind: str, spec: str) -> None:
    matches(Model(), spec, with_mask(kind))


@pytest.mark.parametrize(
    "spec",
    ["ulysses=2", *(pytest.param(spec, marks=pytest.mark.slow)
                    for spec in ("ulysses=4", "ring=2,ulysses=2,tp=2"))],
)
def test_grouped_key_heads(spec: str) -> None:
    matches(Model(groups=2), spec, with_mask("[B,H,S,S]"))


class PaddedWithBias(nn.Module):
    """A key mask and a bias of each head, joined in the model."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.model = Model()
        self.table = nn.Parameter(normal(HEADS, 31) * 2) if learned else None

    def forward(
        self, tokens: torch.Tensor, keep: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        hidden = torch.where(keep[:, None, None, :], 0.0, -torch.inf).to(bias.dtype)
        if self.table is not None:
            place = torch.arange(tokens.shape[1])
            bias = self.table[:, (place[:, None] - place).clamp(-15, 15) + 15][None]
        return self.model(tokens, bias + hidden)


@pytest.mark.parametrize(
    ("learned", "spec"),
    some_fast([True, False], SPECS[:4], fast=lambda learned, spec: spec == "ulysses=2,tp=2"),
)
def test_a_key_mask_beside_a_bias_of_each_head(spec: str, learned: bool) -> None:
    def inputs(n: int) -> tuple[torch.Tensor, ...]:
        keep = torch.ones(2, n, dtype=torch.bool)
        keep[0, :2] = False
        return ids(n), keep, MASKS["[1,H,S,S]"](n)

    matches(PaddedWithBias(learned), spec, inputs)


@dataclass(frozen=True)
class LosesMasks(Pass):
    """A faulty pass: attention without its mask."""

    name: ClassVar[str] = "loses-masks"
    where: str
    operand: str

    def run(self, program: Program) -> Program:
        builder = Builder()
        for node in program.graph.nodes:
            new = builder.env[node] = builder.copy(node)
            if node.target is op(self.where):
                place = [a.name for a in node.target._schema.arguments].index(self.operand)
                new.args = (*new.args[:place], None, *new.args[place + 1 :])
        return program.with_graph(builder.graph)


@cache
def masked() -> Program:
    return prepare(capture(Model(), with_mask("[1,H,S,S]")(CAPTURED)))


@pytest.mark.parametrize(
    ("spec", "where"),
    [("ulysses=2", "attention"), ("ring=2", "ring_attention"), ("ring=2", "block_attention"),
     ("ulysses=2,ring=2", "attend_merge"), ("time=2", "block_attention")],
)
def test_a_pass_that_loses_a_mask_is_found(spec: str, where: str) -> None:
    mesh = Mesh.parse(spec)
    program = masked()
    steps = [*front_passes(mesh), *rank_passes(0, mesh)]
    for step in steps:
        if step.name in program.passes:
            continue
        program = Pipeline([step]).run(program)
        if any(node.target is op(where) for node in program.graph.nodes):
            with pytest.raises(AssertionError, match=r"%\w+ has lost its mask"):
                Pipeline([LosesMasks(where, "mask")]).run(program)
            return
    pytest.fail(f"no {where} in any of {[step.name for step in steps]}")
