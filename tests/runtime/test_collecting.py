"""Outputs of a job, put together from what its ranks send: they are right, and not held twice."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import ringcompile as rc
from ringcompile.ir.program import Program
from ringcompile.models import zoo
from ringcompile.runtime.collecting import _cut_dim
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.launcher import launch
from ringcompile.runtime.outputs import Kept
from tests.runtime import rank_functions
from tests.support import tensors

LENGTH = 29  # not a multiple of any number of ranks here: the last share is padded


class Odd(nn.Module):
    """Outputs of many forms: batch and tokens in one dim, without a dim, of other dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.w = nn.Embedding(50, 16), nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor) -> dict[str, Any]:
        x = self.embed(ids)
        q = self.w(x).unsqueeze(1)
        h = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)
        return {
            "rows": h.flatten(0, 1), "one": self.w.bias.sum(), "signs": h > 0,
            "half": h.bfloat16(), "best": h.argmax(-1), "pooled": h.mean(1),
        }


def odd(batch: int, length: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return Odd().eval(), (torch.arange(batch * length).reshape(batch, length) % 50,)


def built(name: str, batch: int, length: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return odd(batch, length) if name == "odd" else zoo.build(name, batch=batch, sequence=length)


@cache
def captured(name: str) -> Program:
    return rc.capture(*built(name, 2, 24))


CASES = [
    ("llama-tiny", "ring=4", None, 1), ("llama-tiny", "ring=2,tp=2", 11, 2),
    ("llama-tiny", "dp=2,tp=2", None, 3), ("llama-tiny", "dp=2,pp=2", 3, 3),
    ("odd", "ring=4", None, 2), ("odd", "dp=2,ring=2", None, 3), ("odd", "tp=4", None, 2),
]


def test_outputs_are_those_of_one_process(tmp_path: Path) -> None:
    """Of a job of four ranks: on rank 0 alone, and on every rank; bit by bit."""
    cases, expected = [], []
    for number, (name, spec, last, batch) in enumerate(CASES):
        parallel = rc.transform(captured(name), spec)
        given = built(name, batch, LENGTH)[1]
        parallel.save(tmp_path / str(number))
        cases.append((str(tmp_path / str(number)), given, last))
        done = run_lockstep(
            parallel.ranks(), parallel.mesh, parallel.source, given, keep=Kept(last)
        )
        expected.append(tensors(done.outputs))
    ranks = launch(rank_functions.assembled_in_pieces, 4, (cases,), threads=1)
    for number, wanted in enumerate(expected):
        on_zero = [rank[number][0] for rank in ranks]
        assert on_zero[1:] == [None] * 3
        for found in (on_zero[0], *(rank[number][1] for rank in ranks)):
            for one, other in zip(pytree.tree_leaves(found), wanted, strict=True):
                assert torch.equal(one, other), CASES[number]
        pieces = max(rank[number][2] for rank in ranks)
        assert pieces > 4 or (CASES[number][1] == "tp=4" and not pieces)  # all have it whole


def test_pieces_are_cut_where_they_are_small() -> None:
    """Two sequences of 400 MB: along the tokens, and not along the batch."""
    assert _cut_dim((2, 4096, 50_000), torch.float16, [0, 1, 2]) == 1
    assert _cut_dim((1, 4096, 50_000), torch.float16, [0, 2]) == 2
    assert _cut_dim((8, 4), torch.float32, [0, 1]) == 0
    assert _cut_dim((), torch.float32, []) is None
    assert _cut_dim((1 << 30, 2), torch.float32, [1]) == 1  # none is small: the longest there is


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
@pytest.mark.parametrize("spec", ["ring=2", pytest.param("dp=2", marks=pytest.mark.slow),
                                  pytest.param("pp=2", marks=pytest.mark.slow)])
def test_whole_outputs_take_no_more_than_their_own_memory(spec: str, tmp_path: Path) -> None:
    """Beside the shares, which ranks have anyway: rank 0 took 2.5 times as much."""
    module = rank_functions.Wide()
    rc.transform(rc.capture(module, (torch.randn(2, 24, 4),)), spec).save(tmp_path / "out")
    arguments = (str(tmp_path / "out"), torch.randn(2, 1024, 4))
    found = launch(rank_functions.memory_of_whole, 2, arguments, threads=1)
    ratio, num_bytes = found[0]
    assert num_bytes > 100e6
    assert ratio < 1.2
