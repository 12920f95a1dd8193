"""Chunks in time: what a rank's program computes in which order, sends, and refuses."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from ringcompile import artifact
from ringcompile.capture.export import capture
from ringcompile.compiler import check, load, transform
from ringcompile.dump.python_view import python_view
from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import SHIFT, WAIT, bytes_sent
from ringcompile.ir.expr import bind
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh
from ringcompile.models import zoo
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.launcher import LocalRanks
from tests.support import TOLERANCE, difference, run, some_fast, zoo_program

LENGTH = 37


@cache
def captured(name: str) -> Program:
    return zoo_program(name, sequence=24)


def made(name: str, spec: str, **options: object) -> ParallelProgram:
    return transform(captured(name), spec, **options)  # type: ignore[arg-type]


def targets(program: Program) -> list[str]:
    return [str(node.target).split(".")[1] for node in program.graph.nodes
            if node.op == "call_function"]


def test_time_has_no_ranks() -> None:
    mesh = Mesh.parse("pp=2,time=4,tp=2")
    assert mesh.world_size == 4
    assert mesh.coordinates(3) == {"pp": 1, "tp": 1}
    assert mesh.rank({"pp": 1, "tp": 0}) == 2
    assert list(mesh.groups("tp")) == [[0, 1], [2, 3]]
    assert str(mesh) == "pp=2,time=4,tp=2"


def test_a_stage_sends_each_chunk_before_it_takes_up_the_next() -> None:
    first, second = made("dense-4l-tiny", "pp=2,time=4").ranks()
    found = targets(first)
    sends = [i for i, target in enumerate(found) if target == "shift_start"]
    assert len(sends) == 4
    products = [i for i, target in enumerate(found) if target == "linear"]
    each = len(products) // 4
    for chunk, send in enumerate(sends):  # the products of its chunk, and no others
        assert sum(place < send for place in products) == each * (chunk + 1)
    # The next stage asks for a chunk while it works on the one before, and sends nothing.
    found = targets(second)
    starts = [i for i, target in enumerate(found) if target == "shift_start"]
    waits = [i for i, target in enumerate(found) if target == "wait"]
    assert len(starts) == len(waits) == 4
    assert all(start < wait for start, wait in zip(starts[1:], waits, strict=False))


def test_that_a_chunk_was_sent_is_waited_for_when_the_next_is_sent() -> None:
    first = made("dense-4l-tiny", "pp=2,time=3").rank(0)
    exchanges = [str(n.target) for n in first.graph.nodes if str(n.target) in (SHIFT, WAIT)]
    assert exchanges == [SHIFT, WAIT, SHIFT, WAIT, SHIFT, WAIT]
    assert targets(first).index("wait") > targets(first).index("shift_start") + 10


def test_as_many_bytes_as_a_sequence_in_one_piece() -> None:
    at = {"s": 48, "n": 12, "b": 1, "k": 1}
    chunks = made("dense-4l-tiny", "pp=2,time=4").rank(0)
    whole = made("dense-4l-tiny", "pp=2").rank(0)
    assert bind(bytes_sent(chunks), at) == bind(bytes_sent(whole), at) == 48 * 64 * 4


def test_only_what_the_chunks_before_hold_is_attended_to() -> None:
    blocks = [node for node in made("dense-4l-tiny", "time=4").rank(0).graph.nodes
              if "queries" in node.kwargs]
    seen = {(*node.kwargs["queries"], *node.kwargs["keys"]) for node in blocks}
    assert seen == {(0, 0), (1, 1), (1, 0), (2, 2), (2, 0, 1), (3, 3), (3, 0, 1, 2)}


class Window(nn.Module):
    """A query sees its own position and the nine before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place, x = torch.arange(x.shape[1]), x.unflatten(-1, (2, 8)).transpose(1, 2)
        apart = place[:, None] - place
        seen = (apart >= 0) & (apart < 10)
        return nn.functional.scaled_dot_product_attention(x, x, x, seen).transpose(1, 2).flatten(2)


def test_chunks_out_of_a_windows_reach_are_left_out() -> None:
    program = capture(Window(), (torch.randn(1, 24, 16),))
    parallel = transform(program, "time=6", length=48)
    blocks = [n for n in parallel.rank(0).graph.nodes if "queries" in n.kwargs]
    reach = [max(n.kwargs["queries"]) - min(n.kwargs["keys"]) for n in blocks]
    assert max(reach) == 2  # the first query of a chunk sees 9 tokens back, over 8 of the last
    given = torch.randn(1, 48, 16)
    assert difference(run(parallel, (given,)).outputs, Window()(given)) <= TOLERANCE


def test_what_does_not_depend_on_time_is_computed_once() -> None:
    """A table that is learned, say: its product with a weight of its own."""
    found = targets(made("dense-4l-tiny", "time=4").rank(0))
    alone = targets(made("dense-4l-tiny", "tp=1").rank(0))
    assert found.count("linear") == 4 * alone.count("linear")


class Rows(nn.Module):
    """Rows that see each other both ways, a mean over all, and a running sum."""

    causal = False

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out = out.transpose(1, 2).flatten(2)
        if self.causal:
            return out + x
        return out + x.mean(1, keepdim=True) + x.cumsum(1) + x[:, -1:]


@pytest.mark.parametrize("length", [36, 37, 3])
def test_chunks_that_need_later_ones_wait_for_them(length: int) -> None:
    torch.manual_seed(0)
    module = Rows().eval()
    parallel = transform(capture(module, (torch.randn(1, 24, 16),)), "time=5")
    given = torch.randn(1, length, 16)
    found = run(parallel, (given,)).outputs
    with torch.no_grad():
        assert difference(found, module(given)) <= TOLERANCE


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("time=2", {"capacity": "local"}, "--capacity local cannot be combined with time"),
        ("pp=2,time=2", {"order": "zigzag"}, "order zigzag has no use along time alone"),
    ],
)
def test_what_is_refused(spec: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(RingCompileError, match=message) as caught:
        made("dense-4l-tiny", spec, **options)
    assert caught.value.hint


class Crossing(nn.Module):
    """Two layers; a mean over all tokens and a second tensor cross to the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Rows() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side, whole = torch.tanh(x), x.mean(1, keepdim=True)
        for layer in self.layers:
            x = layer(x)
        return x + side + whole


@pytest.mark.parametrize(
    ("count", "causal"),
    some_fast([2, 3, 4], [False, True], fast=lambda *case: case in ((3, False), (4, True))),
)
def test_several_values_cross_in_order(count: int, causal: bool) -> None:
    """Also where chunks wait for each other on their way, so that some might overtake."""
    torch.manual_seed(0)
    module = Crossing().eval()
    for layer in module.layers:
        layer.causal = causal
    parallel = transform(capture(module, (torch.randn(1, 24, 16),)), f"pp=2,time={count}")
    given = torch.randn(1, 37, 16)
    with torch.no_grad():
        assert difference(run(parallel, (given,)).outputs, module(given)) <= TOLERANCE


class Masked(nn.Module):
    """What a later chunk attends with is made behind what an earlier one waits for."""

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        q = x.unsqueeze(1)
        mean = x.mean(1, keepdim=True)
        out = nn.functional.scaled_dot_product_attention(q, q, q, keep[:, None, None, :].bool())
        return out.squeeze(1) + mean


def test_masks_behind_what_is_waited_for() -> None:
    x, keep = torch.randn(1, 24, 16), torch.ones(1, 24, dtype=torch.int64)
    keep[:, 20:] = 0
    parallel = transform(capture(Masked(), (x, keep)), "time=3")
    assert difference(run(parallel, (x, keep)).outputs, Masked()(x, keep)) <= TOLERANCE


@pytest.mark.parametrize(
    "name", ["dense-4l-tiny", pytest.param("moe-4l-tiny", marks=pytest.mark.slow)])
def test_an_artifact_computes_the_same_chunks(name: str, tmp_path: Path) -> None:
    parallel = made(name, "pp=2,time=4")
    parallel.save(tmp_path / "program")
    read = load(tmp_path / "program")
    module, inputs = zoo.build(name, sequence=LENGTH)
    found = run(read, inputs)
    with torch.no_grad():
        assert difference(found.outputs, module(*inputs)) <= TOLERANCE
    lengths = read.rank(0).bindings(dict(zip(["inputs"], inputs, strict=True)))
    assert lengths["n"] == 10  # 37 tokens in 4 chunks
    assert [str(p) for p in read.ranks()] == [str(p) for p in parallel.ranks()]


@pytest.mark.slow  # test_parallel.py has processes among the fast ones
@torch.no_grad()
def test_processes(tmp_path: Path) -> None:
    made("dense-4l-tiny", "pp=2,time=4").save(tmp_path / "program")
    module, inputs = zoo.build("dense-4l-tiny", sequence=LENGTH)
    options = {"backend": "gloo", "threads": 1}
    with LocalRanks(artifact.load, (str(tmp_path / "program"),), **options) as ranks:
        found = ranks.run(inputs)
    assert difference(found.outputs, module(*inputs)) <= TOLERANCE


def test_a_dump_says_what_n_is() -> None:
    parallel = made("dense-4l-tiny", "pp=2,time=4")
    text = " ".join(str(parallel.rank(0)).replace("//", "").split())
    assert "tokens of a piece: s, padded to a multiple of 4, over 4 pieces" in text
    assert "this rank has one after another" in text
    assert "n = -(-s // 4)" in python_view(parallel.rank(0))
    report = check(captured("dense-4l-tiny"), "time=4")
    assert report.supported
    assert report.gathers == ()
    assert {row.form for row in report.attention} == {
        "in time: keys and values of other pieces are already on the rank"}
