"""`run --check`: ranks say what they are about to exchange, and both sides are named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ringcompile import artifact
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.models import zoo
from ringcompile.runtime.launcher import LocalRanks, launch
from ringcompile.runtime.runner import Settings
from ringcompile.runtime.stamps import Stamp
from tests.runtime import checked_ranks
from tests.runtime.checked_ranks import CASES
from tests.support import zoo_program

PART = r"error: rank \d and rank \d differ in exchange {} between them along 'ring': "
HINT = (
    "\n  hint: their programs do not fit together: run `ringcompile verify`, or transform the "
    "model again"
)
SAID = {
    "a shorter message": (
        1, "message of float32 [3] of chunks [0] for %k in %a (layers.a, models/a.py:7)",
        "message of float32 [2] of chunks [0] for %k in %b (layers.b, models/b.py:7)",
    ),
    "another dtype of as many bytes": (1, "message of float16 [4]", "message of bfloat16 [4]"),
    "values for keys": (1, "for %k in %a", "for %v in %b"),
    "another chunk": (1, "of chunks [0]", "of chunks [1]"),
    "two messages swapped": (1, "for %k in %a", "for %v in %b"),
    "a message nobody takes": (1, "message of float32 [3]",
                               "all_reduce of float32 [3] in %x (layers.x, models/x.py:7)"),
    "another shape": (1, "all_reduce of float32 [4] in %x (layers.x, models/x.py:7)",
                      "all_reduce of float32 [2] in %x (layers.x, models/x.py:7)"),
    "another collective": (1, "all_reduce of float32 [3]", "gather of float32 [3]"),
    "another dim": (1, "gather of float32 [3] along dim 0", "gather of float32 [3] along dim 1"),
    "two collectives swapped": (1, "all_reduce of float32 [3] in %x",
                                "all_reduce of float32 [3] in %y"),
    "one collective left out": (2, "all_reduce of float32 [3] in %y (layers.y, models/y.py:7)",
                                "the end of its program"),
    "one collective doubled": (2, "the end of its program", "all_reduce of float32 [3] in %x"),
    "a message for a collective": (1, "message of float32 [3]", "all_reduce of float32 [3]"),
    "fewer rows than announced": (1, "dispatch of float32 [3, 2] in %y",
                                  "dispatch of float32 [2, 2] in %y"),
}


FEW = ("alike", "a shorter message", "one collective left out", "fewer rows than announced")


@pytest.mark.parametrize(
    "case", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n not in FEW)])
def test_both_sides_are_named(case: str) -> None:
    if case == "alike":
        launch(checked_ranks.act, 2, (case,), threads=1, timeout=60)
        return
    with pytest.raises(RingCompileError) as caught:
        launch(checked_ranks.act, 2, (case,), threads=1, timeout=60)
    text, (count, *sides) = str(caught.value), SAID[case]
    assert re.search(PART.format(count), text), text
    for rank, side in enumerate(sides):
        assert re.search(rf"rank {rank} (is )?at [^%]*{re.escape(side)}", text), text
    assert text.endswith(HINT)
    where = re.match(r"models/(\w).py:7: error", text)
    assert where
    assert f"\n  node: %{where[1]}\n  layer: layers.{where[1]}\n  hint: " in text


def test_messages_keep_their_numbers_in_any_order() -> None:
    found = launch(checked_ranks.out_of_order, 2, threads=1, timeout=60)
    assert found == [([12.0, 10.0, 11.0], 36), ([2.0, 0.0, 1.0], 36)]


@pytest.mark.parametrize(
    "stamp",
    [
        Stamp("end"),
        Stamp("gather", "float32 [1]", "n", SourceLocation("é" * 500 + ".py", 3, "a\nb")),
        Stamp("message", "x" * 900, "\N{OGHAM SPACE MARK}" * 900, SourceLocation("\ud800", 1)),
    ],
)
def test_a_stamp_is_always_as_long(stamp: Stamp) -> None:
    data = stamp.to_tensor()
    assert data.shape == Stamp("end").to_tensor().shape
    assert Stamp.from_tensor(data).fits(Stamp.from_tensor(stamp.to_tensor()))
    assert Stamp.from_tensor(data).location.line == stamp.location.line


@pytest.mark.parametrize(
    ("name", "spec", "sequence"),
    [("llama-tiny", "ring=2", 13),
     *(pytest.param(*row, marks=pytest.mark.slow) for row in (
         ("gpt-tiny", "pp=2,tp=2", 16), ("llama-tiny", "ring=4", 40),
         ("moe-4l-tiny", "ring=2,tp=2", 24),
         ("moe-4l-tiny", "ring=2,ep=2", 24), ("llama-tiny", "ulysses=2,ring=2", 24),
         ("llama-tiny", "dp=2,ring=2", 16), ("llama-tiny", "pp=2,time=4", 32)))],
)
def test_programs_that_fit_give_the_same_numbers(
    name: str, spec: str, sequence: int, tmp_path: Path
) -> None:
    parallel = transform(zoo_program(name), spec)
    parallel.save(tmp_path / "out")
    batch = parallel.mesh.size("dp") * parallel.mesh.size("pp")
    _, inputs = zoo.build(name, sequence=sequence, seed=3, batch=batch)
    runs = []
    for check in (False, True):
        with LocalRanks(
            artifact.load, (tmp_path / "out",), backend="gloo", threads=1,
            settings=Settings(check_finite=check),
        ) as ranks:
            runs += [ranks.run(inputs), ranks.run(inputs)]
    for other in runs[1:]:
        assert torch.equal(other.outputs, runs[0].outputs)
        assert [s.bytes_sent for s in other.stats] == [s.bytes_sent for s in runs[0].stats]


def test_a_collective_that_one_rank_leaves_out(tmp_path: Path) -> None:
    """The types still fit; without the check rank 0 would wait, or take the next sum for it."""
    transform(zoo_program("llama-tiny"), "tp=2").save(tmp_path / "out")
    _, inputs = zoo.build("llama-tiny", sequence=8)
    arguments = (str(tmp_path / "out"), inputs)
    with pytest.raises(RingCompileError) as caught:
        launch(checked_ranks.run_with_one_sum_less, 2, arguments, threads=1, timeout=60)
    text = str(caught.value)
    assert re.search(r"^\S+models/transformer\.py:\d+: error: rank \d and rank \d differ in "
                     r"exchange "
                     r"\d+ between them along 'tp': ", text), text
    assert re.search(r"all_reduce of float32 \[1, 8, 96\] in %all_reduce\w*"
                     r" \(blocks\.1\S*, \S+models/transformer\.py:\d+\)", text), text
    assert "the end of its program" in text
