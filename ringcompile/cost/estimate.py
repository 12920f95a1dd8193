"""Estimates of one variant: a quick one, or a close one from all ranks whose programs differ.

A quick estimate compiles one block of layers and simulates one rank, the one with the most work,
whose peers are assumed to be at the same point as it is. A long ring is estimated from two short
rings with as many tokens on each rank, and a pipeline from stages that are costed alone. A close
estimate simulates every place of the ring and every stage with the programs that are emitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, prod
from typing import Protocol

from ringcompile.axes import AXES
from ringcompile.cost import forks
from ringcompile.cost.hardware import Cluster
from ringcompile.cost.layers import Stack, repeat
from ringcompile.cost.rank import PIPELINE, RankCost, cost_of
from ringcompile.cost.scaling import busiest_stage, crossing_bytes, with_batch
from ringcompile.cost.simulate import simulate
from ringcompile.cost.specs import (
    Variant,
    one_stage,
    ranks_of,
    short_rings,
    slowest_place,
    with_ring,
)
from ringcompile.cost.timeline import How
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh

# The longest ring that is compiled as it is, and the most ranks of a close estimate.
_WHOLE_RING, _MOST_RANKS = 16, 16


class HasRanks(Protocol):
    """A program for all ranks."""

    def rank(self, rank: int, /) -> Program:
        """The program of one rank."""


# Makes the program of a variant for one sequence of a length (for two, if it computes halves), with
# one block for each stage if it has so many; raises RingCompileError for what cannot be.
Compile = Callable[[Variant, int], HasRanks]


@dataclass(frozen=True)
class Model:
    """What the planner knows of a model before it compiles it.

    Attributes:
        stack: the layers that repeat, if they do.
        weight_bytes: the size of all weights in bytes.
        length_range: the smallest and largest length that its code is valid for.
        order: the order of positions that gives all ranks the same attention work.
    """

    stack: Stack | None
    weight_bytes: int
    length_range: tuple[int, int | None] = (2, None)
    order: str = "zigzag"

    @property
    def outer_bytes(self) -> int:
        """The bytes of the weights outside the repeated blocks: embeddings, mostly."""
        return self.weight_bytes - (self.stack.num_bytes if self.stack else 0)

    def repeats(self, stages: int) -> bool:
        """Whether a program with one block per stage can represent a whole pipeline."""
        return self.stack is not None and self.stack.stands_for(stages)


@dataclass(frozen=True)
class Ask:
    """The question that the planner answers.

    Attributes:
        num_gpus: how many devices.
        cluster: the hardware.
        length: tokens of a sequence.
        batch: the number of sequences in a step.
        context: of programs for the next tokens, the tokens in the cache after the step; such a
            program computes the new tokens on every rank of `ring`.
    """

    num_gpus: int
    cluster: Cluster
    length: int
    batch: int = 1
    context: int | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens that a step processes."""
        return self.length * self.batch

    @property
    def room(self) -> float:
        """The number of bytes that a rank may hold."""
        device = self.cluster.device
        return device.value("memory") - device.value("reserved")


@dataclass(frozen=True)
class Estimate:
    """The result of a simulation.

    Attributes:
        seconds: the time of a step of all tokens, with the pipeline full.
        latency: the time from the start of a step to its end, in seconds.
        path: seconds on the longest path, by what they are spent on.
        memory_bytes: the peak memory of the rank that holds most.
    """

    seconds: float
    latency: float
    path: Mapping[str, float]
    memory_bytes: int

    @property
    def bound(self) -> str:
        """The kind of work on which most of the critical path is spent."""
        return max(self.path, key=lambda kind: self.path[kind], default="nothing")


def on_line(a: Estimate, b: Estimate, at: float) -> Estimate:
    """Extrapolate linearly from two estimates, `a` at 0 and `b` at 1."""

    def line(x: float, y: float) -> float:
        return max(x + at * (y - x), 0.0)

    kinds = {**a.path, **b.path}
    return Estimate(
        line(a.seconds, b.seconds),
        line(a.latency, b.latency),
        {kind: line(a.path.get(kind, 0.0), b.path.get(kind, 0.0)) for kind in kinds},
        round(line(a.memory_bytes, b.memory_bytes)),
    )


class FarError(Exception):
    """A lower bound already exceeds the time limit.

    Attributes:
        least: the lower bound.
    """

    def __init__(self, message: str, least: Estimate) -> None:
        super().__init__(message)
        self.least = least


class TooLargeError(Exception):
    """A rank needs more memory than a device has.

    Attributes:
        memory_bytes: the memory that it needs.
    """

    def __init__(self, memory_bytes: int) -> None:
        super().__init__(f"a rank holds {memory_bytes} bytes")
        self.memory_bytes = memory_bytes


@dataclass(frozen=True)
class CompiledForm:
    """The programs that one compilation yields.

    Attributes:
        variant: the spec and its options.
        length: the sequence length in tokens.
        ranks: the ranks whose programs are costed.
    """

    variant: Variant
    length: int
    ranks: tuple[int, ...]


@dataclass
class Estimator:
    """Estimates the variants of one model.

    Args:
        model: what is known of the model.
        ask: what is planned.
        compile_: see `Compile`.
    """

    model: Model
    ask: Ask
    compile_: Compile
    _hidden: int | None = field(default=None, init=False)
    _costs: dict[CompiledForm, list[RankCost] | RingCompileError] = field(
        default_factory=dict, init=False
    )

    def prepare(self, variants: Iterable[Variant], *, close: bool = False) -> None:
        """Compile now, several at a time, the programs that these variants' estimates need first.

        Args:
            variants: specs with their options.
            close: whether close estimates will follow.
        """
        if close:
            parts = [self._whole(v) for v in variants if self.can_be_close(v)]
        else:
            parts = [self._slowest(*self._rings(v)[0]) for v in variants]
        missing = [part for part in dict.fromkeys(parts) if part not in self._costs]
        self._costs.update(zip(missing, forks.mapped(self._compiled, missing), strict=True))

    def quick(self, variant: Variant, limit: float) -> Estimate:
        """A quick estimate, accurate to a few percent.

        Args:
            variant: the spec and its options.
            limit: the time limit in seconds; the estimate is abandoned once it is exceeded.

        Raises:
            RingCompileError: the compiler refuses it.
            TooLargeError: it needs more memory than a device has.
            FarError: it takes longer than the limit.
        """
        one, *two = self._rings(variant)
        if not two:
            return self._quick(*one, self.ask.room)
        short = self._quick(*one, inf)
        sizes = [ring.mesh.size("ring") for ring, _ in (one, *two)]
        if short.seconds > limit:
            raise FarError(
                f"a ring of {sizes[0]} with the same number of tokens per rank already takes "
                f"{short.seconds * 1e3:.4g} ms a step",
                short,
            )
        longer = self._quick(*two[0], inf)
        at = (variant.mesh.size("ring") - sizes[0]) / (sizes[1] - sizes[0])
        found = on_line(short, longer, at)
        if found.memory_bytes > self.ask.room:
            raise TooLargeError(found.memory_bytes)
        return found

    def can_be_close(self, variant: Variant) -> bool:
        """Whether a close estimate can be made in reasonable time."""
        ring, pp = variant.mesh.size("ring"), variant.mesh.size(PIPELINE)
        return ring <= _WHOLE_RING and ring * pp <= _MOST_RANKS

    def close(self, variant: Variant) -> Estimate:
        """An estimate from all ranks whose programs differ.

        Raises:
            RingCompileError: the compiler refuses it.
            TooLargeError: there is no room for it.
        """
        costs = self._costs_of(variant, self._whole(variant))
        return self._with_layers(variant, partial(self._repeated, costs), self._run, self.ask.room)

    def _rings(self, variant: Variant) -> list[tuple[Variant, int]]:
        """The variant and its length; for a long ring, two shorter rings and their lengths."""
        ring, length = variant.mesh.size("ring"), self.ask.length
        sizes = short_rings(variant.mesh, self.ask.cluster)
        shorter = [-(-length * size // ring) for size in sizes]
        low, high = self.model.length_range
        possible = all(low <= n and (high is None or n <= high) for n in shorter)
        if ring <= max(_WHOLE_RING, sizes[0]) or not possible:
            return [(variant, length)]
        rings = [with_ring(variant, size) for size in sizes]
        return list(zip(rings, shorter, strict=True))

    def _quick(self, variant: Variant, length: int, room: float) -> Estimate:
        costs = self._costs_of(variant, self._slowest(variant, length))
        if self._stages_alike(variant):
            programs = partial(self._staged, variant, costs, length)
            return self._with_layers(variant, programs, self._run_stage, room)
        return self._with_layers(variant, partial(self._repeated, costs), self._run, room)

    def _stages_alike(self, variant: Variant) -> bool:
        pp = variant.mesh.size(PIPELINE)
        return pp == 1 or self.model.repeats(pp)

    def _slowest(self, variant: Variant, length: int) -> CompiledForm:
        """The slowest rank of one stage alone, which many meshes have in common.

        Where stages differ, the slowest rank of each stage.
        """
        variant = one_stage(variant) if self._stages_alike(variant) else variant
        return _part(variant, length, [slowest_place(variant)])

    def _whole(self, variant: Variant) -> CompiledForm:
        """The ranks at every place of the ring, in all stages."""
        return _part(variant, self.ask.length, range(variant.mesh.size("ring")))

    def _costs_of(self, variant: Variant, part: CompiledForm) -> list[RankCost]:
        """The costs of the ranks of a part, for the number of sequences in one microbatch."""
        if part not in self._costs:
            self._costs[part] = self._compiled(part)
        found = self._costs[part]
        if isinstance(found, RingCompileError):
            raise found
        return [with_batch(cost, self._batch(variant)) for cost in found]

    def _compiled(self, part: CompiledForm) -> list[RankCost] | RingCompileError:
        try:
            made = self.compile_(part.variant, part.length)
            return [self._cost(made, rank, part.length) for rank in part.ranks]
        except RingCompileError as error:
            return error

    def _cost(self, made: HasRanks, rank: int, length: int) -> RankCost:
        return cost_of(made.rank(rank), length, context=self.ask.context)

    def _staged(
        self, variant: Variant, costs: Sequence[RankCost], length: int, blocks: int
    ) -> list[RankCost]:
        """The stage with the most work; without a pipeline, the whole model."""
        (one,), pp = self._repeated(costs, blocks), variant.mesh.size(PIPELINE)
        if pp == 1:
            return [one]
        shares = prod(size for axis, size in variant.mesh.axes if AXES[axis].own_tokens)
        if self.ask.context is not None:
            shares = 1
        if variant.tp_sequence:
            shares *= variant.mesh.size("tp")
        apart = variant.mesh.world_size // pp
        crossing = self._hidden_bytes() * length // self.ask.length // shares
        crossing *= self._batch(variant)
        return [busiest_stage(one, pp, apart, crossing)]

    def _hidden_bytes(self) -> int:
        """The bytes that cross between stages for one sequence, taken from a two-stage pipeline."""
        if self._hidden is None:
            made = self.compile_(Variant(Mesh(((PIPELINE, 2),))), self.ask.length)
            self._hidden = crossing_bytes(self._cost(made, 0, self.ask.length))
        return self._hidden

    def _repeated(self, costs: Sequence[RankCost], blocks: int) -> list[RankCost]:
        stack = self.model.stack
        return list(costs) if stack is None else [repeat(cost, stack, blocks) for cost in costs]

    def _with_layers(
        self,
        variant: Variant,
        programs: Callable[[int], list[RankCost]],
        run: Callable[[Variant, list[RankCost]], Estimate],
        room: float,
    ) -> Estimate:
        """Cost all layers of a stage, or extrapolate from a few blocks and one block more.

        Raises TooLargeError before anything that does not fit in memory is simulated.
        """
        stack, pp = self.model.stack, variant.mesh.size(PIPELINE)
        blocks = stack.blocks(pp) if stack is not None and self.model.repeats(pp) else 1
        low = int(blocks) if blocks in (1, 2, 3, 4) else 2 if blocks > 2 else 1
        made = [programs(low)] if low == blocks else [programs(low), programs(low + 1)]
        few, *more = [max(cost.peak_bytes for cost in costs) for costs in made]
        memory = round(few + sum((blocks - low) * (other - few) for other in more))
        if memory > room:
            raise TooLargeError(memory)
        found, *longer = [run(variant, costs) for costs in made]
        return on_line(found, longer[0], blocks - low) if longer else found

    def _batch(self, variant: Variant) -> int:
        """How often the program's own batch fits into one microbatch."""
        runs = variant.microbatches * variant.mesh.size("dp") * variant.sequences
        return self.ask.batch // runs

    def _run_stage(self, variant: Variant, costs: list[RankCost]) -> Estimate:
        """Simulate a pipeline: its slowest stage sets the pace, and a step passes all stages."""
        found = simulate(costs, self.ask.cluster, How(merged=True))
        count, stages = variant.microbatches, variant.mesh.size(PIPELINE)
        latency = found.seconds * (count + stages - 1)
        return Estimate(found.seconds * count, latency, found.path, found.memory_bytes)

    def _run(self, variant: Variant, costs: list[RankCost]) -> Estimate:
        """Simulate one step for the latency and several for the pace of a full pipeline."""
        mesh, count = variant.mesh, variant.microbatches
        one = simulate(costs, self.ask.cluster, How(count, merged=True))
        seconds = one.seconds
        if mesh.size(PIPELINE) > 1:
            many = How(mesh.size(PIPELINE) + 2, merged=True)
            seconds = simulate(costs, self.ask.cluster, many).period * count
        return Estimate(seconds, one.seconds, one.path, one.memory_bytes)


def _part(variant: Variant, length: int, places: Iterable[int]) -> CompiledForm:
    """Of all stages, at some places of the ring; programs are the same for all microbatches."""
    ranks = ranks_of(variant.mesh, places, range(variant.mesh.size(PIPELINE)))
    return CompiledForm(replace(variant, microbatches=1), length, tuple(ranks))
