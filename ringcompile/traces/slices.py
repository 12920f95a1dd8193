"""What a timeline consists of: slices on the tracks of ranks, and samples of their memory."""

from __future__ import annotations

from dataclasses import dataclass, field

COMPUTE = "compute"
COMMUNICATION, WAIT = "communication", "wait"


@dataclass(frozen=True)
class Slice:
    """A period of time on a track of a rank.

    Attributes:
        rank: the rank.
        track: "compute", "host", or the mesh axis of a transfer.
        node: the name of the node in the rank's program.
        kind: the kind of work: "matmul", "attention", "memory", "communication", "wait", ...
        start: in seconds from the start of the run.
        end: likewise.
        microbatch: its number.
        critical: whether it is on the critical path, where that is known.
    """

    rank: int
    track: str
    node: str
    kind: str
    start: float
    end: float
    microbatch: int = 0
    critical: bool | None = None


@dataclass(frozen=True)
class MemoryTrack:
    """The bytes that a rank holds from a moment on, in seconds from the start of the run."""

    rank: int
    time: float
    num_bytes: int


@dataclass(frozen=True)
class Trace:
    """A timeline of all ranks.

    Attributes:
        title: what it is of.
        slices: of all ranks; those of one track do not overlap.
        memory: of all ranks.
        facts: what else a reader should know, by name.
    """

    title: str
    slices: tuple[Slice, ...]
    memory: tuple[MemoryTrack, ...] = ()
    facts: dict[str, str | float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The end of the last slice."""
        return max((one.end for one in self.slices), default=0.0)


def one_after_another(slices: list[Slice]) -> list[Slice]:
    """Slices of one track, in order of their ends, each cut to begin where the one before it ends.

    Transfers of one axis follow one another, though a program may start the next one early.
    """
    made, before = list[Slice](), 0.0
    for one in sorted(slices, key=lambda one: (one.end, one.start)):
        start = max(one.start, before)
        if one.end > start:
            made.append(
                Slice(one.rank, one.track, one.node, one.kind, start, one.end, one.microbatch,
                      one.critical)
            )
            before = one.end
    return made
