"""Spoilt artifacts are refused in one way, quickly, with nothing else opened; or mean the same."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ringcompile import compiler, execution
from ringcompile.errors import RingCompileError, SourceLocation
from tests.artifact.test_damage import resign
from tests.fuzz.case import artifact_of, judge
from tests.fuzz.pristine import RECIPES, pristine


@pytest.mark.parametrize(
    "first", [400, *(pytest.param(first, marks=pytest.mark.slow) for first in (350, 450))]
)
def test_fifty_cases(first: int) -> None:
    verdicts = [judge(seed) for seed in range(first, first + 50)]
    assert [verdict for verdict in verdicts if verdict.failed] == []
    assert {verdict.outcome for verdict in verdicts} > {"refused"}, "some are used to the end"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(1000, 6000, 500))
def test_five_hundred_cases(first: int) -> None:
    verdicts = [judge(seed) for seed in range(first, first + 500)]
    assert [verdict for verdict in verdicts if verdict.failed] == []


def test_every_kind_of_artifact_and_change_is_drawn() -> None:
    """By the cases that are always run; replaying one needs its seed alone."""
    drawn = [(seed, artifact_of(seed)) for seed in range(350, 500)]
    assert {name for _, name in drawn} == set(RECIPES)
    assert drawn == [(seed, artifact_of(seed)) for seed in range(350, 500)]


def test_nobody_else_can_sign(tmp_path: Path) -> None:
    """Digests that were made to fit again do not help where a signature is asked for."""
    clean = pristine("small and signed")
    assert clean.key is not None
    folder = tmp_path / "out"
    shutil.copytree(clean.folder, folder)
    resign(folder, lambda manifest: manifest["options"].update(new=1))
    compiler.load(folder)
    with pytest.raises(RingCompileError, match="was not made by the holder of"):
        compiler.load(folder, verify_key=clean.key)


def edited(folder: Path, tmp_path: Path, change: Any) -> Path:
    """A copy with both ranks' programs changed alike, and signed again."""
    made = compiler.load(folder)
    made.save(tmp_path / "out")
    for rank in range(2):
        path = tmp_path / "out" / f"rank{rank}.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
    resign(tmp_path / "out")
    return tmp_path / "out"


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What running says, where nothing is checked before."""
    monkeypatch.setattr(compiler.ParallelProgram, "ensure_verified", lambda self: None)
    start = time.process_time()
    with pytest.raises(RingCompileError) as caught:
        execution.run(compiler.load(folder), pristine("small").inputs)
    assert time.process_time() - start < 5
    return str(caught.value)


def test_an_argument_that_asks_for_more_than_the_type_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(data: Any) -> None:
        node = next(n for n in data["nodes"] if n["op"] == "aten.mul.Tensor")
        node.update(op="aten.full.default", args=[[10**11], 1.0],
                    kwargs={"dtype": {"dtype": "float32"}})

    said = run(edited(pristine("small").folder, tmp_path, change), monkeypatch)
    assert "would take 372.5 GiB, but its type says 0.0 GiB" in said


def test_a_type_that_no_machine_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(data: Any) -> None:
        node = next(n for n in data["nodes"] if n["op"] == "aten.mul.Tensor")
        data["types"].append({"dtype": "float32", "shape": [10**13]})
        node.update(op="aten.full.default", args=[[10**13], 1.0], type=len(data["types"]) - 1,
                    kwargs={"dtype": {"dtype": "float32"}})

    said = run(edited(pristine("small").folder, tmp_path, change), monkeypatch)
    assert "needs 37,252.9 GiB of memory, and " in said
    assert "hint: use more ranks, a shorter sequence or a smaller batch" in said


@pytest.mark.parametrize(("op", "args"), [
    ("aten.full.default", lambda node: [[10**9], 1.0]),
    ("aten.repeat.default", lambda node: [node["args"][0], [10**6, 1, 1]]),
])
def test_a_value_that_nothing_it_is_made_from_calls_for(
    op: str, args: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The type says the same, and a machine may hold it."""
    def change(data: Any) -> None:
        node = next(n for n in data["nodes"] if n["op"] == "aten.mul.Tensor")
        for member in data["nodes"]:
            member.pop("fused", None)  # `repeat` may not be in a group
        data["types"].append({"dtype": "float32", "shape": [10**9]})
        more = {"dtype": {"dtype": "float32"}} if op == "aten.full.default" else {}
        node.update(op=op, args=args(node), type=len(data["types"]) - 1, kwargs=more)

    said = run(edited(pristine("small").folder, tmp_path, change), monkeypatch)
    assert "GiB, made from 0.0 GiB; all weights and inputs of the program are 0.0 GiB" in said


def test_a_count_of_our_own_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(data: Any) -> None:
        node = next(n for n in data["nodes"] if n["op"] == "ringcompile.positions.default")
        node["kwargs"]["chunk"] = 10**12

    said = run(edited(pristine("small").folder, tmp_path, change), monkeypatch)
    assert "is 1000000000000, and no tensor is that long" in said


def test_sources_that_are_no_python_are_not_looked_into(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("password\n")
    (tmp_path / "code.py").write_text("x = 1\n")
    assert SourceLocation(str(tmp_path / "secret"), 1).text == ""
    assert SourceLocation(str(tmp_path / "code.py"), 1).text == "x = 1"


def test_the_memory_of_honest_programs_is_let_through() -> None:
    clean = pristine("llama-tiny")
    for length in (12, 200):
        execution.run(compiler.load(clean.folder), (torch.arange(length)[None],))
