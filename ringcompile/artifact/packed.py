"""Files of long programs are gzip files: one rank says much the same again and again.

A program for 128 ranks of a ring shrinks to a tenth. Short programs stay as they are, for any tool
to read; `zcat rank0.json.gz` shows a long one.
"""

from __future__ import annotations

import zlib
from collections.abc import Container
from pathlib import Path
from typing import Any

from ringcompile.artifact.fields import count
from ringcompile.artifact.files import write_bytes
from ringcompile.errors import RingCompileError

_SUFFIX = ".gz"
# Programs with a text at least so long are packed.
PACKED_FROM = 1 << 18
# No text of a program may be longer. Gzip can make a file a thousand times as long, so whatever
# a file says of its length has to be bounded before it is unpacked.
_LONGEST = 1 << 30
_LEVEL = 3  # the higher ones take several times as long for files that are a seventh smaller
_GZIP = 31  # to zlib: with gzip's header, in which no time is noted


def write_program_text(folder: Path, name: str, text: str) -> dict[str, Any]:
    """Write the JSON text of a program; the file's record for the manifest, by its name.

    Args:
        folder: where to.
        name: what the file is called if it is not packed.
        text: what it holds.
    """
    content = text.encode()
    if not PACKED_FROM <= len(content) <= _LONGEST:
        return {name: write_bytes(folder / name, content)}
    packer = zlib.compressobj(_LEVEL, wbits=_GZIP)
    record = write_bytes(
        folder / f"{name}{_SUFFIX}", packer.compress(content) + packer.flush()
    )
    return {f"{name}{_SUFFIX}": {**record, "unpacked_bytes": len(content)}}


def plain_program_name(name: str) -> str:
    """What the file of a program is called if it is not packed."""
    return name.removesuffix(_SUFFIX)


def stored_name(files: Container[str], name: str) -> str | None:
    """What the file of a program is called in an artifact; None where the program is not there.

    Args:
        files: the names in the artifact.
        name: what the file is called if it is not packed.
    """
    return next((found for found in (name, f"{name}{_SUFFIX}") if found in files), None)


def unpacked(name: str, content: bytes, record: dict[str, Any]) -> bytes:
    """The JSON text of a program.

    Args:
        name: of its file.
        content: of its file.
        record: of its file, from the manifest.

    Raises:
        RingCompileError: the file is packed, and not as its record says, or is too long.
    """
    if not name.endswith(_SUFFIX):
        return content
    size = count(record.get("unpacked_bytes"), "a program's length")
    if size > _LONGEST:
        raise RingCompileError(f"a program of {size} bytes is longer than {_LONGEST}")
    unpacker = zlib.decompressobj(wbits=_GZIP)
    try:
        text = unpacker.decompress(content, size + 1)
    except zlib.error as error:
        raise RingCompileError(f"not a gzip file: {error}") from None
    if len(text) != size or not unpacker.eof or unpacker.unused_data:
        raise RingCompileError(f"the file does not hold the {size} bytes that its record names")
    return text
