"""What each rank has of the outputs of a run, where they are not put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.runtime.batches import joined
from ringcompile.runtime.outputs import positions_of
from ringcompile.runtime.tasks import RankRun


@dataclass(frozen=True)
class Share:
    """What one rank has of the outputs of a run.

    Attributes:
        rank: the rank.
        outputs: its share of every output, nested as the model returns them; () on the ranks of
            pipeline stages that return nothing.
        positions: for every output, nested likewise, where in the sequence its rows stand (int64);
            rows whose position is not below the length of the sequence are padding. None for an
            output without a dim of the sequence.
    """

    rank: int
    outputs: Any
    positions: Any


def share_of_rank(program: Program, run: RankRun, last: int | None = None) -> Share:
    """What a rank has of the outputs of a run.

    Args:
        program: that rank's.
        run: what it kept.
        last: the number of last positions that were kept; None for all.
    """
    rank = run.stats.rank
    if not program.outputs:
        return Share(rank, (), ())
    lengths, build = run.dealt.lengths, program.output_structure.build
    rows = [positions_of(program, type_of(node), lengths, last) for node in program.outputs]
    return Share(rank, build(joined(program, run.microbatches, lengths)), build(rows))
