"""Small collectives between ranks of one machine, straight over a socket for each pair of them.

gloo takes 0.3 to 1 ms for a collective of a few kilobytes: three threads wake one another on every
rank, and a message goes through TCP. A program that makes one token waits for 60 of them. Here
every rank sends what it brings to every other one, and computes the answer itself, as `lockstep`
does. So the answer is the same on all ranks to the last bit. Large collectives stay with gloo,
which sends each rank its part only.
"""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import torch

from ringcompile.runtime.collectives import ANSWERS, Collective

# Bytes of a message that goes this way: a socket holds two of them while its reader computes.
MOST_BYTES = 1 << 16
# Ranks of a job: every pair of them has a socket, which is two open files while they start.
MOST_RANKS = 8
# Exchanges to which every rank brings as much as any other.
_KINDS = frozenset({"gather", "all_reduce", "reduce_scatter", "all_to_all"})
# A checksum of what is exchanged, and the bytes behind it.
_HEAD = struct.Struct("=II")


def connected_pairs(context: ForkServerContext, num_ranks: int) -> list[dict[int, Connection]]:
    """For each rank its end of a connection to every other rank, by the other's number."""
    ends: list[dict[int, Connection]] = [{} for _ in range(num_ranks)]
    if num_ranks <= MOST_RANKS:
        for first in range(num_ranks):
            for second in range(first + 1, num_ranks):
                ends[first][second], ends[second][first] = context.Pipe()
    return ends


class Links:
    """A rank's sockets to the other ranks of its machine.

    Args:
        index: this rank.
        ends: of `connected_pairs`; they are taken over.
        timeout: seconds that an exchange may take.
    """

    def __init__(self, index: int, ends: Mapping[int, Connection], timeout: float) -> None:
        self.index = index
        self.sockets = {peer: _socket(end, timeout) for peer, end in ends.items()}
        self._checks: dict[tuple[str, str, str], int] = {}

    def carries(self, asked: Collective, ranks: Iterable[int]) -> bool:
        """Whether a collective goes this way; the same on all of its ranks."""
        return (
            asked.kind in _KINDS
            and 0 < asked.tensor.nbytes <= MOST_BYTES
            and asked.tensor.device.type == "cpu"
            and all(rank == self.index or rank in self.sockets for rank in ranks)
        )

    def meet(self, asked: Collective, ranks: Sequence[int]) -> Any:
        """What a collective gives this rank; see `ANSWERS`.

        Args:
            asked: this rank's part in it.
            ranks: of the group, in the order of the axis.

        Raises:
            RuntimeError: a rank has ended, is in another exchange, or does not answer in time.
        """
        mine, place = asked.tensor, ranks.index(self.index)
        parts = mine.new_empty((len(ranks), *mine.shape))
        parts[place] = mine
        rows = [memoryview(row) for row in parts.view(len(ranks), -1).view(torch.uint8).numpy()]
        head = _HEAD.pack(self._check(asked), mine.nbytes)
        for peer in ranks:
            if peer != self.index:
                self._send(peer, [head, rows[place]])
        for peer, row in zip(ranks, rows, strict=True):
            if peer != self.index:
                self._receive(peer, head, row)
        brought = [
            Collective(asked.node, asked.kind, asked.axis, part, asked.detail)
            for part in parts.unbind()
        ]
        return ANSWERS[asked.kind](brought, place)

    def _check(self, asked: Collective) -> int:
        key = asked.kind, asked.node, asked.detail
        if key not in self._checks:
            self._checks[key] = zlib.crc32("\n".join(key).encode())
        return self._checks[key]

    def _send(self, peer: int, buffers: Sequence[bytes | memoryview]) -> None:
        try:
            sent = self.sockets[peer].sendmsg(buffers)
        except OSError as error:
            raise RuntimeError(_reason(error, peer)) from error
        if sent != sum(map(len, buffers)):
            raise RuntimeError(f"rank {peer} does not take what is sent")

    def _receive(self, peer: int, expected: bytes, row: memoryview) -> None:
        """What a peer brings, written to `row`."""
        head = bytearray(len(expected))
        buffers = [memoryview(head), row]
        while buffers:
            try:
                count = self.sockets[peer].recvmsg_into(buffers)[0]
            except OSError as error:
                raise RuntimeError(_reason(error, peer)) from error
            if not count:
                raise RuntimeError(f"connection closed by rank {peer}")
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                buffers[0] = buffers[0][count:]
            if len(buffers) < 2 and head != expected:
                raise RuntimeError(f"rank {peer} is in another exchange")


def _socket(end: Connection, timeout: float) -> socket.socket:
    """The socket of a connection, whose calls fail after so many seconds."""
    made = socket.socket(fileno=os.dup(end.fileno()))
    end.close()
    limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        made.setsockopt(socket.SOL_SOCKET, option, limit)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        made.setsockopt(socket.SOL_SOCKET, option, 4 * MOST_BYTES)
    return made


def _reason(error: OSError, peer: int) -> str:
    if isinstance(error, BlockingIOError):
        return f"rank {peer} did not answer in time"
    return f"connection to rank {peer} is lost: {error.strerror or error}"
