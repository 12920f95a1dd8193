"""What an artifact says of itself, and readers that never see two versions at once."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from ringcompile import artifact, compiler, execution, parallel_program
from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import SHIFT
from tests.artifact.support import compile_model, save_model
from tests.artifact.test_damage import resign


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    compile_model("llama-tiny").save(tmp_path / "out")
    return tmp_path / "out"


def inputs() -> dict[str, torch.Tensor]:
    return {"inputs": torch.arange(12)[None]}


def lose_a_receiver(folder: Path) -> None:
    """Rank 1 sends its keys to nobody."""
    path = folder / "rank1.json"
    data = json.loads(path.read_text())
    sent = next(node for node in data["nodes"] if node["op"] == SHIFT)
    sent["kwargs"]["to"] = None
    path.write_text(json.dumps(data))


def test_what_was_checked_when_saved_is_not_checked_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr(parallel_program, "cross_check", never)
    loaded = compiler.load(folder)
    assert loaded.saved is not None
    assert loaded.saved.cross_checked
    execution.run(loaded, inputs())


@pytest.mark.parametrize("forged", ["as it was", "of another artifact", "true", "none"])
def test_changed_programs_are_checked_before_they_run(
    folder: Path, tmp_path: Path, forged: str
) -> None:
    lose_a_receiver(folder)
    compile_model("gpt-tiny").save(tmp_path / "other")
    other = json.loads((tmp_path / "other" / "manifest.json").read_text())["cross_checked"]
    claims = {"of another artifact": other, "true": True, "none": None}
    resign(folder, lambda m: m.update(cross_checked=claims.get(forged, m["cross_checked"])))
    loaded = compiler.load(folder)
    assert loaded.saved is not None
    assert not loaded.saved.cross_checked
    for backend in ("lockstep", "gloo"):
        with pytest.raises(RingCompileError, match=r"rank 0.*rank 1|rank 1.*rank 0"):
            execution.run(compiler.load(folder), inputs(), backend=backend)


def test_what_nobody_checked_is_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, count = save_model(compile_model("llama-tiny"), tmp_path / "out"), []
    monkeypatch.setattr(parallel_program, "cross_check", lambda *_: count.append(1))
    loaded = compiler.load(folder)
    execution.run(loaded, inputs())
    execution.run(loaded, inputs())
    assert count == [1]


def test_an_artifact_has_one_identity(folder: Path, tmp_path: Path) -> None:
    parallel = compile_model("llama-tiny")
    parallel.save(tmp_path / "again")
    first, second = (artifact.load(tmp_path / name) for name in ("out", "again"))
    assert first.identity == second.identity
    for name in (path.name for path in folder.iterdir()):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    other = save_model(parallel, tmp_path / "x", source=lambda name: parallel.source(name) * 2)
    assert artifact.load(other).identity != first.identity


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("reads", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_reads_while_it_is_overwritten_never_mix_two_models(tmp_path: Path, reads: int) -> None:
    """Each version has one number in all its weights, and the same number in its options."""
    parallel, folder = compile_model("llama-tiny"), tmp_path / "out"
    done, errors = threading.Event(), []

    def write() -> None:
        version = 1
        while not done.is_set():
            version += 1
            save(version)

    def save(version: int) -> None:
        save_model(
            parallel, folder, overwrite=True, options={"version": version},
            source=lambda name: torch.full_like(parallel.source(name), version),
        )

    save(1)
    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    try:
        for _ in range(reads):
            try:
                found = artifact.load(folder)
                version = found.manifest["options"]["version"]
                found.check()
                values = {float(found.source(name).max()) for name in found.source.places}
            except RingCompileError as error:
                errors.append(error.message)
                continue
            assert values == {version}
            seen.add(version)
    finally:
        done.set()
        writer.join()
    allowed = ("was replaced or removed while", "there is no folder")
    assert all(any(part in text for part in allowed) for text in errors), errors
    assert seen
