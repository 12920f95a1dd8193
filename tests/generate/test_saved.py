"""Programs with a cache as artifacts, and on processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ringcompile as rc
from ringcompile.artifact.store import Artifact
from ringcompile.ir.program import Program
from tests.generate.models import Learned, Rotary, cached, captured, difference, ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("saved") / "out"
    cached(Learned, "ring=2")[1].save(made)
    return made


def test_what_is_read_is_what_was_saved(folder: Path) -> None:
    before, after = cached(Learned, "ring=2")[1].carried, rc.load(folder).carried
    assert before is not None
    assert after is not None
    assert str(after.program) == str(before.program)
    assert after.program.state == before.program.state
    for rank in range(2):
        assert str(after.rank(rank)) == str(before.rank(rank))


def test_it_generates_the_same(folder: Path) -> None:
    expected = rc.generate(cached(Learned, "ring=2")[1], ids(9), 8)
    assert torch.equal(rc.generate(rc.load(folder), ids(9), 8), expected)


def test_a_damaged_program_is_found(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "cached-rank1.json"
    path.write_text(path.read_text().replace('"slots"', '"sloth"'))
    with pytest.raises(rc.RingCompileError, match=r"cached-rank1\.json"):
        rc.Session(rc.load(tmp_path))


@torch.no_grad()
def test_turns_on_processes(folder: Path) -> None:
    """Weights and cache stay with the processes from call to call."""
    module, tokens = captured(Learned)[0], ids(60)
    expected = module(tokens)
    with rc.Session(rc.load(folder), backend="gloo") as session:
        for new in (5, 1, 40, 1):
            now = slice(session.length, session.length + new)
            assert difference(session.extend(tokens[:, now]), expected[:, now]) < 1e-10
        with pytest.raises(rc.RingCompileError, match="do not fit"):
            session.extend(tokens)
        session.rewind(30)
        found = session.extend(tokens[:, 30:33], last=True)
        assert difference(found, expected[:, 32:33]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ring=4", "tp=2", "pp=2,ring=2", "dp=2"])
def test_processes(spec: str) -> None:
    batch = 2 if spec == "dp=2" else 1
    parallel = cached(Rotary, spec)[1]
    lockstep = rc.generate(parallel, ids(9, batch), 16)
    assert torch.equal(rc.generate(parallel, ids(9, batch), 16, backend="gloo"), lockstep)


def test_programs_are_read_once_for_many_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the process that asks the ranks, too: to read one takes longer than to compute a token."""
    read, former = [0], Artifact.rank

    def rank(self: Artifact, index: int) -> Program:
        read[0] += 1
        return former(self, index)

    monkeypatch.setattr(Artifact, "rank", rank)
    with rc.Session(rc.load(folder), backend="gloo", threads=1) as session:
        session.extend(ids(5))
        session.extend(ids(1))
        first = read[0]
        for _ in range(3):
            session.extend(ids(1))
        assert read[0] == first


@torch.no_grad()
def test_whole_sequences_between_turns_on_processes(folder: Path) -> None:
    """Each kind of task by its own program; what a whole sequence gives is of all its tokens."""
    module, tokens = captured(Learned)[0], ids(40)
    expected = module(tokens)
    with rc.Session(rc.load(folder), backend="gloo", threads=1) as session:
        for _ in range(2):
            now = slice(session.length, session.length + 3)
            assert difference(session.extend(tokens[:, now]), expected[:, now]) < 1e-10
            assert difference(session.run((tokens,)), expected) < 1e-10
