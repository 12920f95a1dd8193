"""Folders that a process holds while it works in them, so that what is left of a killed one shows.

A lock on the folder itself ends with the process, whatever ends it. A folder of ours that nobody
holds is left over, and the next process that comes by removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_SCRATCH = "ringcompile-run-"
_TRIES = 3
# What this process works in and would leave behind if it ended now.
_unfinished: set[Path] = set()


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[bool]:
    """Hold a folder as long as the block runs; gives whether it could be had.

    It cannot where it is gone, where another process holds it, or where files cannot be locked.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(descriptor), os.stat(folder))
        except OSError:
            held = False
        yield held


@contextlib.contextmanager
def new_held(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder that is held as long as the block runs, and then removed.

    Raises:
        OSError: the system refuses to make it.
    """
    with contextlib.ExitStack() as stack:
        for _ in range(_TRIES):
            folder = parent / f"{prefix}{secrets.token_hex(8)}"
            stack.enter_context(_removed_at_the_end(folder))
            folder.mkdir()
            # Before it is held, another process may take it for left over; where nothing can be
            # locked nobody does.
            if stack.enter_context(hold(folder)):
                break
        yield folder


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which gets the name `path` when it is written, and is else removed.

    What is no regular file, such as a pipe, is written directly.

    Raises:
        OSError: the system refuses to give it its name.
    """
    target = path.resolve()
    if (target.exists() and not target.is_file()) or not os.access(target.parent, os.W_OK):
        yield path
        return
    partial = target.with_name(f".{target.stem}-{secrets.token_hex(8)}{target.suffix}")
    with _removed_at_the_end(partial):
        yield partial
        partial.replace(target)


@contextlib.contextmanager
def _removed_at_the_end(path: Path) -> Iterator[None]:
    _unfinished.add(path)
    try:
        yield
    finally:
        _remove(path)
        _unfinished.discard(path)


def remove_unfinished() -> None:
    """Remove all that this process works in, since it ends now."""
    for path in tuple(_unfinished):
        _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def remove_left_over(parent: Path, prefix: str) -> None:
    """Remove the folders of that name which nobody holds; what cannot be removed stays."""
    for folder in _named(parent, prefix):
        with hold(folder) as free:
            if free:
                shutil.rmtree(folder, ignore_errors=True)


def left_over(parent: Path, prefix: str) -> Path | None:
    """The newest folder of that name that nobody holds, if there is one."""
    found = []
    for folder in _named(parent, prefix):
        with hold(folder) as free:
            if free:
                found.append(folder)
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def is_held(parent: Path, prefix: str) -> bool:
    """Whether a process works in a folder of that name."""
    for folder in _named(parent, prefix):
        with hold(folder) as free:
            if not free and folder.is_dir():
                return True
    return False


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder; those of processes that were killed are removed on the way.

    Raises:
        OSError: the system refuses to make it.
    """
    parent = Path(tempfile.gettempdir())
    remove_left_over(parent, _SCRATCH)
    with new_held(parent, _SCRATCH) as folder:
        folder.chmod(0o700)
        yield folder


def _named(parent: Path, prefix: str) -> list[Path]:
    """Our own folders of that name; those of other users are none of our business."""
    with contextlib.suppress(OSError):
        return sorted(
            Path(entry.path) for entry in os.scandir(parent)
            if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False)
            and entry.stat(follow_symlinks=False).st_uid == os.getuid()
        )
    return []
