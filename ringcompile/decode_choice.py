"""Which form of decoding is faster where several ranks share a cache: asked of the cost model.

In the simple form each of these ranks computes all of a layer, behind one all-gather. The Helix
form reads a part of the weights on each of them, and sums twice a layer. Few layers that are small
are waited for longer than they are read; large ones are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ringcompile.cost.collectives import collective_seconds
from ringcompile.cost.hardware import Cluster, load_cluster
from ringcompile.cost.rank import PIPELINE, RankCost, TimedCollective, cost_of
from ringcompile.cost.simulate import simulate
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram

# What a program is compiled for where nobody names the hardware.
CLUSTER = "h100x16"


@dataclass(frozen=True)
class DecodeStep:
    """The step that makes one token.

    Attributes:
        cluster: the hardware.
        context: the tokens in the cache.
        batch: sequences; None for as few as the program takes.
    """

    cluster: Cluster
    context: int
    batch: int | None = None

    @classmethod
    def of(cls, program: Program) -> DecodeStep:
        """A step with half of the cache in use, on the hardware that is taken for granted."""
        assert program.mesh is not None
        capacity = program.length_range[1]
        assert capacity is not None
        cluster = load_cluster(CLUSTER)
        size = program.mesh.world_size
        whole = -(-size // cluster.per_node) * cluster.per_node
        return cls(cluster.sized(size if size <= cluster.per_node else whole), -(-capacity // 2))

    def seconds(self, parallel: ParallelProgram) -> float:
        """The time of the step, by one rank of each stage: those of a stage do equal work."""
        return simulate(self._costs(parallel), self.cluster).seconds

    def may_gain(self, simple: ParallelProgram) -> bool:
        """Whether sharing the work out could save more than the sums behind it cost at least."""
        saved = cost = 0.0
        costs = self._costs(simple)
        for rank in costs:
            for step in rank.steps:
                if step.op == "merge_states":
                    cost += 2 * self._least_sum(rank)
        for kind, seconds in simulate(costs, self.cluster).path.items():
            saved += 0 if kind == "communication" else seconds
        return saved > cost

    def _least_sum(self, rank: RankCost) -> float:
        """The time of an all-reduce of next to nothing over the ranks that share a cache."""
        group = next(
            step.communicates.group for step in rank.steps
            if isinstance(step.communicates, TimedCollective)
        )
        return collective_seconds(self.cluster, TimedCollective("all_reduce", "", group, 2))

    def _costs(self, parallel: ParallelProgram) -> list[RankCost]:
        mesh = parallel.mesh
        ranks = [
            rank for rank in range(mesh.world_size)
            if not any(at for axis, at in mesh.coordinates(rank).items() if axis != PIPELINE)
        ]
        return [cost_of(parallel.rank(rank), 1, self.batch, self.context) for rank in ranks]


def faster_form(
    simple: ParallelProgram, helix: Callable[[], ParallelProgram]
) -> ParallelProgram:
    """The faster of both forms; the simple one where the tables do not say.

    Args:
        simple: the program for the next tokens in the simple form.
        helix: compiles it in the other form.
    """
    step = DecodeStep.of(simple.program)
    try:
        if step.may_gain(simple):
            other = helix()
            if step.seconds(other) < step.seconds(simple):
                return other
    except RingCompileError:  # a dtype that no table has, or heads that nothing divides
        return simple
    return simple
