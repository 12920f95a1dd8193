"""Artifacts that are signed, and keys that did or did not sign them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, x25519

from ringcompile import compiler
from ringcompile.artifact import load, signature
from ringcompile.artifact.signature import read_private_key
from ringcompile.cli import cli
from ringcompile.errors import RingCompileError
from tests.artifact.support import compile_model, save_model
from tests.artifact.test_damage import resign


def keys(folder: Path, name: str, kind: type = ed25519.Ed25519PrivateKey) -> tuple[Path, Path]:
    key = kind.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ))
    public.write_bytes(key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ))
    return private, public


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    private, public = keys(tmp_path, "mine")
    return save_model(compile_model("gpt-tiny"), tmp_path / "out", sign_with=private), public


def test_whoever_has_the_key_can_tell(signed: tuple[Path, Path], tmp_path: Path) -> None:
    folder, public = signed
    compiler.load(folder, verify_key=public).saved.check()
    load(folder)
    _, other = keys(tmp_path, "other")
    with pytest.raises(RingCompileError, match=r"was not made by the holder of '.*other\.pub'"):
        load(folder, verify_key=other)
    unsigned = save_model(compile_model("gpt-tiny"), tmp_path / "unsigned")
    with pytest.raises(RingCompileError, match="unsigned' is not signed"):
        load(unsigned, verify_key=public)
    private, _ = keys(tmp_path, "again")
    save_model(compile_model("gpt-tiny"), folder, overwrite=True, sign_with=private)
    with pytest.raises(RingCompileError, match="was not made by"):
        load(folder, verify_key=public)


@pytest.mark.parametrize("change", ["a program", "weights", "an option", "the signature", "junk"])
def test_a_change_by_another_hand_is_refused(signed: tuple[Path, Path], change: str) -> None:
    folder, public = signed
    if change == "a program":
        path = folder / "rank0.json"
        path.write_text(path.read_text() + " ")
    elif change == "weights":
        digests = folder / "digests.json"
        digests.write_text(digests.read_text().replace("0", "1"))
    elif change in ("the signature", "junk"):
        text = (folder / "manifest.sig").read_text()
        (folder / "manifest.sig").write_text("00" + text[2:] if change == "the signature" else "x")
    resign(folder, lambda m: m["options"].update(new=1) if change == "an option" else None)
    if change in ("the signature", "junk"):
        assert load(folder).manifest
    with pytest.raises(RingCompileError, match="was not made by the holder of"):
        load(folder, verify_key=public)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "cannot read '.*key': No such file"),
        (lambda path: path.write_text("hello"), "cannot read a key from"),
        (lambda path: path.mkdir(), "is not a regular file"),
        (lambda path: path.write_bytes(
            keys(path.parent, "x", x25519.X25519PrivateKey)[0].read_bytes()
        ), "is not an ed25519 private key"),
    ],
    ids=["missing", "text", "folder", "another kind"],
)
def test_what_is_no_key_is_refused(tmp_path: Path, write, message: str) -> None:
    write(tmp_path / "key")
    with pytest.raises(RingCompileError, match=message):
        read_private_key(tmp_path / "key")


def test_without_the_package_it_says_what_to_install(
    signed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(self: object) -> None:
        raise ImportError

    monkeypatch.setattr(signature._Library, "__init__", absent)
    with pytest.raises(RingCompileError, match="signatures need the package cryptography"):
        load(signed[0], verify_key=signed[1])


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    private, public = keys(tmp_path, "mine")
    out = str(tmp_path / "out")
    options = ["transform", "gpt-tiny", "--parallel", "ring=2", "-o", out, "--sign", str(private)]
    cli.main(options, standalone_mode=False)
    run = ["run", out, "--backend", "lockstep", "--seq", "8", "--verify-key", str(public)]
    cli.main(run, standalone_mode=False)
    cli.main(["verify", out, "--verify-key", str(public)], standalone_mode=False)
    resign(Path(out), lambda manifest: manifest["options"].update(batch=2))
    with pytest.raises(RingCompileError, match="was not made by"):
        cli.main(run, standalone_mode=False)
    assert json.loads((Path(out) / "manifest.json").read_text())["options"]["batch"] == 2


# Every command that reads an artifact, and what it needs besides.
READERS = {
    "bench": [], "dump": [], "info": [], "run": ["--backend", "lockstep"], "verify": [], "view": [],
    "simulate": ["--cluster", "h100x16"], "generate": ["--prompt", "x"],
}


def test_every_command_with_an_artifact_takes_a_key() -> None:
    reads = {
        name for name, command in cli.commands.items()
        if any(param.name == "out" and param.param_type_name == "argument"
               for param in command.params)
    }
    assert reads == set(READERS)
    for name in reads:
        assert "--verify-key" in {o for param in cli.commands[name].params for o in param.opts}


@pytest.mark.parametrize("command", READERS)
def test_every_command_refuses_what_was_not_signed_by_the_key(
    signed: tuple[Path, Path], tmp_path: Path, command: str
) -> None:
    folder, _ = signed
    _, other = keys(tmp_path, "other")
    unsigned = save_model(compile_model("gpt-tiny"), tmp_path / "unsigned")
    before = sorted(tmp_path.iterdir())
    by_another = (
        f"error: the signature of '{folder}' was not made by the holder of '{other}' for this "
        "content\n  hint: do not use this artifact, or name the key of who signed it"
    )
    for out, key, message in (
        (folder, other, by_another),
        (unsigned, other,
         f"error: '{unsigned}' is not signed\n  hint: ask its maker for a signed one (--sign)"),
        (folder, tmp_path / "none.pub",
         f"error: cannot read '{tmp_path / 'none.pub'}': No such file or directory"),
    ):
        arguments = [command, str(out), *READERS[command], "--verify-key", str(key)]
        with pytest.raises(RingCompileError) as caught:
            cli.main(arguments, standalone_mode=False)
        assert str(caught.value) == message
    assert sorted(tmp_path.iterdir()) == before, "nothing is written"


@pytest.mark.parametrize("command", ["dump", "info"])
def test_a_key_that_fits_lets_a_command_go_on(
    signed: tuple[Path, Path], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, public = signed
    cli.main([command, str(folder), "--verify-key", str(public)], standalone_mode=False)
    with_key = capsys.readouterr().out
    cli.main([command, str(folder)], standalone_mode=False)
    assert with_key == capsys.readouterr().out != ""
