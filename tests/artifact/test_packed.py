"""Long programs are packed, read back as they were, and refused where they were changed."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from ringcompile.artifact import load, packed, store
from ringcompile.artifact.files import digest
from ringcompile.artifact.manifest import _manifest_digest
from ringcompile.dump import render
from ringcompile.dump.python_view import python_view
from ringcompile.errors import RingCompileError
from tests.artifact.support import compile_model, save_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(packed, "PACKED_FROM", 1)
    return save_model(compile_model("llama-tiny"), tmp_path / "out", view=python_view)


def rewritten(folder: Path, content: bytes, **record: Any) -> str:
    """What is said of rank 1's program with other bytes that the manifest vouches for."""
    (folder / "rank1.json.gz").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    known = manifest["files"]["rank1.json.gz"]
    known.update({"bytes": len(content), "sha256": digest(content), **record})
    manifest["sha256"] = _manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RingCompileError) as refused:
        load(folder).rank(1)
    return refused.value.message.removeprefix(f"{folder}/rank1.json.gz: ")


def test_a_packed_program_is_read_as_it_was_saved(folder: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.json*"))
    assert names == ["digests.json", "manifest.json", "program.json.gz", "rank0.json.gz",
                     "rank1.json.gz"]
    found, parallel = load(folder), compile_model("llama-tiny")
    found.check()
    assert found.cross_checked is False
    assert [render(found.rank(rank), "text") for rank in range(2)] == [
        render(program, "text") for program in parallel.ranks()
    ]


def test_what_is_packed_is_the_text_of_the_plain_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "PACKED_FROM", 1 << 30)
    plain = save_model(compile_model("llama-tiny"), tmp_path / "plain", view=python_view)
    for name in ("program.json", "rank0.json", "rank1.json"):
        assert gzip.decompress((folder / f"{name}.gz").read_bytes()) == (plain / name).read_bytes()


def test_the_views_that_are_not_written_can_be_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = save_model(compile_model("llama-tiny"), tmp_path / "whole", view=python_view)
    monkeypatch.setattr(store, "VIEWED_RANKS", 1)
    folder = save_model(compile_model("llama-tiny"), tmp_path / "out", view=python_view)
    assert sorted(path.name for path in folder.glob("*.py")) == ["program.py", "rank0.py"]
    printed = render(load(folder).rank(1), "python")
    assert printed == (whole / "rank1.py").read_text().rstrip("\n")


def test_a_packed_program_that_is_not_what_its_record_says_is_refused(folder: Path) -> None:
    content = (folder / "rank1.json.gz").read_bytes()
    size = len(gzip.decompress(content))
    wrong = "the file does not hold the {} bytes that its record names"
    assert rewritten(folder, content[:-1]) == wrong.format(size)
    assert rewritten(folder, content + b"more") == wrong.format(size)
    assert rewritten(folder, content, unpacked_bytes=size - 1) == wrong.format(size - 1)
    assert rewritten(folder, content, unpacked_bytes=size + 1) == wrong.format(size + 1)
    assert rewritten(folder, content, unpacked_bytes=1 << 40) == (
        f"a program of {1 << 40} bytes is longer than {1 << 30}"
    )
    assert rewritten(folder, content, unpacked_bytes=None) == (
        "a program's length is NoneType, not a whole number"
    )
    assert rewritten(folder, b"{}", unpacked_bytes=2).startswith("not a gzip file: ")


def test_a_file_that_unpacks_to_more_than_it_says_is_not_unpacked_whole(folder: Path) -> None:
    bomb = zlib.compressobj(9, wbits=31)
    content = bomb.compress(bytes(1 << 26)) + bomb.flush()
    assert rewritten(folder, content, unpacked_bytes=100) == (
        "the file does not hold the 100 bytes that its record names"
    )


def test_a_program_that_is_there_twice_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "rank1.json").write_bytes(b"{}")
    manifest["files"]["rank1.json"] = {"bytes": 2, "sha256": digest(b"{}")}
    manifest["sha256"] = _manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RingCompileError, match="3 rank files for 2 ranks"):
        load(folder)
