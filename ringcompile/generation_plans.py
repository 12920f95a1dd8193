"""Plans for generating: which parallel spec gives the first token soonest, and which the next ones.

For each spec the programs that a session runs are compiled and costed: the prompt's, and the one
for the next token at the context that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import torch

from ringcompile import compiler
from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.cost import forks
from ringcompile.cost.estimate import Ask, Estimate, Estimator, HasRanks, Model, TooLargeError
from ringcompile.cost.hardware import Cluster
from ringcompile.cost.layers import Stack, cut, find_stack
from ringcompile.cost.rank import RankCost, cost_of
from ringcompile.cost.simulate import Simulation, simulate
from ringcompile.cost.specs import Variant, factorisations, one_stage
from ringcompile.cost.timeline import How
from ringcompile.cost.values import bind_lengths
from ringcompile.errors import RingCompileError
from ringcompile.garbage import few_collections
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.parallel_program import ParallelProgram
from ringcompile.pass_list import prepare
from ringcompile.passes.carry.decode_features import kept_along
from ringcompile.runtime.tail import last_positions, take_rows

# A prompt that no ring divides is taken in by so many tokens at a time, as with `--chunk`.
CHUNK = 8192


@dataclass(frozen=True)
class GenerationRequest:
    """What is generated.

    Attributes:
        context: tokens of the prompt.
        new_tokens: tokens that follow.
        batch: sequences at a time, of all replicas together.
        fuse: as the option of `transform`, for programs that are compiled for it.
    """

    context: int
    new_tokens: int
    batch: int = 1
    fuse: bool = True

    @property
    def middle(self) -> int:
        """The tokens in the cache when half of the new ones are there."""
        return self.context + -(-self.new_tokens // 2)

    @property
    def capacity(self) -> int:
        """The tokens that the cache has to have room for."""
        return self.context + self.new_tokens


@dataclass(frozen=True)
class GenerationPlan:
    """A parallel spec for a request, or the reason why it cannot be.

    Attributes:
        mesh: the spec.
        ttft: seconds from the request to the first token; None if it cannot be.
        tpot: seconds for each token after it; likewise.
        memory_bytes: the peak of the rank that holds most: weights, cache and values.
        why: on what the time of a token is spent, or why it cannot be.
        serves: what no other spec does better; ("frontier",) where none is better in both times.
        decode: the form in which next tokens are computed: the faster one; see `Options.decode`.
    """

    mesh: Mesh
    ttft: float | None
    tpot: float | None
    memory_bytes: int | None
    why: str
    serves: tuple[str, ...] = ()
    decode: str = "simple"

    @property
    def fits(self) -> bool:
        """Whether it can run on the cluster."""
        return self.tpot is not None

    def __str__(self) -> str:
        """What `ringcompile transform` takes behind `--parallel`."""
        return str(self.mesh) if self.decode == "simple" else f"{self.mesh} --decode {self.decode}"

    def to_json(self, batch: int) -> dict[str, Any]:
        """The fields that `plan --json` prints."""
        return {
            "spec": str(self.mesh),
            "decode": self.decode,
            "ttft_ms": None if self.ttft is None else self.ttft * 1e3,
            "tpot_ms": None if self.tpot is None else self.tpot * 1e3,
            "tps": None if self.tpot is None else batch / self.tpot,
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "why": self.why,
            "serves": list(self.serves),
        }


def generation_plans(
    model: str | Program, cluster: Cluster, request: GenerationRequest, dtype: str | None = None,
    specs: Iterable[str] = (), any_fit: bool = True,
) -> list[GenerationPlan]:
    """Plans for a request: those that fit, soonest next token first, and then the others.

    Args:
        model: a captured program, or a name as on the command line.
        cluster: the devices, all of which are used.
        request: what is generated.
        dtype: to cast a model that is named to.
        specs: parallel specs; all products of `dp`, `pp`, `ring` and `tp`, and of `ep` if the model
            has experts that it divides, where none are named.
        any_fit: refuse where none fits.

    Raises:
        RingCompileError: the model cannot be captured, or none fits.
    """
    if isinstance(model, str):
        loaded = load_model(model, dtype=dtype, weights=":" in model)
        model = capture(loaded.module, loaded.args, loaded.kwargs, name=loaded.name)
    left_out = _left_out(model)
    meshes = [Mesh.parse(spec) for spec in specs] or [
        mesh for mesh in factorisations(cluster.num_devices)
        if not any(mesh.size(axis) > 1 for axis in left_out)
    ]
    plans = _ranked(_Judge(model, cluster, request).all(meshes))
    if any_fit and not plans[0].fits:
        raise RingCompileError(
            f"no parallel spec can generate this: {plans[0].why}",
            hint="use more devices, a shorter context, a smaller batch or a larger device",
        )
    return plans


def _left_out(program: Program) -> tuple[str, ...]:
    """The axes that no plan is made for: `ulysses` keeps what `ring` keeps, and divides no prompt.

    Along `ep` only experts whose rows say which one they are for are divided in such a program.
    """
    divided = any(node.target is op("expert_linear") for node in program.graph.nodes)
    return ("ulysses",) if divided else ("ulysses", "ep")


@dataclass(frozen=True)
class _LastToken:
    """Programs of the whole sequence that compute the last token's outputs alone."""

    made: ParallelProgram
    length: int

    def rank(self, rank: int, /) -> Program:
        program = self.made.rank(rank)
        last = last_positions(program, bind_lengths(program, self.length), 1)
        for node in last.graph.nodes:
            if node.target is take_rows:  # as views, whose cost is known
                x, dim, rows = node.args
                start, count = rows[0].start if rows else 0, sum(map(len, rows))
                node.target = torch.ops.aten.slice.Tensor
                node.args = (x, dim, start, start + count, 1)
        return last


@dataclass
class _Judge:
    """Estimates the specs of one model for one request."""

    whole: Program
    cluster: Cluster
    request: GenerationRequest
    _prepared: dict[int, Program] = field(default_factory=dict)
    _made: dict[tuple[Variant, str], ParallelProgram] = field(default_factory=dict)
    _checked: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stack: Stack | None = find_stack(self.whole)
        total = sum(weight.num_bytes for weight in self.whole.weights.values())
        self.model = Model(self.stack, total, self.whole.length_range)

    @few_collections()
    def all(self, meshes: Iterable[Mesh]) -> list[GenerationPlan]:
        """A plan for each mesh; those that share a program are estimated by one process."""
        alike: dict[Variant, list[Mesh]] = {}
        for mesh in meshes:
            alike.setdefault(one_stage(Variant(mesh)), []).append(mesh)
        for stages in {mesh.size("pp") for group in alike.values() for mesh in group}:
            self._ready(stages)
        return [plan for group in forks.mapped(self._group, list(alike.values())) for plan in group]

    def _group(self, meshes: Sequence[Mesh]) -> list[GenerationPlan]:
        found = [self._judged(mesh) for mesh in meshes]
        self._made.clear()
        return found

    def _judged(self, mesh: Mesh) -> GenerationPlan:
        impossible = self._impossible(mesh)
        if impossible:
            return GenerationPlan(mesh, None, None, None, impossible)
        variant, middle = Variant(mesh), self.request.middle
        try:
            step, decode = self._step(variant, middle)
            prompt = self._prompt(variant, decode)
        except RingCompileError as error:
            return GenerationPlan(mesh, None, None, None, error.message)
        except TooLargeError as error:
            return GenerationPlan(mesh, None, None, error.memory_bytes, self._too_large(
                error.memory_bytes))
        memory = max(step.memory_bytes, prompt.memory_bytes)
        if memory > self._ask(1, None).room:
            return GenerationPlan(mesh, None, None, memory, self._too_large(memory))
        total = sum(step.path.values()) or 1.0
        spent = sorted(step.path.items(), key=lambda entry: -entry[1])
        why = ", ".join(f"{kind} {part / total:.0%}" for kind, part in spent if part >= total / 50)
        return GenerationPlan(
            mesh, prompt.latency + step.latency, step.latency, memory, why, decode=decode
        )

    def _step(self, variant: Variant, context: int) -> tuple[Estimate, str]:
        """The step that makes a token, in the faster form, and which one that is."""
        simple = self._estimate(variant, 1, context)
        if kept_along(variant.mesh) == 1:
            return simple, "simple"
        try:
            helix = self._estimate(variant, 1, context, "helix")
        except RingCompileError:  # heads that nothing divides
            return simple, "simple"
        return (helix, "helix") if helix.latency < simple.latency else (simple, "simple")

    def _impossible(self, mesh: Mesh) -> str:
        """Why a mesh cannot work, judging by its sizes alone; empty if it can."""
        batch, replicas, stages = self.request.batch, mesh.size("dp"), mesh.size("pp")
        if batch % replicas:
            return f"a batch of {batch} does not divide over dp={replicas}"
        if self.stack is not None and stages > self.stack.num_layers + self.stack.first:
            layers = self.stack.num_layers
            return f"{layers} layers are fewer than the {stages} stages of pp={stages}"
        least = self.model.weight_bytes / (mesh.size("tp") * mesh.size("ep") * stages)
        return self._too_large(round(least)) if least > self._ask(1, None).room else ""

    def _too_large(self, memory: int) -> str:
        room = self._ask(1, None).room
        return f"a rank holds {memory / 1e9:.4g} GB, there is room for {room / 1e9:.4g} GB"

    def _prompt(self, variant: Variant, decode: str) -> Estimate:
        """The prompt: divided over a ring, or chunk by chunk on all of its ranks."""
        context = self.request.context
        if variant.mesh.size("ring") > 1 and self._compiled(one_stage(variant)).prefill is not None:
            found = self._estimate(variant, context, None)
            return replace(found, memory_bytes=found.memory_bytes + self._cache_bytes(variant))
        chunk = min(context, CHUNK)
        first, last = (self._estimate(variant, chunk, c, decode) for c in (chunk, context))
        count = context / chunk
        seconds = count * (first.latency + last.latency) / 2
        return Estimate(seconds, seconds, last.path, max(first.memory_bytes, last.memory_bytes))

    def _cache_bytes(self, variant: Variant) -> int:
        """What a rank of the largest stage keeps of all sequences of its replica."""
        mesh = variant.mesh
        program = self._compiled(one_stage(variant)).with_cache().rank(0)
        blocks = self.stack.blocks(mesh.size("pp")) if self.stack is not None else 1
        batch = self.request.batch / mesh.size("dp")
        return round(cost_of(program, 1).cache_bytes * blocks * batch)

    def _estimate(
        self, variant: Variant, length: int, context: int | None, decode: str = "simple"
    ) -> Estimate:
        """A run of new tokens with so many in the cache; without a context, of a prompt.

        A prompt is costed by the program of the whole sequence: of a few layers, the one that
        stores keys ends in front of the last one's attention.
        """

        def compile_(one: Variant, _: int) -> HasRanks:
            made = self._compiled(one, decode)
            return _LastToken(made, length) if context is None else made.with_cache()

        return Estimator(self.model, self._ask(length, context), compile_).quick(variant, inf)

    def _ask(self, length: int, context: int | None) -> Ask:
        return Ask(self.cluster.num_devices, self.cluster, length, self.request.batch, context)

    def _compiled(self, variant: Variant, decode: str = "simple") -> ParallelProgram:
        if (variant, decode) not in self._made:
            stages = variant.mesh.size("pp")
            starts = self.stack.starts(stages) if self.stack is not None else ()
            self._made[variant, decode] = compiler.transform(
                self._ready(stages), variant.mesh, check=False, checked=self._checked,
                cache=self.request.capacity, stages=starts, decode=decode, fuse=self.request.fuse,
            )
        return self._made[variant, decode]

    def _ready(self, stages: int) -> Program:
        """A block for each of so many stages, or the model, as far as all specs have in common."""
        stages = stages if self.stack is not None and self.stack.stands_for(stages) else 0
        if stages not in self._prepared:
            stack = self.stack
            few = cut(self.whole, stack, stages) if stack is not None and stages else self.whole
            self._prepared[stages] = prepare(few)
        return self._prepared[stages]


def _ranked(plans: Sequence[GenerationPlan]) -> list[GenerationPlan]:
    """Those that fit first, soonest next token first; each with what it serves."""
    fitting = [plan for plan in plans if plan.fits]
    best = {
        "first token soonest": min(fitting, key=lambda p: p.ttft or inf, default=None),
        "next token soonest": min(fitting, key=lambda p: p.tpot or inf, default=None),
        "most memory left": min(fitting, key=lambda p: p.memory_bytes or inf, default=None),
    }

    def served(plan: GenerationPlan) -> tuple[str, ...]:
        ends = tuple(what for what, found in best.items() if found is plan)
        return ends or (("frontier",) if plan.fits and not _beaten(plan, fitting) else ())

    marked = [replace(plan, serves=served(plan)) for plan in plans]
    return sorted(marked, key=lambda plan: (not plan.fits, plan.tpot or inf, plan.ttft or inf))


def _beaten(plan: GenerationPlan, others: Iterable[GenerationPlan]) -> bool:
    """Whether another plan is as good in both times, and better in one."""
    mine = (plan.ttft or inf, plan.tpot or inf)
    return any(
        all(a <= b for a, b in zip(theirs, mine, strict=True)) and theirs != mine
        for theirs in ((other.ttft or inf, other.tpot or inf) for other in others)
    )


@dataclass(frozen=True)
class SimulatedRequest:
    """A request on an artifact's own programs.

    Attributes:
        ttft: seconds from the request to the first token.
        step: the timeline of the step that makes the token in the middle of the new ones.
        memory_bytes: the peak of the rank that holds most.
        cache_bytes: what the rank that keeps most of the sequence has room for.
        costs: of the programs of that step.
        lengths: the values of their size symbols.
    """

    ttft: float
    step: Simulation
    memory_bytes: int
    cache_bytes: int
    costs: list[RankCost]
    lengths: list[dict[str, int]]


def simulate_request(
    parallel: ParallelProgram, cluster: Cluster, request: GenerationRequest, how: How | None = None
) -> SimulatedRequest:
    """Simulate a request on the programs of an artifact.

    Args:
        parallel: with a cache.
        cluster: the hardware.
        request: what is generated; `batch` counts the sequences of all replicas.
        how: the way in which programs are run.

    Raises:
        RingCompileError: there is no cache, or not enough room in it.
    """
    carried = parallel.with_cache()
    capacity = carried.program.length_range[1]
    if capacity is not None and request.capacity - 1 > capacity:
        raise RingCompileError(
            f"{request.context} tokens and {request.new_tokens} new ones do not fit the cache, "
            f"which is for {capacity}",
            hint="name a shorter --context, or compile with a larger --cache",
        )
    batch = -(-request.batch // parallel.mesh.size("dp"))

    middle = min(request.middle, capacity or request.middle)
    costs = [cost_of(program, 1, batch, middle) for program in carried.ranks()]
    step = simulate(costs, cluster, how)
    taking, context = parallel.prefill or carried, request.context
    prompt = simulate(
        [cost_of(program, context, batch, context) for program in taking.ranks()], cluster, how
    )
    return SimulatedRequest(
        prompt.seconds + step.seconds, step, max(prompt.memory_bytes, step.memory_bytes),
        max(cost.cache_bytes for cost in costs), costs,
        [bind_lengths(program, 1, batch, middle) for program in carried.ranks()],
    )
