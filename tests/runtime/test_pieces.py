"""Shares in pieces: together they are what shares at once are, and outputs are not held twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ringcompile as rc
from ringcompile.models import zoo
from ringcompile.runtime import pieces
from ringcompile.runtime.batches import whole_outputs
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.outputs import Kept
from ringcompile.runtime.pieces import Pieces, in_pieces
from tests.support import difference, tensors, zoo_program

ROOT = Path(__file__).parents[2]
LENGTH = 29  # not a multiple of any number of ranks here: the last share is padded
MEMORY = """
import resource, torch
import ringcompile as rc

class Wide(torch.nn.Module):
    def forward(self, x):
        y = x.unsqueeze(1)
        y = torch.nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True).squeeze(1)
        return y.unsqueeze(-1).expand(-1, -1, -1, 4096) * 1.5

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

if __name__ == "__main__":
    parallel = rc.transform(rc.capture(Wide(), (torch.randn(1, 24, 4),)), "ring=2")
    with rc.Session(parallel, backend="gloo") as session:
        session.run(torch.randn(1, 64, 4))
        before = peak()
        made = session.run(torch.randn(1, 2048, 4))
        print((peak() - before) / made.nbytes, made.nbytes)
"""


@pytest.mark.parametrize(
    ("name", "spec", "last"),
    [("llama-tiny", "ring=4", None), ("llama-tiny", "ring=2,tp=2", 11),
     ("llama-tiny", "dp=2,tp=2", None), ("bert-tiny", "ulysses=2", None),
     ("moe-4l-tiny", "pp=2,ring=2", None)],
)
def test_pieces_give_the_same_outputs(
    name: str, spec: str, last: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_LEAST", 0)
    parallel = rc.transform(zoo_program(name, sequence=24), spec)
    given = zoo.build(name, sequence=LENGTH, batch=2)[1]
    done = run_lockstep(
        parallel.ranks(), parallel.mesh, parallel.source, given, keep=Kept(last)
    )
    handed = [
        tuple(in_pieces(shares, parallel.world_size) for shares in run.microbatches)
        for run in done.runs
    ]
    cut = [x for runs in handed for shares in runs for x in shares if isinstance(x, Pieces)]
    assert max(len(share.parts) for share in cut) > 1
    program = parallel.rank(parallel.world_size - 1)
    found = tensors(whole_outputs(program, handed, done.dealt, last))
    assert difference(found, tensors(done.outputs)) == 0
    assert any(not share.parts for share in cut)


def test_a_piece_is_let_go_when_the_next_is_taken() -> None:
    (share,) = in_pieces((torch.randn(3, 1 << 17),), 32)
    assert isinstance(share, Pieces)
    starts = []
    for start, part in share.taken():
        starts.append((start, len(share.parts)))
        assert part.is_shared()
    assert starts == [(0, 1), (2, 0)]


def test_small_shares_and_those_of_many_ranks_go_at_once() -> None:
    small, large = torch.randn(8, 8), torch.randn(4, 1 << 17)
    assert in_pieces((small,), 2) == (small,)
    assert in_pieces((large,), 64) == (large,)


@pytest.mark.slow  # test_collecting.py has a job that does not hold them twice among the fast ones
def test_whole_outputs_take_no_more_than_their_own_memory() -> None:
    """Of the process that puts them together: it held them twice when shares came at once."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=ROOT, text=True, capture_output=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200,
    )
    assert done.returncode == 0, done.stderr
    ratio, num_bytes = map(float, done.stdout.split())
    assert num_bytes > 100e6
    assert ratio < 1.2
