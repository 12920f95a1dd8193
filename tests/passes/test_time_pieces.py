"""Pieces in time that are divided over ranks: which positions those are, and what ranks compute."""

from __future__ import annotations

from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn

from ringcompile import artifact
from ringcompile.artifact.graph import program_from_json
from ringcompile.capture.export import capture
from ringcompile.compiler import check, transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import SHIFT
from ringcompile.ir.program import Program
from ringcompile.ir.serialize import program_to_json
from ringcompile.ir.types import SequenceSplit
from ringcompile.models import zoo
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.launcher import LocalRanks
from tests.passes.test_unroll import Crossing, Masked, Rows
from tests.support import TOLERANCE, difference, run, zoo_program


@cache
def captured(name: str) -> Program:
    return zoo_program(name, sequence=24)


def made(name: str, spec: str, **options: object) -> ParallelProgram:
    return transform(captured(name), spec, **options)  # type: ignore[arg-type]


# -- which positions --------------------------------------------------------------------------

AXES = [
    (("time", 3),), (("time", 2), ("ring", 3)), (("time", 3), ("ring", 2), ("ulysses", 2)),
    (("time", 2), ("ring", 2), ("ep", 3), ("tp", 2)), (("ring", 3), ("ulysses", 2)),
]


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("axes", AXES, ids=lambda axes: ",".join(f"{a}={n}" for a, n in axes))
def test_every_chunk_lies_on_one_rank_in_one_piece(
    axes: tuple[tuple[str, int], ...], order: str
) -> None:
    split = SequenceSplit(axes, order)
    held = [split.chunks(rank) for rank in range(split.num_ranks)]
    assert sorted(chain(*held)) == list(range(split.num_chunks))
    ranks, pieces = split.unrolled(), split.num_pieces
    each = split.num_chunks // pieces
    for rank in range(ranks.num_ranks):
        whole = ranks.chunks(rank)
        assert whole == tuple(chain(*(held[t * ranks.num_ranks + rank] for t in range(pieces))))
        of_pieces = [index // each for index in whole]
        assert of_pieces == sorted(of_pieces)  # piece by piece
    assert sorted(chain(*(ranks.chunks(r) for r in range(ranks.num_ranks)))) == sorted(chain(*held))


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("axes", AXES, ids=lambda axes: ",".join(f"{a}={n}" for a, n in axes))
def test_a_level_holds_what_its_ranks_hold_side_by_side(
    axes: tuple[tuple[str, int], ...], order: str
) -> None:
    """So that a gather along the inner axes is a plain concatenation; one row is one chunk here."""
    split = SequenceSplit(axes, order)
    for kept in range(1, len(axes)):
        level = split.level(split.names[:kept])
        below = split.num_ranks // level.num_ranks
        fine = below * split.chunks_per_piece // level.chunks_per_piece  # of a level's chunk
        for rank in range(level.num_ranks):
            rows = [c * fine + i for c in level.chunks(rank) for i in range(fine)]
            parts = chain(*(split.chunks(rank * below + i) for i in range(below)))
            assert rows == list(parts)
        assert level.local_length(50) == split.local_length(50) * below


# -- the same numbers -------------------------------------------------------------------------

FAST = [
    ("dense-4l-tiny", "ring=4,time=2", {"order": "zigzag"}),
    ("dense-4l-tiny", "time=3,ring=2,ulysses=2", {"order": "contiguous"}),
    ("llama-tiny", "pp=2,ring=2,time=2", {}),
]
SLOW = [
    (name, spec, options)
    for name in ("moe-4l-tiny", "dense-4l-tiny", "llama-tiny", "mixtral-tiny", "bert-tiny")
    for spec in ("ring=4,time=2", "pp=2,ring=2,time=2", "time=2,ulysses=2", "dp=2,ring=2,time=3",
                 "time=2,ep=2", "time=2,ring=2,ep=2", "time=2,ring=2,tp=2")
    for options in ({"order": "zigzag"}, {"order": "contiguous", "ring": "gather"},
                    {"order": "zigzag", "ring": "gather", "tp_sequence": True})
]


@pytest.mark.parametrize(
    ("name", "spec", "options"), [*FAST, *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW)],
    ids=str,
)
def test_pieces_over_ranks_give_the_models_numbers(
    name: str, spec: str, options: dict[str, object]
) -> None:
    parallel = made(name, spec, **options)
    for length in (48, 37, 3):
        module, inputs = zoo.build(name, sequence=length)
        given = tuple(x.repeat(parallel.mesh.size("dp"), *[1] * (x.dim() - 1)) for x in inputs)
        with torch.no_grad():
            assert difference(run(parallel, given).outputs, module(*given)) <= TOLERANCE


class Window(nn.Module):
    """A query sees its own position and some before it, of which it may leave out the nearest."""

    def __init__(self, nearest: int, width: int) -> None:
        super().__init__()
        self.nearest, self.width = nearest, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place, x = torch.arange(x.shape[1]), x.unflatten(-1, (2, 8)).transpose(1, 2)
        apart = place[:, None] - place
        seen = (apart >= self.nearest) & (apart < self.width) | (apart == 0)
        return nn.functional.scaled_dot_product_attention(x, x, x, seen).transpose(1, 2).flatten(2)


@cache
def windowed(nearest: int, width: int) -> tuple[nn.Module, Program]:
    module = Window(nearest, width)
    return module, capture(module, (torch.randn(1, 24, 16),))


@pytest.mark.parametrize("length", [None, 48])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("nearest", "width"), [(0, 4), (0, 10), (0, 30), (7, 20)])
def test_windows_reach_over_pieces_and_ranks(
    nearest: int, width: int, order: str, length: int | None
) -> None:
    """In zigzag order also what a rank sees of a block may be chunks that are apart in it."""
    module, program = windowed(nearest, width)
    parallel = transform(program, "time=3,ring=3", order=order, length=length)
    for tokens in (48,) if length else (48, 31):
        given = torch.randn(1, tokens, 16)
        assert difference(run(parallel, (given,)).outputs, module(given)) <= TOLERANCE


@cache
def needing(kind: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], Program]:
    """A module that needs all tokens, its inputs, and what it is captured as."""
    torch.manual_seed(0)
    x, keep = torch.randn(1, 37, 16), torch.ones(1, 37, dtype=torch.int64)
    keep[:, 30:] = 0
    module: nn.Module = {"stages": Crossing, "masked": Masked}.get(kind, Rows)()
    module.causal = kind == "causal rows"  # type: ignore[assignment]
    inputs = (x, keep) if kind == "masked" else (x,)
    return module, inputs, capture(module.eval(), inputs)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("kind", ["rows", "causal rows", "stages", "masked"])
def test_what_needs_all_tokens_has_them(kind: str, order: str) -> None:
    """Means, running sums, values that cross to a stage, masks by key: over ranks and pieces."""
    module, inputs, program = needing(kind)
    spec = "pp=2,ring=2,time=2" if kind == "stages" else "time=2,ring=2,ulysses=2"
    parallel = transform(program, spec, order=order)
    with torch.no_grad():
        assert difference(run(parallel, inputs).outputs, module(*inputs)) <= TOLERANCE


# -- how it is written ------------------------------------------------------------------------


def test_pieces_take_turns_so_that_keys_travel_while_another_piece_computes() -> None:
    program = made("dense-4l-tiny", "ring=4,time=2").rank(1)
    starts = [str(node.kwargs["of"]) for node in program.graph.nodes if str(node.target) == SHIFT]
    turns = [name.rpartition("_t")[2] for name in dict.fromkeys(starts)]
    assert turns == ["0", "1"] * 4  # by layer, not by piece


def test_a_stage_finishes_a_piece_before_it_takes_up_the_next() -> None:
    program = made("dense-4l-tiny", "pp=2,ring=2,time=2").rank(0)
    starts = [node for node in program.graph.nodes if str(node.target) == SHIFT]
    turns = [str(n.kwargs["of"]).rpartition("_t")[2] for n in starts]
    assert turns == sorted(turns)
    assert [node.kwargs["axis"] for node in starts].count("pp") == 2


def test_keys_of_earlier_pieces_are_seen_in_one_call_without_a_mask() -> None:
    program = made("dense-4l-tiny", "ring=2,time=3", order="contiguous").rank(1)
    blocks = [(node.kwargs["queries"], node.kwargs["keys"]) for node in program.graph.nodes
              if "queries" in node.kwargs]
    assert blocks[: len(blocks) // 4] == [
        ([1], [1]), ([1], [0]),
        ([3], [3]), ([3], [1]), ([3], [2]), ([3], [0]),
        ([5], [5]), ([5], [1, 3]), ([5], [4]), ([5], [0, 2]),
    ]


def test_a_dump_says_what_pieces_are() -> None:
    parallel = made("dense-4l-tiny", "ring=2,time=2")
    text = " ".join(str(parallel.rank(1)).replace("//", "").split())
    assert "tokens that a rank holds of a piece: s, padded to a multiple of 8, over 2 ranks and 2" \
        in text
    assert "this rank holds 1 and 2 and 5 and 6" in text
    everyone = " ".join(str(parallel.program).replace("//", "").split())
    assert "each of every piece, to 1 other rank for each piece that sees it" in everyone
    report = check(captured("dense-4l-tiny"), "ring=2,time=2")
    assert {row.form for row in report.attention} == {"ring: keys and values rotate"}


@pytest.mark.slow  # test_parallel.py and generate/test_saved.py have processes among the fast ones
@torch.no_grad()
def test_processes_and_an_artifact(tmp_path: Path) -> None:
    parallel = made("dense-4l-tiny", "ring=2,time=2")
    parallel.save(tmp_path / "program")
    read = artifact.load(tmp_path / "program")
    assert [str(read.rank(rank)) for rank in range(2)] == [str(p) for p in parallel.ranks()]
    module, inputs = zoo.build("dense-4l-tiny", sequence=37)
    options = {"backend": "gloo", "threads": 1}
    with LocalRanks(artifact.load, (str(tmp_path / "program"),), **options) as ranks:
        found = ranks.run(inputs)
    assert difference(found.outputs, module(*inputs)) <= TOLERANCE


def test_a_file_with_other_pieces_is_refused() -> None:
    program = made("dense-4l-tiny", "ring=2,time=2").rank(0)
    data = program_to_json(program)
    allowed = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    data["sequence"]["pieces"] = 3
    with pytest.raises(RingCompileError, match="has 3 pieces in time, but the mesh is ring=2"):
        program_from_json(data, allowed)
