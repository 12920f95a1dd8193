"""`--overlap`: how far a compiled program lets transfers overlap with compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ringcompile.commands.options import complete_clusters
from ringcompile.cost.hardware import load_cluster
from ringcompile.later import Later
from ringcompile.mesh import Mesh
from ringcompile.options import HALVES, NONE, OVERLAPS

if TYPE_CHECKING:
    from ringcompile.cost import node_times
    from ringcompile.ir.program import Program
    from ringcompile.passes.rank import schedule
else:
    node_times = Later("ringcompile.cost.node_times")
    schedule = Later("ringcompile.passes.rank.schedule")

# Times are estimated for a sequence of this length where none is fixed.
NOMINAL_LENGTH = 16384


@dataclass(frozen=True)
class Overlap:
    """How far transfers may overlap with compute.

    Attributes:
        kind: one of `OVERLAPS`.
        cluster: the hardware whose times the schedule is made for.
    """

    kind: str
    cluster: str

    def mesh(self, parallel: str) -> Mesh:
        """The mesh of a parallel spec, with the axis that this kind adds."""
        mesh = Mesh.parse(parallel)
        return mesh.with_axis(HALVES, 2) if self.kind == HALVES else mesh

    def schedule(
        self, program: Program, mesh: Mesh, length: int | None
    ) -> schedule.Schedule | None:
        """The pass that orders ranks' programs; see `schedule_for`."""
        return schedule_for(self.kind, self.cluster, program, mesh, length)


def overlap_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of commands that compile; the command takes them as `overlap`, an `Overlap`."""

    @functools.wraps(command)
    def call(overlap: str, overlap_on: str, **given: Any) -> Any:
        return command(overlap=Overlap(overlap, overlap_on), **given)

    kind = click.option(
        "--overlap", type=click.Choice(OVERLAPS), default=NONE, show_default=True,
        help="How communication overlaps with compute. none: ops keep the order of the model. "
        "schedule: transfers start as early as possible. halves: also split the batch into two "
        "halves, so that one computes while the other communicates (the axis halves=2).",
    )
    where = click.option(
        "--overlap-on", default="h100x16", show_default=True, metavar="NAME|FILE",
        shell_complete=complete_clusters,
        help="With --overlap: the hardware that the order is optimized for.",
    )
    return kind(where(call))


def schedule_for(
    kind: str, cluster: str, program: Program, mesh: Mesh, length: int | None
) -> schedule.Schedule | None:
    """The pass that orders ranks' programs; None where they stay as they are.

    Args:
        kind: of `OVERLAPS`.
        cluster: whose times count.
        program: the model; a length that its code allows is taken where none is given.
        mesh: the parallel plan.
        length: the one that the program is made for.

    Raises:
        RingCompileError: an unknown cluster, one that is too small, or a malformed file.
    """
    if kind == NONE:
        return None
    low, high = program.length_range
    taken = length or max(low, min(NOMINAL_LENGTH, high or NOMINAL_LENGTH))
    times = node_times.node_times(load_cluster(cluster).sized(mesh.world_size), taken)
    return schedule.Schedule(times)
