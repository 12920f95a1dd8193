"""Files of tensors that commands read and write, by suffix: .safetensors, .pt, .npy."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ringcompile.errors import RingCompileError

_T = TypeVar("_T")
Tensors = Mapping[str, torch.Tensor]
# numpy has no name for these.
_NOT_IN_NUMPY = frozenset({torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2})


def check_writable(path: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """See before the work whether results can be written where they are wanted.

    Args:
        path: the file.
        dtypes: of the tensors it is to hold, by name.

    Raises:
        RingCompileError: an unknown suffix, a format that cannot hold them, or a place where no
            file can be written.
    """
    _kind(path, _WRITERS)
    if path.suffix == ".npy" and len(dtypes) != 1:
        raise RingCompileError(
            f"'{path}': a .npy file holds one tensor, and these are {len(dtypes)}: "
            f"{', '.join(dtypes)}",
            hint="write .safetensors or .pt",
        )
    for name, dtype in dtypes.items() if path.suffix == ".npy" else ():
        if dtype in _NOT_IN_NUMPY:
            raise RingCompileError(
                f"'{path}': numpy has no {str(dtype).removeprefix('torch.')}, which '{name}' is",
                hint="write .safetensors or .pt",
            )
    check_place(path)


def check_place(path: Path) -> None:
    """Raise RingCompileError where no file can be written."""
    if path.is_dir():
        raise RingCompileError(f"cannot write '{path}': it is a folder")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise RingCompileError(f"cannot write '{path}': there is no folder '{folder}'")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise RingCompileError(f"cannot write '{path}': permission denied")


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a file that `check_writable` found possible.

    Raises:
        RingCompileError: writing fails.
    """
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        _kind(path, _WRITERS)(path, dense)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RingCompileError(f"cannot write '{path}': {error}") from None


def read_tensors(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Whole inputs by name.

    Args:
        path: a .safetensors or .pt file with tensors by name, or a .npy file with one.
        names: of the program's inputs, in order: the one in a .npy file is the first.

    Raises:
        RingCompileError: the file cannot be read, or holds something else.
    """
    reader = _kind(path, _READERS)
    try:
        found = reader(path, names)
    except (OSError, SafetensorError, ValueError, RuntimeError, EOFError,
            pickle.UnpicklingError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RingCompileError(
            f"cannot read inputs from '{path}': {first}",
            hint="write them with safetensors.torch.save_file({name: tensor}, file)",
        ) from None
    if not all(torch.is_tensor(tensor) for tensor in found.values()):
        raise RingCompileError(f"'{path}' does not hold tensors by name")
    return found


def _kind(path: Path, table: Mapping[str, _T]) -> _T:
    if path.suffix not in table:
        raise RingCompileError(
            f"'{path}': unknown suffix '{path.suffix}'" if path.suffix else
            f"'{path}' has no suffix, which says what kind of file it is",
            hint=f"name it with one of: {', '.join(table)}",
        )
    return table[path.suffix]


def _write_numpy(path: Path, tensors: Tensors) -> None:
    (tensor,) = tensors.values()
    np.save(path, tensor.numpy(), allow_pickle=False)


def _read_torch(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if torch.is_tensor(found):
        return {names[0]: found}
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__}, not tensors by name")
    return found


def _read_numpy(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    return {names[0]: torch.from_numpy(np.load(path, allow_pickle=False))}


_WRITERS: dict[str, Callable[[Path, Tensors], None]] = {
    ".safetensors": lambda path, tensors: save_file(dict(tensors), path),
    ".pt": lambda path, tensors: torch.save(dict(tensors), path),
    ".npy": _write_numpy,
}
_READERS: dict[str, Callable[[Path, list[str]], dict[str, torch.Tensor]]] = {
    ".safetensors": lambda path, names: load_file(path),
    ".pt": _read_torch,
    ".npy": _read_numpy,
}
