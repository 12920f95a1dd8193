"""Files of tensors that commands write, by suffix: .safetensors, .pt, .npy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ringcompile.errors import RingCompileError
from ringcompile.held import whole_file

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
    _writer(path)
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
        with whole_file(path) as partial:
            _writer(path)(partial, dense)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RingCompileError(f"cannot write '{path}': {error}") from None


def _writer(path: Path) -> Callable[[Path, Tensors], None]:
    if path.suffix not in _WRITERS:
        raise RingCompileError(
            f"'{path}': unknown suffix '{path.suffix}'" if path.suffix else
            f"'{path}' has no suffix, which says what kind of file it is",
            hint=f"name it with one of: {', '.join(_WRITERS)}",
        )
    return _WRITERS[path.suffix]


def _write_numpy(path: Path, tensors: Tensors) -> None:
    (tensor,) = tensors.values()
    np.save(path, tensor.numpy(), allow_pickle=False)


_WRITERS: dict[str, Callable[[Path, Tensors], None]] = {
    ".safetensors": lambda path, tensors: save_file(dict(tensors), path),
    ".pt": lambda path, tensors: torch.save(dict(tensors), path),
    ".npy": _write_numpy,
}
