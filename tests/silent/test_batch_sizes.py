"""Batches, capacities and hidden rows in modules that are no transformers: right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from tests.silent.small import CAPTURED, EXACT, Model, ids
from tests.support import difference, run, some_fast

Tensor = torch.Tensor
Between = Callable[[Any, Tensor, Tensor], Tensor]


def low(x: Tensor) -> float:
    return torch.finfo(x.dtype).min


def rows_of_padding(m: Any, x: Tensor, t: Tensor) -> Tensor:
    scores = m.up(x) @ m.up(x).mT
    mask = torch.zeros_like(scores).masked_fill((t < 30)[:, None], low(x))
    return (scores + mask).softmax(-1) @ x


def two_sides(m: Any, x: Tensor, t: Tensor) -> Tensor:
    hidden = torch.full((x.shape[1], x.shape[1]), low(x), dtype=x.dtype)
    return (x @ x.mT + (hidden.triu(1) + hidden.tril(-4)).clamp(min=low(x))).softmax(-1) @ x


def slots_of_a_sequence(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return x * (torch.ones_like(t).cumsum(1) <= 20)[..., None]


def repeated_if_several(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return x + m.up.weight[:1, None, :].repeat(x.shape[0] if x.shape[0] > 1 else 1, 1, 1)


def slots_of_the_batch(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return x * (t.flatten().cumsum(0) < 300).reshape(t.shape)[..., None]


def ranks_in_the_batch(m: Any, x: Tensor, t: Tensor) -> Tensor:
    rank = x.norm(dim=-1).flatten().argsort().argsort()
    return x * (rank < 10).reshape(t.shape)[..., None]


def the_next_sequence(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 1, 0))[:-1]


APART: dict[str, Between] = {
    "rows of padding": rows_of_padding, "two sides": two_sides,
    "slots of a sequence": slots_of_a_sequence, "repeated if several": repeated_if_several,
    "at least two": lambda m, x, t: x / max(x.shape[0], 2),
}
MIXED: dict[str, Between] = {
    "slots of the batch": slots_of_the_batch, "ranks in the batch": ranks_in_the_batch,
    "the next sequence": the_next_sequence,
}


@pytest.mark.parametrize("captured", [1, 2])
@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast({**APART, **MIXED}, ["ring=4", "pp=2", "dp=2"], fast=lambda kind, spec: (kind, spec)
              in {("rows of padding", "ring=4"), ("slots of the batch", "pp=2")}),
)
def test_right_or_refused(kind: str, spec: str, captured: int) -> None:
    module = Model({**APART, **MIXED}[kind])
    program = capture(module, (ids(CAPTURED, captured),))
    if spec == "dp=2" and kind in MIXED:
        with pytest.raises(RingCompileError, match="this mixes the sequences of a batch"):
            transform(program, spec)
        return
    parallel = transform(program, spec)
    for batch in (2, 4) if spec == "dp=2" else (1, 2, 4):
        with torch.no_grad():
            expected = module(ids(27, batch))
        assert difference(run(parallel, (ids(27, batch),)).outputs, expected) <= EXACT
