"""Ranks the parallel specs that a cluster allows by what the cost model says of them.

Every mesh of the given size is considered. What cannot be is rejected as early as it can be known,
with the reason: by divisibility, by the bytes of the weights, by the compiler's own refusal, by a
bound on its time. The rest is compiled, for one layer where layers repeat and for the ranks that
stand for all, and simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Protocol

from ringcompile.cost.hardware import Cluster
from ringcompile.cost.layers import Stack, repeat
from ringcompile.cost.rank import RankCost, cost_of
from ringcompile.cost.simulate import Simulation, simulate
from ringcompile.cost.specs import (
    AXES,
    Variant,
    factorisations,
    reordered,
    representatives,
    short_rings,
    variants,
    with_ring,
)
from ringcompile.cost.timeline import How
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh

# Axes that are there to have fewer weights on each rank.
_SPLIT_WEIGHTS = ("pp", "ep", "tp")
# The places of longer rings are simulated one at a time, and these from shorter rings.
_WHOLE = 16
# On more devices than these, one place of every ring.
_FEW = 64
# What takes so many times the best plan's time is not looked at more closely.
_FAR = 1.5


class Parallel(Protocol):
    """A program for all ranks."""

    def rank(self, rank: int, /) -> Program:
        """The program of one rank."""


@dataclass(frozen=True)
class Model:
    """What the planner has to know of a model before it compiles it.

    Attributes:
        stack: the layers that repeat, if they do.
        weight_bytes: of all weights.
        length_range: the smallest and largest length that its code is valid for.
    """

    stack: Stack | None
    weight_bytes: int
    length_range: tuple[int, int | None] = (2, None)


@dataclass(frozen=True)
class Ask:
    """What is to be planned.

    Attributes:
        num_gpus: how many devices.
        cluster: of which kind.
        length: tokens of a sequence.
        batch: sequences of a step.
    """

    num_gpus: int
    cluster: Cluster
    length: int
    batch: int = 1

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.length * self.batch

    @property
    def room(self) -> float:
        """Bytes that a rank may hold."""
        device = self.cluster.device
        return device.value("memory") - device.value("reserved")


@dataclass(frozen=True)
class Plan:
    """A spec and what became of it.

    Attributes:
        variant: the spec with its options.
        tps: tokens a second, the pipeline being full; None where it was rejected.
        seconds: of a step of all tokens, likewise.
        latency: from a step's start to its end.
        bound: what most of the longest path is spent on.
        memory_bytes: the most that a rank holds.
        fits: whether that is there.
        why: what the time goes to, or why it was rejected.
    """

    variant: Variant
    tps: float | None
    seconds: float | None
    latency: float | None
    bound: str | None
    memory_bytes: int | None
    fits: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        """As `plan --json` prints it."""
        return {
            "spec": str(self.variant.mesh),
            "tps": self.tps,
            "tpot_ms": None if self.seconds is None else self.seconds * 1e3,
            "latency_ms": None if self.latency is None else self.latency * 1e3,
            "bound": self.bound,
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "why": self.why,
            "options": self.variant.options,
        }


@dataclass
class Planner:
    """Plans for one model and one ask.

    Args:
        model: what is known of the model.
        ask: what is to be planned.
        compile_: makes the program of a variant for a sequence length, with one layer for each
            stage if layers repeat; raises RingCompileError for what cannot be.
    """

    model: Model
    ask: Ask
    compile_: Callable[[Variant, int], Parallel]
    _refused: dict[tuple[str, int], str] = field(default_factory=dict, init=False)
    _capacities: tuple[str, ...] | None = field(default=None, init=False)
    _best: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self._best = dict.fromkeys(("exact", "local"), inf)

    def run(self) -> list[Plan]:
        """All plans: those that fit by tokens a second, then the rejected.

        Raises:
            RingCompileError: nothing fits into memory.
        """
        plans = [plan for mesh in self._meshes() for plan in self._plans(mesh)]
        plans.sort(key=lambda plan: (not plan.fits, -(plan.tps or 0.0)))
        if plans and not plans[0].fits:
            raise self._nothing_fits(plans)
        return plans

    def _meshes(self) -> list[Mesh]:
        """Even ones first: they are mostly among the best, which spares others a closer look."""
        meshes = list(factorisations(self.ask.num_gpus))
        if self.ask.cluster.num_nodes > 1:
            meshes = [other for mesh in meshes for other in reordered(mesh)]
        return sorted(meshes, key=lambda mesh: max(size for _, size in mesh.axes))

    def _plans(self, mesh: Mesh) -> Iterator[Plan]:
        reason = self._impossible(mesh)
        if reason:
            yield _rejected(Variant(mesh), reason)
            return
        first: Plan | None = None
        for variant in self._variants(mesh):
            hopeless = self._hopeless(first, variant)
            found = _rejected(variant, hopeless) if hopeless else self._plan(variant)
            first = first or found
            yield found

    def _variants(self, mesh: Mesh) -> list[Variant]:
        """Those that count capacity by each rank first: they are never slower."""
        found = list(variants(mesh, self.ask.batch))
        divided = any(mesh.size(axis) > 1 for axis in ("ring", "ulysses", "ep"))
        if not divided:
            return found
        if self._capacities is None:
            self._capacities = self._told_apart(found[0])
        return [replace(v, capacity=capacity) for v in found for capacity in self._capacities]

    def _told_apart(self, variant: Variant) -> tuple[str, ...]:
        """The capacity modes that make a difference to this model."""
        plans = [self._plan(replace(variant, capacity=c)) for c in ("local", "exact")]
        same = plans[0].seconds == plans[1].seconds
        return ("exact",) if same else ("local", "exact")

    def _hopeless(self, first: Plan | None, variant: Variant) -> str | None:
        """Why a form of a mesh need not be looked at: another form of it is far from the best."""
        if first is None or first.seconds is None or variant.ring == "gather":
            return None
        if first.seconds <= _FAR * self._best[first.variant.capacity]:
            return None
        best = self._best[first.variant.capacity]
        return (f"{first.variant} already takes {first.seconds * 1e3:.4g} ms a step, the best plan "
                f"{best * 1e3:.4g} ms")

    def _impossible(self, mesh: Mesh) -> str | None:
        """Why a mesh cannot be, from its sizes alone or from one of its axes by itself."""
        batch, dp, pp = self.ask.batch, mesh.size("dp"), mesh.size("pp")
        if batch % dp:
            return f"a batch of {batch} does not divide over dp={dp}"
        stack = self.model.stack
        if stack is not None and pp > stack.count:
            return f"{stack.count} layers are fewer than pp={pp} stages"
        least = self.model.weight_bytes / (mesh.size("tp") * pp * mesh.size("ep"))
        if least > self.ask.room:
            return (f"its weights alone are at least {least / 1e9:.4g} GB a rank, there is room "
                    f"for {self.ask.room / 1e9:.4g} GB")
        for axis in AXES:
            reason = self._refusal(axis, mesh.size(axis)) if len(mesh.axes) > 1 else None
            if reason:
                return reason
        return None

    def _refusal(self, axis: str, size: int) -> str | None:
        """Why an axis of that size cannot be, on its own; asked of the compiler once."""
        if size == 1 or axis == "ring":
            return None
        if (axis, size) not in self._refused:
            self._refused[axis, size] = self._probed(axis, size)
        return self._refused[axis, size] or None

    def _probed(self, axis: str, size: int) -> str:
        """Empty where the axis is good for something."""
        try:
            made = self.compile_(Variant(Mesh(((axis, size),))), self.ask.length)
            if axis not in _SPLIT_WEIGHTS:
                return ""
            held = cost_of(made.rank(0), self.ask.length).weight_bytes
            whole = self._whole_weights(size if axis == "pp" else 1)
        except RingCompileError as error:
            return error.message
        return "" if held < whole else f"{axis}={size} finds no weights of the model to divide"

    def _whole_weights(self, stages: int) -> int:
        """The bytes of the weights of a program with so many layers, on one device."""
        stack, total = self.model.stack, self.model.weight_bytes
        return total - (stack.layer_bytes * (stack.count - stages) if stack else 0)

    def _plan(self, variant: Variant) -> Plan:
        try:
            found = self._evaluated(variant)
        except RingCompileError as error:
            return _rejected(variant, error.message)
        memory = found.memory_bytes
        if memory > self.ask.room:
            return Plan(variant, None, None, None, None, memory, False,
                        f"a rank holds {memory / 1e9:.4g} GB, there is room for "
                        f"{self.ask.room / 1e9:.4g} GB")
        seconds = found.period * variant.microbatches
        self._best[variant.capacity] = min(self._best[variant.capacity], seconds)
        return Plan(variant, self.ask.tokens / seconds, seconds, found.latency, found.bound,
                    memory, True, _spent(found, variant))

    def _evaluated(self, variant: Variant) -> Estimate:
        """A long ring from two short ones with as many tokens a rank: each step adds the same."""
        ring, length = variant.mesh.size("ring"), self.ask.length
        sizes = short_rings(variant.mesh, self.ask.cluster)
        shorter = [-(-length * size // ring) for size in sizes]
        low, high = self.model.length_range
        possible = all(low <= n and (high is None or n <= high) for n in shorter)
        if ring <= max(_WHOLE, sizes[0]) or not possible:
            return self._simulated(variant, length)
        short = self._simulated(with_ring(variant, sizes[0]), shorter[0])
        least, best = short.period * variant.microbatches, self._best[variant.capacity]
        if least > _FAR * best:
            raise RingCompileError(
                f"a ring of {sizes[0]} with as many tokens a rank already takes "
                f"{least * 1e3:.4g} ms a step, the best plan {best * 1e3:.4g} ms"
            )
        longer = self._simulated(with_ring(variant, sizes[1]), shorter[1])
        return between(short, longer, (ring - sizes[0]) / (sizes[1] - sizes[0]))

    def _simulated(self, variant: Variant, length: int) -> Estimate:
        made = self.compile_(variant, length)
        one_place = self.ask.num_gpus > _FEW or variant.mesh.size("ring") > _WHOLE
        sets = representatives(variant, self.ask.cluster, one_place=one_place)
        found = [self._together([cost_of(made.rank(rank), length) for rank in ranks], variant)
                 for ranks in sets]
        return max(found, key=lambda estimate: estimate.period)

    def _together(self, costs: list[RankCost], variant: Variant) -> Estimate:
        stack = self.model.stack
        if stack is None:
            return _run(costs, variant, self.ask.cluster)
        layers = -(-stack.count // variant.mesh.size("pp"))
        counts = [layers] if layers <= 4 else [2, 3]
        found = [_run([repeat(cost, stack, n) for cost in costs], variant, self.ask.cluster)
                 for n in counts]
        return found[0] if len(found) == 1 else between(found[0], found[1], layers - 2)

    def _nothing_fits(self, plans: list[Plan]) -> RingCompileError:
        needs = [plan.memory_bytes for plan in plans if plan.memory_bytes is not None]
        reasons = dict.fromkeys(plan.why for plan in plans)
        if not needs:
            return RingCompileError(
                f"no parallel spec of {self.ask.num_gpus} devices is possible: "
                f"{next(iter(reasons))}",
                hint="; ".join(list(reasons)[1:4]) or None,
            )
        return RingCompileError(
            f"nothing fits: a rank needs at least {min(needs) / 1e9:.4g} GB, there is room for "
            f"{self.ask.room / 1e9:.4g} GB on {self.ask.cluster.device.title}",
            hint="use more devices, a shorter sequence, a smaller batch or a larger device",
        )


@dataclass(frozen=True)
class Estimate:
    """What came out of simulations.

    Attributes:
        period: seconds between steps.
        latency: of one step.
        path: seconds on the longest path, by what they are spent on.
        memory_bytes: the most that a rank holds.
    """

    period: float
    latency: float
    path: Mapping[str, float]
    memory_bytes: int

    @property
    def bound(self) -> str:
        """What most of the longest path is spent on."""
        return max(self.path, key=lambda kind: self.path[kind], default="nothing")


def between(a: Estimate, b: Estimate, at: float) -> Estimate:
    """On the line through two estimates, a at 0 and b at 1, at some other place."""

    def line(x: float, y: float) -> float:
        return max(x + at * (y - x), 0.0)

    return Estimate(
        line(a.period, b.period),
        line(a.latency, b.latency),
        {kind: line(a.path.get(kind, 0.0), b.path.get(kind, 0.0)) for kind in {**a.path, **b.path}},
        round(line(a.memory_bytes, b.memory_bytes)),
    )


def _run(costs: list[RankCost], variant: Variant, cluster: Cluster) -> Estimate:
    one: Simulation = simulate(costs, cluster, How(variant.microbatches, merged=True))
    pp = variant.mesh.size("pp")
    period = one.period
    if pp > 1:
        period = simulate(costs, cluster, How(2 * pp + 1, merged=True)).period
    return Estimate(period, one.seconds, one.path, one.memory_bytes)


def _rejected(variant: Variant, reason: str) -> Plan:
    return Plan(variant, None, None, None, None, None, False, reason)


def _spent(found: Estimate, variant: Variant) -> str:
    total = sum(found.path.values()) or 1.0
    parts = sorted(found.path.items(), key=lambda entry: -entry[1])
    texts = [f"{kind} {seconds / total:.0%}" for kind, seconds in parts if seconds / total >= 0.01]
    text = ", ".join(texts) + " of the longest path"
    if variant.mesh.size("pp") > 1:
        text += "; steps follow one another, so that the pipeline stays full"
    return text
