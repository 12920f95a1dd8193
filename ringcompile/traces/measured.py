"""A measured timeline: what all ranks wrote down while they ran, as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ringcompile.traces.nodes import Nodes
from ringcompile.traces.slices import MemoryTrack, Slice, Trace, one_after_another

OP = "op"  # the kind of what computes; the node says which


@dataclass(frozen=True)
class RankTrace:
    """What one rank wrote down while it ran, in seconds of rank 0's clock.

    Attributes:
        rank: which.
        slices: track, node, kind ("op", "wait" or "communication"), start, end, microbatch.
        memory: moments, and the bytes held from then on: of the process, or on its GPU.
        lengths: the values of size symbols in its program.
        error: seconds by which its clock may differ from rank 0's.
    """

    rank: int
    slices: list[tuple[str, str, str, float, float, int]]
    memory: list[tuple[float, int]]
    lengths: dict[str, int]
    error: float

    def to_json(self) -> str:
        """As text, to be sent to rank 0."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankTrace:
        """What `to_json` gave."""
        return cls(**json.loads(text))


def measured(
    everyones: Sequence[RankTrace], nodes: Nodes, title: str, facts: dict[str, str | float]
) -> Trace:
    """The timeline of a run, which begins with the first op of any rank.

    Args:
        everyones: of each rank.
        nodes: of the programs.
        title: shown with the trace.
        facts: kept with it.
    """
    first = min((one[3] for found in everyones for one in found.slices), default=0.0)
    slices: list[Slice] = []
    for found in everyones:
        tracks: dict[str, list[Slice]] = {}
        for track, node, kind, start, end, microbatch in found.slices:
            known = nodes.about(found.rank, node).kind if kind == OP else kind
            tracks.setdefault(track, []).append(
                Slice(found.rank, track, node, known, start - first, end - first, microbatch)
            )
        slices += [one for each in tracks.values() for one in one_after_another(each)]
    memory = tuple(_changes(everyones, first))
    error = max((found.error for found in everyones), default=0.0)
    return Trace(
        title, tuple(slices), memory, {"kind": "measured", "clock_error_us": error * 1e6, **facts}
    )


def _changes(everyones: Sequence[RankTrace], first: float) -> list[MemoryTrack]:
    made = []
    for found in everyones:
        before = None
        for moment, num_bytes in found.memory:
            if num_bytes != before:
                before = num_bytes
                made.append(MemoryTrack(found.rank, max(0.0, moment - first), num_bytes))
    return made
