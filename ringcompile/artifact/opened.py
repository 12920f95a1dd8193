"""Files and folders held open: whoever opened a version keeps it, whatever takes its name later.

Only regular files are opened. A pipe would make a reader wait for ever, a device has no end, and
a link in an artifact's own folder would lead out of it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import weakref
from pathlib import Path
from typing import Any

import torch

from ringcompile.errors import RingCompileError

DAMAGED = "copy the whole folder again, or run `ringcompile transform` again"
_REPLACED = "read it again; whatever replaced it is complete"


def unreadable(path: Path, error: OSError) -> RingCompileError:
    """The error for a file or folder that the system does not let us read."""
    return RingCompileError(f"cannot read '{path}': {error.strerror or error}")


def regular_size(path: Path, folder: OpenFolder | None = None) -> int:
    """The size of a regular file, which is not opened: a device may do something then.

    Args:
        path: its path, also for messages.
        folder: the folder that is searched for the file's name, in place of the path's own; a link
            in it is refused.

    Raises:
        FileNotFoundError: there is none.
        RingCompileError: it is no regular file, or the system does not tell.
    """
    name, place = (path, None) if folder is None else (path.name, folder.descriptor)
    try:
        found = os.stat(name, dir_fd=place, follow_symlinks=folder is None)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise _named(path, error) from error
    return _checked_regular(path, found)


class OpenFile:
    """A regular file held open for reading.

    Args:
        path: its path, also for messages.
        folder: the folder that is searched for the file's name, in place of the path's own.

    Attributes:
        size: its bytes when it was opened.

    Raises:
        FileNotFoundError: there is none.
        RingCompileError: it is no regular file, or, with `folder`, a link; or it cannot be read.
    """

    def __init__(self, path: Path, folder: OpenFolder | None = None) -> None:
        self.path = Path(os.path.abspath(path))
        regular_size(path, folder)
        name, place = (path, None) if folder is None else (path.name, folder.descriptor)
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK | (0 if folder is None else os.O_NOFOLLOW)
            self.descriptor = os.open(name, flags, dir_fd=place)
            weakref.finalize(self, os.close, self.descriptor)
            found = os.fstat(self.descriptor)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise _named(path, error) from error
        self.size = _checked_regular(path, found)

    def read(self, start: int = 0, size: int | None = None) -> bytes:
        """Some bytes of the file, fewer where it ends; all of it by default.

        Raises:
            RingCompileError: the system refuses.
        """
        wanted = self.size - start if size is None else size
        pieces = []
        try:
            while wanted > 0 and (piece := os.pread(self.descriptor, wanted, start)):
                pieces.append(piece)
                start, wanted = start + len(piece), wanted - len(piece)
        except OSError as error:
            raise unreadable(self.path, error) from error
        return b"".join(pieces)

    def mapped(self, start: int, stop: int) -> torch.Tensor:
        """Bytes `start` to `stop` as a uint8 tensor over the file's own pages.

        Processes that map the same bytes share their memory; writing to the tensor changes neither
        the file nor what others see. The range has to lie in the file.

        Raises:
            RingCompileError: the file became shorter, or the system refuses.
        """
        if os.fstat(self.descriptor).st_size < stop:
            raise RingCompileError(f"'{self.path}' became shorter after it was opened",
                                   hint=DAMAGED)
        if start == stop:
            return torch.empty(0, dtype=torch.uint8)
        begin = start - start % mmap.ALLOCATIONGRANULARITY
        try:
            pages = mmap.mmap(
                self.descriptor, stop - begin, access=mmap.ACCESS_COPY, offset=begin
            )
        except OSError as error:
            raise unreadable(self.path, error) from error
        return torch.frombuffer(pages, dtype=torch.uint8, offset=start - begin)

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFile, (self.path,)


class OpenFolder:
    """A folder held open: its files are found in it even when another one has taken its name.

    Raises:
        RingCompileError: there is none, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, ValueError) as error:
            raise _named(path, error) from error
        weakref.finalize(self, os.close, self.descriptor)

    def file(self, name: str) -> OpenFile:
        """A file of the folder.

        Raises:
            RingCompileError: it is missing, or no regular file.
        """
        try:
            return OpenFile(self.path / name, self)
        except FileNotFoundError:
            raise self.missing(name) from None

    def size(self, name: str) -> int:
        """The size of a regular file of the folder, which is not opened.

        Raises:
            RingCompileError: it is missing, or no regular file.
        """
        try:
            return regular_size(self.path / name, self)
        except FileNotFoundError:
            raise self.missing(name) from None

    def missing(self, name: str) -> RingCompileError:
        """The error for a file that is not in the folder (any more)."""
        here = None
        with contextlib.suppress(OSError):
            here = os.stat(self.path)
        if here is None or not os.path.samestat(here, os.fstat(self.descriptor)):
            return RingCompileError(
                f"'{self.path}' was replaced or removed while '{name}' was about to be read",
                hint=_REPLACED,
            )
        return RingCompileError(f"'{name}' is missing from '{self.path}'", hint=DAMAGED)


def _checked_regular(path: Path, found: os.stat_result) -> int:
    if stat.S_ISLNK(found.st_mode):
        raise RingCompileError(
            f"'{path}' is a link; the files of an artifact lie in its own folder",
            hint="copy the file that it leads to into the folder",
        )
    if not stat.S_ISREG(found.st_mode):
        raise RingCompileError(f"'{path}' is not a regular file", hint=DAMAGED)
    return found.st_size


def _named(path: Path, error: OSError | ValueError) -> RingCompileError:
    """The error of the system, with the path; a ValueError is a name with a zero byte."""
    if isinstance(error, OSError):
        return unreadable(path, error)
    return RingCompileError(f"cannot read {str(path)[:80]!r}: {error}")
