"""Reading safetensors files: a table of tensors at the front, and their bytes behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ringcompile.artifact.fields import count, expect, member
from ringcompile.artifact.files import digest, parse_json
from ringcompile.artifact.opened import OpenFile
from ringcompile.errors import RingCompileError

# The dtypes that safetensors has, by its names for them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_MAX_HEADER = 100_000_000  # safetensors' own limit
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file: its dtype by safetensors' name, its shape, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file, held open.

    Attributes:
        file: the file.
        header_sha256: the digest of the part that says which tensors lie where.
        entries: its tensors by name.
    """

    file: OpenFile
    header_sha256: str
    entries: Mapping[str, TensorEntry]

    def bytes_of(self, tensor: str) -> torch.Tensor:
        """The bytes of a tensor of the file, as uint8, over the file's own pages."""
        entry = self.entries[tensor]
        return self.file.mapped(entry.start, entry.stop)

    def record(self) -> dict[str, Any]:
        """What a manifest says of the file: its size and the digest of its header."""
        return {"bytes": self.file.size, "header_sha256": self.header_sha256}


def read_tensor_file(file: OpenFile, hint: str) -> TensorFile:
    """Read the header of a file that may be anything.

    Args:
        file: the file, which stays open.
        hint: of the error.

    Raises:
        RingCompileError: it is no safetensors file, or its header does not fit its size.
    """
    start = file.read(0, _LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    try:
        if not 2 <= length <= min(_MAX_HEADER, file.size - _LENGTH_BYTES):
            raise RingCompileError(f"a header of {length} bytes does not fit it")
        header = file.read(_LENGTH_BYTES, length)
        entries = _entries(parse_json(header), _LENGTH_BYTES + length, file.size)
    except RingCompileError as error:
        raise RingCompileError(
            f"cannot read '{file.path}' as a safetensors file: {error.message}", hint=hint
        ) from None
    return TensorFile(file, digest(start + header), entries)


def _entries(header: dict[str, Any], start: int, size: int) -> dict[str, TensorEntry]:
    entries = {
        name: _entry(name, row, start) for name, row in header.items() if name != "__metadata__"
    }
    held = sorted((entry.start, entry.stop) for entry in entries.values())
    edges = [(start, start), *held, (size, size)]
    if any(before[1] != after[0] for before, after in pairwise(edges)):
        raise RingCompileError("its tensors overlap, leave gaps or do not end with the file")
    return entries


def _entry(name: str, row: Any, start: int) -> TensorEntry:
    row = expect(row, dict, f"tensor '{name[:80]}'")
    dtype, offsets = member(row, "dtype", str), member(row, "data_offsets", list)
    shape = tuple(count(size, f"a size of '{name[:80]}'") for size in member(row, "shape", list))
    if len(offsets) != 2:
        raise RingCompileError(f"'data_offsets' of '{name[:80]}' is not a pair")
    first, last = (count(offset, f"an offset of '{name[:80]}'") for offset in offsets)
    if dtype in DTYPES and last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise RingCompileError(f"tensor '{name[:80]}' does not have the bytes of its shape")
    return TensorEntry(dtype, shape, start + first, start + last)
