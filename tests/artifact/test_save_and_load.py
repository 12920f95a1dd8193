"""What is saved is what is loaded, and a save that fails leaves nothing."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ringcompile.artifact import files, load
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.models import zoo
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.inprocess import run_lockstep
from tests.artifact.support import compile_model, save_model, view


@pytest.fixture(scope="module", params=["llama-tiny", "bert-tiny", "gpt-tiny"])
def parallel(request: pytest.FixtureRequest) -> ParallelProgram:
    return compile_model(request.param)


@pytest.fixture(scope="module")
def llama() -> ParallelProgram:
    return compile_model("llama-tiny")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_artifact_runs_as_what_was_saved(parallel: ParallelProgram, tmp_path: Path) -> None:
    found = load(save_model(parallel, tmp_path / "out"))
    found.check()
    assert str(found.spmd.graph) == str(parallel.program.graph)
    assert found.mesh == parallel.mesh
    ranks = [found.rank(rank) for rank in range(2)]
    assert [str(r.graph) for r in ranks] == [str(r.graph) for r in parallel.ranks()]
    inputs = {
        spec.name: torch.ones(1, 45, dtype=spec.type.dtype) for spec in parallel.program.inputs
    }
    read = run_lockstep(ranks, found.mesh, found.source, inputs).outputs
    made = run_lockstep(parallel.ranks(), parallel.mesh, parallel.source, inputs).outputs
    assert torch.equal(read, made)


def test_the_folder_says_what_it_holds(llama: ParallelProgram, tmp_path: Path) -> None:
    folder = save_model(llama, tmp_path / "out", options={"order": "auto", "sizes": (1, 2), 3: 4})
    assert sorted(path.name for path in folder.iterdir()) == [
        "digests.json",
        "manifest.json",
        "program.json",
        "program.py",
        "rank0.json",
        "rank0.py",
        "rank1.json",
        "rank1.py",
        "weights.safetensors",
    ]
    manifest = load(folder).manifest
    assert manifest["parallel"] == "ring=2"
    assert manifest["order"] == "zigzag"
    assert manifest["options"] == {"order": "auto", "sizes": [1, 2], "3": 4}
    assert [spec["name"] for spec in manifest["inputs"]] == ["inputs"]
    assert manifest["made_with"]["torch"] == str(torch.__version__)
    assert str(tmp_path) not in "".join(p.read_text() for p in folder.glob("*.json"))
    assert (folder / "rank1.py").read_text() == view(llama.rank(1))
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {folder.stat().st_mode & 0o666}


def test_saving_twice_gives_the_same_bytes(llama: ParallelProgram, tmp_path: Path) -> None:
    first, second = (save_model(llama, tmp_path / name) for name in ("a", "b"))
    assert tree(first) == tree(second)


def test_what_was_loaded_can_be_saved_again(llama: ParallelProgram, tmp_path: Path) -> None:
    folder = save_model(llama, tmp_path / "out")
    found = load(folder)
    again = ParallelProgram(found.spmd, found.mesh, saved=found)
    assert tree(save_model(again, tmp_path / "again")) == tree(folder)
    # Also in its own place: the old files are read while the new ones are written.
    save_model(again, folder, overwrite=True)
    assert tree(folder) == tree(tmp_path / "again")


def test_a_rank_reads_its_own_file_only(llama: ParallelProgram, tmp_path: Path) -> None:
    folder = save_model(llama, tmp_path / "out")
    found = load(folder)
    for name in ("program.json", "rank0.json"):
        (folder / name).write_bytes(b"")
    assert found.rank(1).coordinates == {"ring": 1}
    with pytest.raises(RingCompileError, match="rank 2 does not exist"):
        found.rank(2)


def failing(count: int, error: BaseException) -> Any:
    """A view that raises at the program of that number."""
    calls = iter(range(100))

    def fail(program: Program) -> str:
        if next(calls) == count:
            raise error
        return view(program)

    return fail


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("a bug"), RingCompileError("no")], ids=repr
)
@pytest.mark.parametrize("count", [0, 2])
def test_a_failure_leaves_nothing(
    llama: ParallelProgram, tmp_path: Path, error: BaseException, count: int
) -> None:
    with pytest.raises(type(error)):
        save_model(llama, tmp_path / "out", view=failing(count, error))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_one(llama: ParallelProgram, tmp_path: Path) -> None:
    folder = save_model(llama, tmp_path / "out")
    before = tree(folder)
    with pytest.raises(KeyboardInterrupt):
        save_model(llama, folder, overwrite=True, view=failing(2, KeyboardInterrupt()))
    assert tree(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failure_in_the_swap_puts_the_old_one_back(
    llama: ParallelProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(llama, tmp_path / "out")
    before = tree(folder)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(llama, folder, overwrite=True, options={"new": True})
    assert tree(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_full_disk_is_an_error_of_ours(
    llama: ParallelProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RingCompileError, match="No space left on device"):
        save_model(llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_all(llama: ParallelProgram, tmp_path: Path) -> None:
    folder = save_model(llama, tmp_path / "out")
    save_model(llama, folder, overwrite=True, view=None, options={"new": True})
    assert not list(folder.glob("*.py"))
    assert load(folder).manifest["options"] == {"new": True}
    assert list(tmp_path.iterdir()) == [folder]


def in_the_way(kind: str, folder: Path, llama: ParallelProgram) -> None:
    if kind == "file":
        folder.write_text("mine")
        return
    folder.mkdir(parents=True)
    if kind == "files":
        (folder / "mine").write_text("mine")
    if kind == "foreign":
        (folder / "manifest.json").write_text('{"format": "another", "files": {}}')
    if kind in ("artifact", "artifact and files"):
        folder.rmdir()
        save_model(llama, folder)
    if kind == "artifact and files":
        (folder / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("kind", "overwrite", "message"),
    [
        ("file", False, "is a file"),
        ("file", True, "is a file"),
        ("files", False, "is not empty"),
        ("files", True, "is not an artifact"),
        ("foreign", True, "is not an artifact"),
        ("artifact", False, "is not empty"),
        ("artifact and files", True, "do not belong to an artifact: notes.txt"),
    ],
)
def test_what_is_in_the_way_stays(
    llama: ParallelProgram, tmp_path: Path, kind: str, overwrite: bool, message: str
) -> None:
    folder = tmp_path / "out"
    in_the_way(kind, folder, llama)
    before = tree(tmp_path)
    with pytest.raises(RingCompileError, match=message):
        save_model(llama, folder, overwrite=overwrite, options={"new": True})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_filled(llama: ParallelProgram, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    save_model(llama, tmp_path / "out", overwrite=overwrite)
    load(tmp_path / "out").check()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_missing_parents_are_made_and_links_are_followed(
    llama: ParallelProgram, tmp_path: Path
) -> None:
    save_model(llama, tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    save_model(llama, tmp_path / "link", overwrite=True, options={"new": True})
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "a" / "b").manifest["options"] == {"new": True}


def test_options_that_are_no_json_are_refused(llama: ParallelProgram, tmp_path: Path) -> None:
    for value in (torch.float32, float("nan")):
        with pytest.raises(RingCompileError, match="cannot be written as JSON"):
            save_model(llama, tmp_path / "out", options={"dtype": value})
    assert list(tmp_path.iterdir()) == []


def test_a_program_of_other_ops_is_not_saved(
    llama: ParallelProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = next(n for n in llama.program.graph.nodes if n.op == "call_function")
    monkeypatch.setattr(node, "target", torch.ops.aten.rand_like.default)
    with pytest.raises(RingCompileError, match=r"'aten.rand_like.default' is not one") as caught:
        save_model(llama, tmp_path / "out")
    assert caught.value.node == node.name
    assert list(tmp_path.iterdir()) == []


def test_programs_are_small_and_lines_are_entries(llama: ParallelProgram, tmp_path: Path) -> None:
    folder = save_model(llama, tmp_path / "out")
    for rank in range(2):
        text = (folder / f"rank{rank}.json").read_text()
        assert len(text) < 400 * len(llama.rank(rank).graph.nodes)
        nodes = [line for line in text.splitlines() if line.startswith('  {"name": ')]
        assert len(nodes) >= len(llama.rank(rank).graph.nodes)
        assert all(json.loads(line.rstrip(",")) for line in nodes)


def test_loading_writes_nothing(llama: ParallelProgram, tmp_path: Path) -> None:
    folder = save_model(llama, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path, folder, *folder.iterdir())}
    load(folder).check()
    load(folder).source(next(iter(llama.program.weights.values())).name)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path, folder, *folder.iterdir())}
    assert after == before


def test_json_is_strict() -> None:
    for text in ('{"a": NaN}', '{"a": 1, "a": 2}', "[]", "{", "[" * 100_000, "\xff", "{}x"):
        with pytest.raises(RingCompileError):
            files.parse_json(text.encode("latin-1"))
    with pytest.raises(RingCompileError):
        files.parse_json(b'{"a": ' + b"9" * 5000 + b"}")


def test_lengths_and_inputs_are_those_of_the_model(tmp_path: Path) -> None:
    found = load(save_model(compile_model("bert-tiny"), tmp_path / "out"))
    _, args = zoo.build("bert-tiny")
    assert len(found.manifest["inputs"]) == len(args)
    assert found.manifest["length_range"][0] == 1
