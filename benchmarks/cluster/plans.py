"""What is run: the paper's two methods and the planner's best plan, at the size of the job."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cluster.hardware import decided
from benchmarks.gpu.programs import captured
from ringcompile import compiler
from ringcompile.cost.estimate import Ask
from ringcompile.cost.hardware import Cluster
from ringcompile.cost.node_times import node_times
from ringcompile.cost.specs import Variant
from ringcompile.mesh import Mesh
from ringcompile.options import HALVES, NONE
from ringcompile.parallel_program import ParallelProgram
from ringcompile.passes.rank.schedule import Schedule
from ringcompile.planning import plans_of
from ringcompile.runtime.join import Rank

MICROBATCHES = 8  # sequences of a step through a pipeline, so that all stages have work
PAPER, BASELINE, BEST = "RA+SP", "TP x PP", "best plan"


@dataclass(frozen=True)
class Method:
    """A way to run a model on all ranks of the job.

    Attributes:
        name: `RA+SP`, `TP x PP` or `best plan`.
        variant: the spec, with the options under which it is compiled.
    """

    name: str
    variant: Variant

    @property
    def batch(self) -> int:
        """The sequences of one step."""
        mesh = self.variant.mesh
        runs = MICROBATCHES if mesh.size("pp") > 1 else 1
        return runs * mesh.size("dp") * self.variant.sequences

    def compiled(self, model: str, length: int, cluster: Cluster) -> ParallelProgram:
        """The programs for all ranks."""
        variant = self.variant
        mesh = variant.mesh
        if variant.overlap == HALVES:
            mesh = mesh.with_axis(HALVES, variant.sequences)
        schedule = Schedule(node_times(cluster, length)) if variant.overlap != NONE else None
        return compiler.transform(
            captured(model), mesh, schedule=schedule, **variant.choices(length)
        )


def papers(world_size: int, capacity: str = "exact") -> list[Method]:
    """The paper's two methods for so many ranks: one ring, and two stages of tensor parallelism.

    Args:
        world_size: ranks of the job, an even number.
        capacity: how experts count tokens; the paper's count each rank's own ("local").
    """
    ring = Mesh.parse(f"ring={world_size}")
    half = world_size // 2
    stages = Mesh.parse(f"pp=2,tp={half}" if half > 1 else "pp=2")
    return [
        Method(BASELINE, Variant(stages, capacity=capacity)),
        Method(PAPER, Variant(ring, order="zigzag", capacity=capacity)),
    ]


def best(rank: Rank, model: str, length: int, cluster: Cluster) -> Method:
    """The first plan of the planner's list by this cluster's table; all ranks call it.

    Raises:
        RingCompileError: nothing fits.
    """
    ask = Ask(rank.world_size, cluster, length, 1)
    variant = decided(rank, lambda: plans_of(captured(model), ask)[0].variant)
    return Method(BEST, variant)
