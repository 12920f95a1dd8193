"""Inputs from a file: safetensors, tensors saved by torch, or one array of numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ringcompile.errors import RingCompileError


def read_input_file(path: Path) -> Any:
    """Whole inputs: by name, in order, or the only one.

    A `.safetensors` file holds them by name; a `.pt` file a dict, a tuple or a tensor, and nothing
    but tensors is read from it; a `.npy` file one array.

    Raises:
        RingCompileError: the file is of another kind, or cannot be read.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise RingCompileError(
            f"cannot read inputs from '{path}': it is no {', '.join(_READERS)} file",
            hint="write them with safetensors.torch.save_file({name: tensor}, file)",
        )
    try:
        found = reader(path)
    except Exception as error:  # each reader raises kinds of its own for files that are damaged
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RingCompileError(f"cannot read inputs from '{path}': {first}") from error
    tensors = found.values() if isinstance(found, dict) else (
        found if isinstance(found, list | tuple) else [found]
    )
    if not all(torch.is_tensor(tensor) for tensor in tensors):
        raise RingCompileError(
            f"'{path}' holds other things than tensors",
            hint="save a dict of tensors by name, a tuple of tensors in order, or one tensor",
        )
    return found


def _torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _numpy(path: Path) -> Any:
    return torch.from_numpy(np.load(path, allow_pickle=False))


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": load_file, ".pt": _torch, ".npy": _numpy,
}
