"""A damaged, foreign or hostile artifact is refused by name, and never by another exception."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ringcompile.artifact import load
from ringcompile.artifact.files import digest
from ringcompile.artifact.manifest import VERSION, _manifest_digest
from ringcompile.errors import RingCompileError
from ringcompile.runtime.inprocess import run_lockstep
from tests.artifact.support import compile_model, save_model

JSON = ["manifest.json", "digests.json", "program.json", "rank0.json", "rank1.json"]
ALL = [*JSON, "program.py", "rank0.py", "rank1.py", "weights.safetensors"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(compile_model("llama-tiny"), tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def use(folder: Path) -> torch.Tensor:
    """Everything one does with an artifact."""
    found = load(folder)
    found.check()
    ranks = [found.rank(rank) for rank in range(2)]
    inputs = {"inputs": torch.ones(1, 12, dtype=torch.int64)}
    return run_lockstep(ranks, found.mesh, found.source, inputs).outputs


def refused(folder: Path) -> RingCompileError:
    with pytest.raises(RingCompileError) as caught:
        use(folder)
    return caught.value


def test_the_copy_itself_is_fine(folder: Path) -> None:
    assert use(folder).isfinite().all()


def test_the_tables_name_every_file(pristine: Path) -> None:
    assert sorted(ALL) == sorted(path.name for path in pristine.iterdir())


def flip(content: bytes, place: float) -> bytes:
    index = int(place * (len(content) - 1))
    return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    **{f"flip at {p}": lambda c, p=p: flip(c, p) for p in (0.0, 0.01, 0.3, 0.5, 0.77, 0.99, 1.0)},
    "empty": lambda c: b"",
    "half": lambda c: c[: len(c) // 2],
    "one byte less": lambda c: c[:-1],
    "one byte more": lambda c: c + b" ",
    "doubled": lambda c: c + c,
    "zeros": lambda c: bytes(len(c)),
    "ones": lambda c: b"\xff" * len(c),
    "a list": lambda c: b"[]",
    "not text": lambda c: c[:20] + b"\xff\xfe" + c[22:],
}


HARMLESS = {
    # White space behind the JSON.
    ("manifest.json", "one byte less"),
    ("manifest.json", "one byte more"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ALL)
def test_a_changed_file_is_refused(folder: Path, name: str, change: str) -> None:
    path = folder / name
    before = path.read_bytes()
    path.write_bytes(CHANGES[change](before))
    if (name, change) in HARMLESS:
        use(folder)
        return
    error = refused(folder)
    assert name in error.message
    assert error.hint


@pytest.mark.parametrize("name", ALL)
def test_a_missing_file_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refused(folder).message


@pytest.mark.parametrize("name", ALL)
def test_a_folder_in_a_files_place_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert name in refused(folder).message


@pytest.mark.parametrize(
    ("first", "second"), [("rank0.json", "rank1.json"), ("rank0.json", "program.json")]
)
def test_swapped_files_are_refused(folder: Path, first: str, second: str) -> None:
    swap(folder, first, second)
    refused(folder)
    resign(folder)
    assert "is not the program" in refused(folder).message


def swap(folder: Path, first: str, second: str) -> None:
    a, b = (folder / first).read_bytes(), (folder / second).read_bytes()
    (folder / first).write_bytes(b)
    (folder / second).write_bytes(a)


def resign(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Make the manifest fit the files again, as somebody would who means harm."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        content = (folder / name).read_bytes()
        record["bytes"] = len(content)
        if "sha256" in record:
            record["sha256"] = digest(content)
    change(manifest)
    manifest["sha256"] = _manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit(data: Any, path: str, value: Any) -> None:
    *outer, last = path.split("|")
    for key in outer:
        data = data[key]
    if value is None:
        del data[last]
    else:
        data[last] = value


EDITS = [
    ("format", "zip", "not a ringcompile artifact"),
    ("version", VERSION + 1, f"format version {VERSION + 1}"),
    ("version", "1", "'version' is '1', not a whole number"),
    ("parallel", "ring=4", "2 rank files for 4 ranks"),
    ("parallel", "ring=99999999999999999999", "2 rank files for"),
    ("parallel", "disc=2", "unknown mesh axis 'disc'"),
    ("parallel", "dp=2", "is not the program for all ranks"),
    ("options", [], "'options' is list, not an object"),
    ("files", None, "'files' is missing"),
    ("files|program.json", None, "'program.json' is not among the files"),
    ("files|rank1.json", None, "1 rank files for 2 ranks"),
    ("files|rank1.json|sha256", None, "'sha256' is missing"),
    ("files|rank1.json", 3, "is 3, not an object"),
    ("files|../secret", {"bytes": 1}, "is not a plain file name"),
    ("files|/etc/passwd", {"bytes": 1}, "is not a plain file name"),
    ("files|a\\b", {"bytes": 1}, "is not a plain file name"),
    ("files|..", {"bytes": 1}, "is not a plain file name"),
    ("files|", {"bytes": 1}, "is not a plain file name"),
    ("files|a\x00b", {"bytes": 1}, "is not a plain file name"),
    ("files|weights.safetensors", None, "no record of 'weights.safetensors'"),
    ("files|weights.safetensors|header_sha256", "0", "was changed after saving"),
    ("weights", None, "'weights' is missing"),
    ("weights|norm.weight", None, "weight 'norm.weight' is not as in the manifest"),
    ("weights|norm.weight|dtype", "float16", "'weights.safetensors' holds F32"),
    ("weights|norm.weight|dtype", "pickle", "'pickle' is not a dtype"),
    ("weights|norm.weight|shape", [95], "'weights.safetensors' holds F32 [96]"),
    ("weights|norm.weight|shape", [-1], "out of range"),
    ("weights|norm.weight|file", "../../weights.safetensors", "is not a plain file name"),
    ("weights|norm.weight|file", "/etc/passwd", "is not a plain file name"),
    ("weights|norm.weight|file", "rank0.json", "as a safetensors file: a header of"),
    ("weights|norm.weight|tensor", "nothing", "holds no tensor 'nothing'"),
    ("weights|norm.weight|where", "cloud", "lies in 'cloud'"),
    ("weights|norm.weight|where", "none", "was not saved"),
    ("weights|norm.weight|where", "reference", "which is no full path"),
    ("references", None, "'references' is missing"),
    ("references", [], "'references' is list, not an object"),
    ("files|digests.json", None, "'digests.json' is not among the files"),
]


@pytest.mark.parametrize(
    ("path", "value", "message"), EDITS, ids=[f"{p}={v}"[:50] for p, v, _ in EDITS]
)
def test_an_edited_manifest_is_refused(folder: Path, path: str, value: Any, message: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    name = next(name for name in manifest["weights"] if name.endswith("norm.weight"))
    path, message = path.replace("norm.weight", name), message.replace("norm.weight", name)
    edited = json.loads(json.dumps(manifest))
    edit(edited, path, value)
    (folder / "manifest.json").write_text(json.dumps(edited))
    if not path.startswith(("format", "version")):
        assert "was changed after it was saved" in refused(folder).message
    resign_with = json.loads(json.dumps(edited))
    resign_with["sha256"] = _manifest_digest(resign_with)
    (folder / "manifest.json").write_text(json.dumps(resign_with))
    assert message in str(refused(folder))


def test_a_hostile_program_is_refused_even_where_the_digests_fit(folder: Path) -> None:
    path = folder / "rank1.json"
    data = json.loads(path.read_text())
    call = next(node for node in data["nodes"] if "." in node["op"])
    call["op"] = "os.system"
    call["args"] = ["touch owned"]
    path.write_text(json.dumps(data))
    resign(folder)
    error = refused(folder)
    assert error.message.endswith("'os.system' is not an op that a program may hold")
    assert "rank1.json" in error.message
    assert error.node == call["name"]
    assert load(folder).rank(0)


def test_a_program_with_another_weight_is_refused(folder: Path) -> None:
    path = folder / "rank1.json"
    data = json.loads(path.read_text())
    next(iter(data["weights"].values()))["shape"] = [1]
    path.write_text(json.dumps(data))
    resign(folder)
    assert "is not as in the manifest" in refused(folder).message


def test_other_weights_are_refused(folder: Path) -> None:
    path = folder / "weights.safetensors"
    tensors = load_file(path)
    save_file({name: tensor.double() for name, tensor in tensors.items()}, path)
    assert "bytes, it was saved with" in refused(folder).message
    resign(folder)
    assert "holds F64" in refused(folder).message
    save_file(dict(list(tensors.items())[1:]), path)
    resign(folder)
    assert "holds no tensor" in refused(folder).message


def test_weights_that_go_away_later_stay_open(folder: Path) -> None:
    source = load(folder).source
    name = next(iter(source.places))
    before = source(name).clone()
    (folder / "weights.safetensors").unlink()
    assert torch.equal(source(name), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.clear(), "has no digests of its data"),
        (lambda rows: rows.update({name: text[:-64] for name, text in rows.items()}),
         "has no digests of its data"),
        (lambda rows: rows.update({name: "zz" + text[2:] for name, text in rows.items()}),
         "are not hexadecimal"),
        (lambda rows: rows.update({name: "00" + text[2:] for name, text in rows.items()}),
         "was changed after it was saved"),
        (lambda rows: rows.update(dict.fromkeys(rows, 7)), "is 7, not a text"),
    ],
    ids=["none", "short", "no digits", "others", "a number"],
)
def test_other_digests_are_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = folder / "digests.json"
    data = json.loads(path.read_text())
    change(data["weights.safetensors"])
    path.write_text(json.dumps(data))
    resign(folder)
    assert message in refused(folder).message


@pytest.mark.parametrize("name", ALL)
def test_a_link_in_a_files_place_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert "is a link" in refused(folder).message


@pytest.mark.parametrize("name", ALL)
def test_a_pipe_in_a_files_place_is_refused_at_once(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name}' is not a regular file" in refused(folder).message


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "other", "too long"])
def test_what_is_no_artifact_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("x" * 300 if kind == "too long" else "out")
    if kind == "file":
        path.write_text("text")
    elif kind in ("empty", "other"):
        path.mkdir()
    if kind == "other":
        (path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(
        RingCompileError, match=r"no folder|is not an artifact|not a ringcompile|cannot read"
    ):
        load(path)


def test_a_version_from_the_future_says_what_to_do(folder: Path) -> None:
    resign(folder, lambda manifest: manifest.update(version=99, made_with={"ringcompile": "9.9"}))
    error = refused(folder)
    assert "format version 99" in error.message
    assert "saved by ringcompile 9.9" in (error.hint or "")
