"""Digests of a tensor's data, block by block, so that whoever reads a part checks that part.

BLAKE3 is used, and not a checksum such as xxh3: a signed manifest vouches for the data only where
nobody can make other data with the same digests, and BLAKE3 still runs at the speed of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from ringcompile.errors import RingCompileError

# Larger blocks make a rank check more than it reads; smaller ones make the list of digests long
# (32 bytes a block: 4 MB for 140 GB of weights).
BLOCK_BYTES = 1 << 20
_DIGEST_BYTES = 32


def block_digests(data: torch.Tensor) -> str:
    """The digests of a tensor's blocks, in order, as one hexadecimal text.

    Args:
        data: contiguous and on the CPU; its bytes are taken as they lie in memory.
    """
    flat, blake3 = _bytes(data), hasher()
    blocks = range(0, len(flat), BLOCK_BYTES)
    return "".join(blake3(flat[start : start + BLOCK_BYTES]).hexdigest() for start in blocks)


def num_digits(num_bytes: int) -> int:
    """The length of the text that `block_digests` gives for so many bytes."""
    return -(-num_bytes // BLOCK_BYTES) * 2 * _DIGEST_BYTES


def first_damaged(data: torch.Tensor, digests: str, blocks: Iterable[int]) -> int | None:
    """The first of these blocks whose bytes are not what was saved; None if all are.

    Args:
        data: the whole tensor's bytes, as uint8; only the blocks asked for are read.
        digests: from `block_digests`.
        blocks: indices of blocks.
    """
    flat, blake3 = _bytes(data), hasher()
    for index in blocks:
        found = blake3(flat[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]).digest()
        digits = slice(index * 2 * _DIGEST_BYTES, (index + 1) * 2 * _DIGEST_BYTES)
        if found != bytes.fromhex(digests[digits]):
            return index
    return None


def blocks_of(shape: Sequence[int], itemsize: int, ranges: Sequence[range]) -> list[int]:
    """The blocks that hold a piece of a tensor, in order.

    Args:
        shape: of the whole tensor, row-major.
        itemsize: bytes of an element.
        ranges: what is read of the leading dims; later dims are read whole.
    """
    ranges = list(ranges)
    while ranges and ranges[-1] == range(shape[len(ranges) - 1]):
        ranges.pop()
    strides = [itemsize]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    whole = itemsize
    for size in shape:
        whole *= size
    if not whole or any(not len(cut) for cut in ranges):
        return []
    if not ranges:
        return list(range(-(-whole // BLOCK_BYTES)))
    *outer, last = ranges
    starts = np.array([last.start * strides[len(outer)]])
    for cut, stride in zip(outer, strides, strict=False):
        starts = (np.arange(cut.start, cut.stop)[:, None] * stride + starts.ravel()).ravel()
    stops = starts + len(last) * strides[len(outer)] - 1
    return _covered(starts // BLOCK_BYTES, stops // BLOCK_BYTES)


def _covered(firsts: np.ndarray, lasts: np.ndarray) -> list[int]:
    """All numbers from `firsts[i]` to `lasts[i]`, for any i."""
    edges = np.zeros(int(lasts.max()) + 2, dtype=np.int64)
    np.add.at(edges, firsts, 1)
    np.add.at(edges, lasts + 1, -1)
    return [int(index) for index in np.flatnonzero(edges.cumsum())]


@cache
def hasher() -> Callable[..., Any]:
    """BLAKE3, of a package that is imported when a digest is needed.

    Raises:
        RingCompileError: it is not installed.
    """
    try:
        from blake3 import blake3
    except ImportError:
        raise RingCompileError(
            "the digests of weights need the package blake3, which is not installed here",
            hint="pip install blake3",
        ) from None
    return blake3


def _bytes(data: torch.Tensor) -> memoryview:
    flat = data.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
