"""What a message is, said ahead of it: `run --check` compares both sides before a number is used.

A message of another shape than its receiver waits for ends a process of gloo, a shorter one leaves
a part of the buffer as it was, and two collectives that meet by accident give numbers. So each rank
sends, ahead of every message and to every peer of a collective, a *stamp*: the op, shape, dtype,
node, layer and line. Between two ranks and along one axis stamps arrive in the order in which
exchanges are started; a last one says that the program has ended, so that both have counted alike.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.runtime.collectives import Collective
from ringcompile.runtime.join import Rank

if TYPE_CHECKING:
    from ringcompile.runtime.executor import Shift

_BYTES = 4096  # of a stamp, filled up: the receiver has to know how many come
_LONGEST = 200  # characters of a text in it
_MESSAGE, _ENDED = "message", "end"


@dataclass(frozen=True)
class Stamp:
    """What one rank says of an exchange.

    Attributes:
        op: "message", the name of a collective, or "end".
        what: shape, dtype, and what else has to agree.
        node: the node that asks for it.
        location: the user's line behind it, and its layer.
    """

    op: str
    what: str = ""
    node: str = ""
    location: SourceLocation = field(default_factory=SourceLocation)

    def fits(self, other: Stamp) -> bool:
        """Whether two ranks mean the same exchange.

        In a message `what` names the value; its two ends are two nodes.
        """
        nodes = ("", "") if self.op == _MESSAGE else (self.node, other.node)
        return (self.op, self.what, nodes[0]) == (other.op, other.what, nodes[1])

    def __str__(self) -> str:
        if self.op == _ENDED:
            return "the end of its program"
        where = ", ".join(filter(None, (self.location.layer, str(self.location))))
        return f"{self.op} of {self.what} in %{self.node}" + (f" ({where})" if where else "")

    def to_tensor(self) -> torch.Tensor:
        """The stamp as it is sent: uint8, always as long."""
        at = self.location
        texts = (self.op, self.what, self.node, at.layer, at.file[-_LONGEST:], str(at.line))
        lines = [" ".join(text[:_LONGEST].splitlines()) for text in texts]
        data = "\n".join(lines).encode(errors="replace").ljust(_BYTES, b"\0")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, data: torch.Tensor) -> Stamp:
        """What was sent."""
        lines = data.numpy().tobytes().rstrip(b"\0").decode().split("\n")
        op, what, node, layer, file, line = lines
        return cls(op, what, node, SourceLocation(file, int(line), layer))


def stamp_of_message(
    shape: Iterable[int], dtype: torch.dtype, chunks: Iterable[int], of: str
) -> Stamp:
    """The stamp of a message, without its node."""
    about = f" of chunks {list(chunks)}" + (f" for %{of}" if of else "")
    return Stamp(_MESSAGE, f"{_name(dtype)} {list(shape)}{about}")


def stamp_of_collective(asked: Collective, rows: int | None = None) -> Stamp:
    """The stamp of a collective, for one peer.

    Args:
        asked: this rank's part in it.
        rows: where each rank sends as many rows as there are, those from the sender to the peer.
    """
    tensor = asked.tensor
    shape = list(tensor.shape if rows is None else (rows, *tensor.shape[1:]))
    detail = f" {asked.detail}" if asked.detail else ""
    return Stamp(asked.kind, f"{_name(tensor.dtype)} {shape}{detail}", asked.node)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expected(shift: Shift) -> Stamp:
    """The stamp of what a rank expects from the source of a shift."""
    return stamp_of_message(shift.shape, shift.dtype, shift.takes, shift.of)


def _brought(shift: Shift) -> Stamp:
    """The stamp of what a rank sends in a shift."""
    assert shift.tensor is not None
    return stamp_of_message(shift.tensor.shape, shift.tensor.dtype, shift.sends, shift.of)


@dataclass
class _Arriving:
    """A stamp on its way from a peer."""

    peer: int
    data: torch.Tensor
    work: dist.Work


@dataclass(eq=False)
class Checked:
    """A message that a rank waits for, and its stamp.

    Attributes:
        shift: what was asked for.
        stamp: what the sender says of it.
        receive: what receives it, where that begins once the stamp is compared.
    """

    shift: Shift
    stamp: _Arriving
    receive: dist.P2POp | None
    works: list[dist.Work] = field(default_factory=list)


@dataclass
class Stamps:
    """Sends a rank's stamps, and compares those of others with what it does itself.

    Making one is collective.

    Attributes:
        rank: this process' place.
        locations: by node, the user's line.
        axes: by axis, or axes that are communicated along together, the ranks of this rank's group.
    """

    rank: Rank
    locations: Mapping[str, SourceLocation]
    axes: dict[str, list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        wait = timedelta(seconds=self.rank.timeout)
        self.group = dist.new_group(backend="gloo", timeout=wait)
        self._tags: dict[str, int] = {}
        # NCCL does sends and receives in one go; a receiver of gloo must know the size.
        self._late = dist.get_backend() == "gloo"
        self._compared: Counter[tuple[str, int]] = Counter()
        self._waiting: dict[str, deque[Checked]] = {}
        self._sent: list[tuple[torch.Tensor, dist.Work]] = []

    def add(self, axis: str, ranks: list[int]) -> None:
        """Compare what is exchanged along one more axis; all ranks add the same ones in order."""
        self.axes[axis], self._tags[axis], self._waiting[axis] = ranks, len(self._tags), deque()

    def start(
        self, shift: Shift, ops: Sequence[dist.P2POp]
    ) -> tuple[Checked | None, list[dist.P2POp]]:
        """Send the stamp of a message, and be ready for that of the one which is expected.

        Args:
            shift: what the program asks for.
            ops: what it comes to.

        Returns:
            what `arrive` takes, if a message is expected; and the operations that are still to be
            started. With gloo nobody waits for what is sent before the run ends, for its receiver
            begins to receive late.
        """
        checked, left = None, []
        for op in ops:
            if op.op is dist.isend:
                self._send(shift.axis, op.peer, self._at(_brought(shift), shift.node))
            else:
                stamp = self._await(shift.axis, op.peer)
                checked = Checked(shift, stamp, op if self._late else None)
                self._waiting[shift.axis].append(checked)
            if not self._late:
                left.append(op)
            elif op.op is dist.isend:
                (work,) = dist.batch_isend_irecv([op])
                self._sent.append((op.tensor, work))
        return checked, left

    def arrive(self, checked: Checked) -> list[dist.Work]:
        """Compare a message's stamp, and those before it along its axis; what to wait for then.

        Raises:
            RingCompileError: as `compare`.
        """
        waiting = self._waiting[checked.shift.axis]
        while checked in waiting:
            first = waiting.popleft()
            mine = self._at(_expected(first.shift), first.shift.node)
            self._compare(first.shift.axis, first.stamp, mine)
            if first.receive is not None:
                first.works = dist.batch_isend_irecv([first.receive])
        works, checked.works = checked.works, []
        return works

    def meet(self, asked: Collective) -> None:
        """Compare a collective with all peers.

        Raises:
            RingCompileError: a peer does something else.
        """
        axis, ranks = asked.axis, self.axes[asked.axis]
        others = [(i, peer) for i, peer in enumerate(ranks) if peer != self.rank.index]
        sent, taken = asked.sends or [None] * len(ranks), asked.takes or [None] * len(ranks)
        for i, peer in others:
            self._send(axis, peer, self._at(stamp_of_collective(asked, sent[i]), asked.node))
        arriving = [(i, self._await(axis, peer)) for i, peer in others]
        for i, one in arriving:
            mine = self._at(stamp_of_collective(asked, taken[i]), asked.node)
            self._compare(axis, one, mine)

    def end(self) -> None:
        """Compare the ends of a run with all peers.

        Raises:
            RingCompileError: a peer has more to exchange.
        """
        for axis, ranks in self.axes.items():
            others = [peer for peer in ranks if peer != self.rank.index]
            for peer in others:
                self._send(axis, peer, Stamp(_ENDED))
            for one in [self._await(axis, peer) for peer in others]:
                self._compare(axis, one, Stamp(_ENDED))
        for _, work in self._sent:
            work.wait()
        self._sent.clear()
        self._compared.clear()

    def _at(self, stamp: Stamp, node: str) -> Stamp:
        return replace(stamp, node=node, location=self.locations.get(node, SourceLocation()))

    def _send(self, axis: str, peer: int, stamp: Stamp) -> None:
        data = stamp.to_tensor()
        work = dist.isend(data, peer, self.group, self._tags[axis])
        assert work is not None, "this rank is in the group"
        self._sent.append((data, work))

    def _await(self, axis: str, peer: int) -> _Arriving:
        data = torch.empty(_BYTES, dtype=torch.uint8)
        work = dist.irecv(data, peer, self.group, self._tags[axis])
        assert work is not None, "this rank is in the group"
        return _Arriving(peer, data, work)

    def _compare(self, axis: str, arriving: _Arriving, mine: Stamp) -> None:
        """Wait for a peer's stamp; RingCompileError, with both lines, where it does not fit."""
        arriving.work.wait()
        theirs = Stamp.from_tensor(arriving.data)
        self._compared[axis, arriving.peer] += 1
        if mine.fits(theirs):
            return
        at = mine if mine.node else theirs
        me, other = f"rank {self.rank.index}", f"rank {arriving.peer}"
        raise RingCompileError(
            f"{me} and {other} differ in exchange {self._compared[axis, arriving.peer]} between "
            "them "
            f"along '{axis}': {me} is at {mine}, {other} at {theirs}",
            hint="their programs do not fit together: run `ringcompile verify`, or transform the "
            "model again",
            location=at.location, node=at.node or None,
        )
