"""What a run keeps: whole outputs, the last positions, a summary by rank, or each rank's share."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ringcompile as rc
from ringcompile import artifact
from ringcompile.ir.program import Program
from ringcompile.models import zoo
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.launcher import LocalRanks
from ringcompile.runtime.outputs import Kept, Summary, combined, shape_of
from ringcompile.runtime.tail import last_positions, take_rows
from tests.support import difference, tensors, zoo_program

LENGTH = 29  # not a multiple of any number of ranks here: the last share is padded
CASES = [
    ("llama-tiny", "ring=4"), ("llama-tiny", "ring=2,tp=2"), ("llama-tiny", "pp=2,time=4"),
    ("llama-tiny", "dp=2"), ("bert-tiny", "ulysses=2,tp=2"), ("moe-4l-tiny", "pp=2,ring=2"),
]


def captured(name: str) -> Program:
    return zoo_program(name, name, sequence=24)


@lru_cache
def made(name: str, spec: str) -> ParallelProgram:
    return rc.transform(captured(name), spec)


def inputs_for(name: str, spec: str) -> tuple[torch.Tensor, ...]:
    return zoo.build(name, sequence=LENGTH, batch=2 if "dp" in spec else 1)[1]


def rows(whole: torch.Tensor, last: int) -> torch.Tensor:
    return whole[:, -last:] if whole.dim() == 3 else whole


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_last_positions_and_summaries(name: str, spec: str) -> None:
    """They are rows, and means, of what a whole run gives; a pooled output stays as it is."""
    parallel, given = made(name, spec), inputs_for(name, spec)
    whole = tensors(rc.run(parallel, given))
    for last in (1, 11, 1000, None):
        keep = Kept(last, summary=True)
        done = run_lockstep(parallel.ranks(), parallel.mesh, parallel.source, given, keep=keep)
        expected = whole if last is None else [rows(tensor, last) for tensor in whole]
        assert difference(done.outputs, expected) < 2e-6, last
        program = parallel.rank(parallel.world_size - 1)
        found = combined(program, done.summaries)
        for i, (summary, tensor) in enumerate(zip(found, expected, strict=True)):
            shape = shape_of(program, i, done.dealt.lengths, last)
            assert shape == list(tensor.shape)
            assert summary.count == tensor.numel()
            assert summary.mean == pytest.approx(float(tensor.double().mean()), abs=1e-6)
            assert summary.largest == pytest.approx(float(tensor.abs().max()), rel=1e-5)


def test_the_head_runs_on_the_last_positions_alone() -> None:
    """No rank multiplies more rows by the head than it holds of those that are asked for.

    Zigzag over 4 ranks: positions 26 and 27 are in chunk 6 of 8, and 28 in the last.
    """
    parallel = made("llama-tiny", "ring=4")
    seen = []
    for program in parallel.ranks():
        lengths = program.checked(program.sequence.bindings({"s": LENGTH}))
        found = last_positions(program, lengths, 3)
        taken = [node for node in found.graph.nodes if node.target is take_rows]
        seen.append({sum(map(len, node.args[2])) for node in taken})
        head = found.outputs[0]
        assert all("rms_norm" in str(operand.target) for operand in head.args[:1])
    assert sorted(count for counts in seen for count in counts) == [0, 0, 1, 2]


class Cumulative(nn.Module):
    """What is added up along the sequence must not be added up over its last positions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        q = self.w(x).unsqueeze(1)
        h = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)
        return {"sums": self.w(h).cumsum(1), "flat": h.flatten(1), "scores": h @ h.mT}


@pytest.mark.parametrize("spec", ["ring=2", "tp=2"])
def test_ops_that_look_along_the_sequence_are_left_alone(spec: str) -> None:
    class Sums(Cumulative):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x)["sums"]

    module, x = Sums().eval(), torch.randn(1, 19, 8)
    parallel = rc.transform(rc.capture(module, (x,)), spec)
    assert difference(rc.run(parallel, (x,), last=4), module(x).detach()[:, -4:]) < 2e-6


def test_an_output_whose_positions_are_no_piece_of_it_is_refused() -> None:
    class Flat(Cumulative):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x)["flat"]

    x = torch.randn(1, 19, 8)
    parallel = rc.transform(rc.capture(Flat().eval(), (x,)), "ring=2")
    assert rc.run(parallel, (x,)).shape == (1, 152)
    with pytest.raises(rc.RingCompileError, match="no dim that is the sequence alone") as raised:
        rc.run(parallel, (x,), last=1)
    assert raised.value.hint == "leave out --last (`last=` in Python)"


@pytest.mark.parametrize("last", [None, 5])
@pytest.mark.parametrize("spec", ["ring=2,tp=2", "pp=2"])
def test_ranks_may_keep_their_shares(spec: str, last: int | None) -> None:
    parallel, given = made("llama-tiny", spec), inputs_for("llama-tiny", spec)
    whole = rc.run(parallel, given)
    shares = rc.run(parallel, given, outputs="local", last=last)
    assert [share.rank for share in shares] == list(range(parallel.world_size))
    covered = set()
    for share in shares:
        if isinstance(share.outputs, tuple):  # a stage that returns nothing
            assert spec == "pp=2"
            assert share.rank == 0
            continue
        at = torch.arange(LENGTH) if share.positions is None else share.positions
        real = at < LENGTH
        features = whole.shape[2] // parallel.mesh.size("tp")
        first = share.rank % parallel.mesh.size("tp") * features
        expected = whole[:, at[real], first : first + features]
        assert difference(share.outputs[:, real], expected) < 2e-6 if int(real.sum()) else True
        covered.update(at[real].tolist())
    assert covered == set(range(LENGTH)[-(last or LENGTH):])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "mpi"}, "unknown backend 'mpi'"),
        ({"outputs": "some"}, "unknown form of outputs 'some'"),
        ({"last": 0}, "last=0: it must be at least 1"),
    ],
)
def test_what_run_does_not_take(options: dict[str, Any], message: str) -> None:
    with pytest.raises(rc.RingCompileError, match=message):
        rc.run(made("llama-tiny", "ring=4"), inputs_for("llama-tiny", "ring=4"), **options)


def test_summaries_add_up() -> None:
    some, more = Summary(2, 3.0, 0.0, 2.0), Summary(1, 1.5, 0.0, 4.0)
    assert some + more == Summary(3, 4.5, 0.0, 4.0)
    assert math.isnan((some + Summary(1, math.nan, 0.0, math.nan)).largest)
    assert math.isnan(Summary().mean)
    assert Summary(2, 2.0, 4.0, 3.0).mean == 1 + 2j


class Wide(nn.Module):
    """Far more logits than anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16000, 32), nn.Linear(32, 16000, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q = x.unsqueeze(1)
        return self.head(nn.functional.scaled_dot_product_attention(q, q, q).squeeze(1))


@pytest.mark.slow
def test_a_run_takes_little_more_memory_than_its_program(tmp_path: Path) -> None:
    """4,096 x 16,000 logits on two ranks: what is added up takes a few MB beside them."""
    program = rc.capture(Wide().eval(), (torch.zeros(1, 24, dtype=torch.int64),))
    rc.transform(program, "ring=2").save(tmp_path / "out")
    peaks = []
    for keep in (Kept(outputs=False), Kept(outputs=False, summary=True)):
        with LocalRanks(artifact.load, (tmp_path / "out",), backend="gloo") as ranks:
            run = ranks.run((torch.zeros(1, 4096, dtype=torch.int64),), keep=keep)
        assert run.outputs is None
        peaks.append(max(stats.peak_bytes for stats in run.stats))
    assert peaks[1] < 1.2 * peaks[0]
