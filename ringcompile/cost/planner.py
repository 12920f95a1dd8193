"""Ranks the parallel specs that a cluster allows by what the cost model says of them.

Every mesh of the given size is considered. What cannot be is rejected as early as it can be known,
with the reason: by divisibility, by the bytes of the weights, by the compiler's own refusal, by a
bound on its time. The rest is compiled, for one layer where layers repeat and for the ranks that
stand for all, and simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
    variants,
)
from ringcompile.cost.timeline import How
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh

# Axes that are there to have fewer weights on each rank.
_SPLIT_WEIGHTS = ("pp", "ep", "tp")
# Beyond so many times the best plan's time a ring's transfers need not be looked at closely.
_HOPELESS = 2.0


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
        passes_all: whether some attention reaches over the whole sequence, so that its keys and
            values have to pass every rank of a ring.
    """

    stack: Stack | None
    weight_bytes: int
    passes_all: bool


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
        compile_: makes the program of a variant, with one layer for each stage if layers repeat;
            raises RingCompileError for what cannot be.
    """

    model: Model
    ask: Ask
    compile_: Callable[[Variant], Parallel]
    _refused: dict[tuple[str, int], str] = field(default_factory=dict, init=False)
    _capacities: tuple[str, ...] | None = field(default=None, init=False)
    _best: float = field(default=float("inf"), init=False)

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
        """Short rings first: they are quick to look at, and mostly not the worst."""
        meshes = list(factorisations(self.ask.num_gpus))
        if self.ask.cluster.num_nodes > 1:
            meshes = [other for mesh in meshes for other in reordered(mesh)]
        return sorted(meshes, key=lambda mesh: mesh.size("ring"))

    def _plans(self, mesh: Mesh) -> Iterator[Plan]:
        reason = self._impossible(mesh)
        if reason:
            yield _rejected(Variant(mesh), reason)
            return
        for variant in variants(mesh, self.ask.batch):
            for capacity in self._capacities or ("exact",):
                yield self._plan(Variant(**{**vars(variant), "capacity": capacity}))
            if self._capacities is None:
                yield from self._with_local_capacity(variant)

    def _with_local_capacity(self, variant: Variant) -> Iterator[Plan]:
        """The first time the sequence is divided: does it matter whose tokens are counted?"""
        if not {"ring", "ulysses", "ep"} & set(variant.mesh.names):
            return
        local = Variant(**{**vars(variant), "capacity": "local"})
        plan = self._plan(local)
        exact = self._plan(variant)
        if plan.tps is None or exact.tps is None:
            return
        differ = (plan.seconds, plan.memory_bytes) != (exact.seconds, exact.memory_bytes)
        self._capacities = ("exact", "local") if differ else ("exact",)
        if differ:
            yield plan

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
        return self._too_slow(mesh)

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
            made = self.compile_(Variant(Mesh(((axis, size),))))
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

    def _too_slow(self, mesh: Mesh) -> str | None:
        """The messages of a ring, were they empty, against the best plan so far."""
        ring, stack = mesh.size("ring"), self.model.stack
        if not self.model.passes_all or ring <= 64:
            return None
        layers = (stack.count if stack else 1) / mesh.size("pp")
        link = self.ask.cluster.links["node"]
        least = layers * (ring - 1) * link.value("startup")
        if least < _HOPELESS * self._best:
            return None
        return (f"the {ring - 1} transfers of a layer take at least {least * 1e3:.4g} ms a step, "
                f"the best plan {self._best * 1e3:.4g} ms")

    def _plan(self, variant: Variant) -> Plan:
        try:
            made = self.compile_(variant)
            sims = [self._simulated(made, variant, ranks)
                    for ranks in representatives(variant.mesh)]
        except RingCompileError as error:
            return _rejected(variant, error.message)
        slowest = max(sims, key=lambda found: found.period)
        memory = max(found.memory_bytes for found in sims)
        if memory > self.ask.room:
            return Plan(variant, None, None, None, None, memory, False,
                        f"a rank holds {memory / 1e9:.4g} GB, there is room for "
                        f"{self.ask.room / 1e9:.4g} GB")
        seconds = slowest.period * variant.microbatches
        self._best = min(self._best, seconds)
        return Plan(variant, self.ask.tokens / seconds, seconds, slowest.latency, slowest.bound,
                    memory, True, _spent(slowest, variant, len(sims) > 1))

    def _simulated(self, made: Parallel, variant: Variant, ranks: list[int]) -> _Scaled:
        costs = [cost_of(made.rank(rank), self.ask.length) for rank in ranks]
        stack, pp = self.model.stack, variant.mesh.size("pp")
        cluster = self.ask.cluster
        layers = -(-stack.count // pp) if stack else 1
        if stack is None or layers <= 4:
            return _scaled([_repeated(costs, stack, layers)], layers, variant, cluster)
        both = [_repeated(costs, stack, count) for count in (2, 3)]
        return _scaled(both, layers, variant, cluster)

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
class _Scaled:
    """A simulation, scaled to all layers."""

    period: float
    latency: float
    path: Mapping[str, float]
    memory_bytes: int

    @property
    def bound(self) -> str:
        return max(self.path, key=lambda kind: self.path[kind], default="nothing")


def _repeated(costs: list[RankCost], stack: Stack | None, count: int) -> list[RankCost]:
    return costs if stack is None else [repeat(cost, stack, count) for cost in costs]


def _scaled(
    programs: list[list[RankCost]], layers: int, variant: Variant, cluster: Cluster
) -> _Scaled:
    """One program with all its layers, or one with two of them and one with three."""
    found = [_run(costs, variant, cluster) for costs in programs]
    memory = [max(cost.peak_bytes for cost in costs) for costs in programs]
    if len(found) == 1:
        period, latency, path = found[0]
        return _Scaled(period, latency, path, memory[0])
    (p2, l2, path2), (p3, l3, path3) = found
    times = layers - 2
    path = {kind: max(path2.get(kind, 0.0) * (1 - times) + seconds * times, 0.0)
            for kind, seconds in path3.items()}
    return _Scaled(p2 + times * (p3 - p2), l2 + times * (l3 - l2), path,
                   memory[0] + times * (memory[1] - memory[0]))


def _run(
    costs: list[RankCost], variant: Variant, cluster: Cluster
) -> tuple[float, float, Mapping[str, float]]:
    """The time between steps, the latency of one, and what its longest path is spent on."""
    one: Simulation = simulate(costs, cluster, How(variant.microbatches))
    pp = variant.mesh.size("pp")
    if pp == 1:
        return one.period, one.seconds, one.path
    full = simulate(costs, cluster, How(2 * pp + 1))
    return full.period, one.seconds, one.path


def _rejected(variant: Variant, reason: str) -> Plan:
    return Plan(variant, None, None, None, None, None, False, reason)


def _spent(found: _Scaled, variant: Variant, sampled: bool) -> str:
    total = sum(found.path.values()) or 1.0
    parts = sorted(found.path.items(), key=lambda entry: -entry[1])
    texts = [f"{kind} {seconds / total:.0%}" for kind, seconds in parts if seconds / total >= 0.01]
    text = ", ".join(texts) + " of the longest path"
    if variant.mesh.size("pp") > 1:
        text += "; steps follow one another, so that the pipeline stays full"
    return text + ("; the ring from three of its ranks" if sampled else "")
