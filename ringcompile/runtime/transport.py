"""Values between processes of this machine: a pickle for the pipe, each tensor in a file.

Only our own processes write these, into a folder that is theirs alone; artifacts are never read
this way.
"""

from __future__ import annotations

import io
import pickle
from math import prod
from pathlib import Path
from typing import Any

import torch

from ringcompile.errors import RingCompileError


def pack(value: Any, folder: Path, prefix: str) -> bytes:
    """Pickle a value of any nesting; its tensors become files `folder/prefix-N`."""
    stream = io.BytesIO()
    _Pickler(stream, folder, prefix).dump(value)
    return stream.getvalue()


def unpack(message: bytes) -> Any:
    """What was packed. Its tensors are mapped, not copied: the files may then be deleted."""
    return pickle.loads(message)


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, folder: Path, prefix: str) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.folder, self.prefix, self.num_files = folder, prefix, 0

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        path = self.folder / f"{self.prefix}-{self.num_files}"
        self.num_files += 1
        flat = value.detach().cpu().contiguous().reshape(-1)
        try:
            flat.view(torch.uint8).numpy().tofile(path)
        except OSError as error:
            raise RingCompileError(
                f"cannot write {flat.nbytes} bytes to {path} for another process: {error}",
                hint="free space there, or let TMPDIR name another folder",
            ) from error
        return _mapped, (str(path), value.dtype, tuple(value.shape))


def _mapped(path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not prod(shape):
        return torch.empty(shape, dtype=dtype)
    # Private pages: whoever changes the tensor changes no one else's.
    return torch.from_file(path, shared=False, size=prod(shape), dtype=dtype).reshape(shape)
