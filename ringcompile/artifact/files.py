"""Files of an artifact: JSON text, digests, and a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ringcompile.artifact.fields import count, expect, member
from ringcompile.artifact.opened import DAMAGED, OpenFile, OpenFolder
from ringcompile.errors import RingCompileError
from ringcompile.held import hold, is_held, left_over, new_held, remove_left_over
from ringcompile.ir.serialize import JsonText, encode

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
FORMAT = "ringcompile artifact"
_SWAP_SECONDS = 2.0
_log = logging.getLogger("ringcompile")
_PLAIN = re.compile(r"\w[\w-]*(\.[\w-]+)*", re.ASCII)


def plain_name(name: str) -> str:
    """A name of a file in the folder itself; RingCompileError on anything like a path."""
    if not _PLAIN.fullmatch(name) or len(name) > 100:
        raise RingCompileError(
            f"{name[:80]!r} is not a plain file name", hint="do not use this artifact"
        )
    return name


def json_text(data: dict[str, Any]) -> str:
    """JSON with a line for each entry of the outer object's members: quick to write, good to diff.

    Raises:
        RingCompileError: a value that JSON has no word for.
    """
    try:
        members = (f"{json.dumps(key)}: {_block(value)}" for key, value in data.items())
        return "{\n" + ",\n".join(members) + "\n}\n"
    except (TypeError, ValueError) as error:
        raise RingCompileError(f"this cannot be written as JSON: {error}") from None


def _line(value: Any) -> str:
    return value if isinstance(value, JsonText) else encode(value)


def _block(value: Any) -> str:
    if isinstance(value, dict) and value:
        rows = [f"  {_line(str(key))}: {_line(entry)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(rows) + "\n}"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {_line(entry)}" for entry in value) + "\n]"
    return _line(value)


def parse_json(content: bytes) -> dict[str, Any]:
    """The object that a file holds; RingCompileError on anything that is not strict JSON."""
    try:
        data = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RingCompileError(f"not valid JSON: {error}") from None
    return expect(data, dict, "the outermost value")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("an object has two members of one name")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def digest(content: bytes) -> str:
    """SHA-256 as hexadecimal text."""
    return hashlib.sha256(content).hexdigest()


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a file; its record for the manifest."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    """Write a file; its record for the manifest."""
    path.write_bytes(content)
    return {"bytes": len(content), "sha256": digest(content)}


def read_checked(folder: OpenFolder, name: str, record: dict[str, Any]) -> bytes:
    """The content of a file that is as its record says; RingCompileError if it is not."""
    path = folder.path / name
    file = folder.file(name)
    check_size(path, file.size, record)
    content = file.read()
    if digest(content) != member(record, "sha256", str):
        raise RingCompileError(f"'{path}' was changed after it was saved", hint=DAMAGED)
    return content


def check_size(path: Path, found: int, record: Any, hint: str = DAMAGED) -> None:
    """Raise RingCompileError where a file has another size than its record."""
    size = count(expect(record, dict, f"the record of '{path.name}'").get("bytes"), "a file's size")
    if found != size:
        raise RingCompileError(f"'{path}' has {found} bytes, it was saved with {size}", hint=hint)


@contextlib.contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends well, and else leaves no trace.

    Raises:
        RingCompileError: `target` is in the way, or the system refuses to write.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tidy(target)
        check_free(target, overwrite)
        with new_held(target.parent, _prefix(target, "tmp")) as temporary:
            yield temporary
            _to_disk(temporary)
            _swap(temporary, target, overwrite)
            sync(target.parent)
    except OSError as error:
        raise RingCompileError(f"cannot write '{target}': {error.strerror or error}") from error


def tidy(target: Path) -> None:
    """Remove what saves that were killed left, and put back a version that one had moved aside.

    A save moves the old version aside, and then the new one to its place. Killed between the two,
    it leaves no version under the name.
    """
    aside = left_over(target.parent, _prefix(target, "old"))
    if aside is not None and not target.exists():
        with hold(aside) as free:
            if free:
                aside.rename(target)
                _log.warning(
                    "a save of '%s' was interrupted; the previous version has been restored", target
                )
    for kind in ("tmp", "old"):
        remove_left_over(target.parent, _prefix(target, kind))


def await_swap(target: Path) -> None:
    """Wait while a save is between moving the old version aside and the new one to its place."""
    deadline = time.monotonic() + _SWAP_SECONDS
    while not target.exists() and time.monotonic() < deadline:
        if not is_held(target.parent, _prefix(target, "old")):
            return
        time.sleep(0.01)


def _to_disk(folder: Path) -> None:
    """Have the system write the files of a folder, which then survive a loss of power."""
    for path in (*folder.iterdir(), folder):
        sync(path)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prefix(target: Path, kind: str) -> str:
    return f".{target.name}.{kind}-"


def check_free(target: Path, overwrite: bool) -> None:
    """Raise RingCompileError where an artifact cannot be written, for what is there already."""
    if not target.exists():
        return
    if not target.is_dir():
        raise RingCompileError(f"'{target}' is a file", hint="name a folder")
    present = {path.name for path in target.iterdir()}
    if not present:
        return
    if not overwrite:
        raise RingCompileError(
            f"'{target}' is not empty", hint="name another folder, or overwrite it (--overwrite)"
        )
    ours = _saved_names(target / MANIFEST)
    if ours is None:
        raise RingCompileError(
            f"'{target}' is not an artifact, so it is not overwritten", hint="name another folder"
        )
    if present - ours:
        raise RingCompileError(
            f"'{target}' contains files that do not belong to an artifact: "
            + ", ".join(sorted(present - ours)[:5]),
            hint="move them away, or name another folder",
        )


def _saved_names(manifest: Path) -> set[str] | None:
    """The files of an artifact of any version, or None if it is none."""
    try:
        data = parse_json(OpenFile(manifest).read())
        if data.get("format") != FORMAT:
            return None
        return {MANIFEST, SIGNATURE, *member(data, "files", dict)}
    except (OSError, RingCompileError):
        return None


def _swap(temporary: Path, target: Path, overwrite: bool) -> None:
    if not (overwrite and target.exists()):
        temporary.rename(target)
        return
    old = target.with_name(f"{_prefix(target, 'old')}{secrets.token_hex(8)}")
    with hold(target):  # whoever comes by sees that this save still runs
        try:
            target.rename(old)
            temporary.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
