"""Ranks the parallel specs that a cluster allows by what the cost model says of them.

Every mesh of the given size is considered. What cannot be is rejected as early as it can be
known, with the reason: by divisibility, by the bytes of the weights, by the compiler's own refusal,
because it is far from the best. The rest is estimated quickly, and the best of them closely.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from ringcompile.axes import AXES
from ringcompile.cost import forks
from ringcompile.cost.estimate import (
    Ask,
    Compile,
    Estimate,
    Estimator,
    FarError,
    Model,
    TooLargeError,
)
from ringcompile.cost.rank import PIPELINE, cost_of
from ringcompile.cost.specs import (
    Variant,
    factorisations,
    overlapping,
    reordered,
    variants,
)
from ringcompile.errors import RingCompileError
from ringcompile.mesh import Mesh

# What takes so many times the best plan's time is not looked at more closely.
_FAR = 1.05
# So many of the best are estimated closely.
_CLOSE = 3
# So many of these are tried with more overlap.
_OVERLAPPED = 1


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
        fits: whether it can be run.
        why: what the time goes to, or why it was rejected.
        close: whether all ranks that differ were looked at.
        least: seconds that a step takes at least; None where that is not known.
        shares: of them, by what they are spent on.
    """

    variant: Variant
    tps: float | None
    seconds: float | None
    latency: float | None
    bound: str | None
    memory_bytes: int | None
    fits: bool
    why: str
    close: bool = False
    least: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)

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
        compile_: see `estimate.Compile`.
    """

    model: Model
    ask: Ask
    compile_: Compile
    _estimator: Estimator = field(init=False)
    _refused: dict[tuple[str, int], str] = field(default_factory=dict, init=False)
    _capacities: tuple[str, ...] | None = field(default=None, init=False)
    _counting: float = field(default=0.0, init=False)
    _best: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self._estimator = Estimator(self.model, self.ask, self.compile_)
        self._best = dict.fromkeys(("exact", "local"), inf)

    def run(self) -> list[Plan]:
        """All plans: those that fit by tokens a second, then the rejected.

        Raises:
            RingCompileError: nothing fits.
        """
        plans = _sorted(self._all_plans())
        self._estimator.prepare([plans[i].variant for i in self._fastest(plans)], close=True)
        while rough := [i for i in self._fastest(plans) if not plans[i].close]:
            plans[rough[0]] = self._closely(plans[rough[0]].variant)
            plans = _sorted(plans)
        plans = _sorted([*plans, *self._overlapping(plans)])
        if not plans[0].fits:
            raise self._nothing_fits(plans)
        return plans

    def _meshes(self) -> list[Mesh]:
        """Even ones first: they are mostly among the best, which spares others a closer look."""
        meshes = list(factorisations(self.ask.num_gpus))
        if self.ask.cluster.num_nodes > 1:
            per_node = self.ask.cluster.per_node
            meshes = [other for mesh in meshes for other in reordered(mesh, per_node)]
        return sorted(meshes, key=lambda mesh: max(size for _, size in mesh.axes))

    def _all_plans(self) -> list[Plan]:
        """The first form of every mesh, and then the others of each, from the fastest mesh on."""
        rejected: list[Plan] = []
        forms: list[list[Variant]] = []
        meshes = self._meshes()
        self._probe(mesh for mesh in meshes if not self._impossible(mesh))
        for mesh in meshes:
            reason = self._impossible(mesh)
            if reason:
                rejected.append(_rejected(Variant(mesh), reason))
            else:
                forms.append(self._variants(mesh))
        self._estimator.prepare(first for first, *_ in forms)
        found = [(self._quickly(first), rest) for first, *rest in forms]
        found.sort(key=lambda entry: entry[0].least or inf)
        self._estimator.prepare(v for first, rest in found for v in self._promising(first, rest))
        others = [plan for first, rest in found for plan in self._others(first, rest)]
        return rejected + [first for first, _ in found] + others

    def _promising(self, first: Plan, rest: list[Variant]) -> Iterator[Variant]:
        """The other forms of a mesh that will be estimated, as far as the first can tell."""
        seen = {first.variant: first}
        for variant in rest:
            local = replace(variant, capacity="local")
            told = variant.capacity == first.variant.capacity or local in seen
            if told and not self._hopeless(seen, variant):
                yield variant

    def _others(self, first: Plan, rest: list[Variant]) -> Iterator[Plan]:
        seen = {first.variant: first}
        for variant in rest:
            seen[variant] = self._hopeless(seen, variant) or self._quickly(variant)
            yield seen[variant]

    def _variants(self, mesh: Mesh) -> list[Variant]:
        """Those that count capacity by each rank first: they are never slower."""
        found = list(variants(mesh, self.ask.batch, self.model.order))
        if not any(size > 1 and AXES[axis].own_tokens for axis, size in mesh.axes):
            return found
        if self._capacities is None:
            self._capacities = self._told_apart(found[0])
        capacities = self._capacities or ("local", "exact")
        return [replace(v, capacity=capacity) for v in found for capacity in capacities]

    def _told_apart(self, variant: Variant) -> tuple[str, ...] | None:
        """The capacity modes that make a difference to this model; None if that cannot be told."""
        plans = [self._quickly(replace(variant, capacity=c)) for c in ("local", "exact")]
        local, exact = (plan.seconds for plan in plans)
        if local is None:
            return None
        self._counting = (exact or local) - local
        return ("exact",) if exact == local else ("local", "exact")

    def _hopeless(self, seen: dict[Variant, Plan], variant: Variant) -> Plan | None:
        """A form of a mesh, rejected since another form of it is far from the best.

        That is the first form of the mesh; for one with exact capacity the same with local
        capacity, and half of what counting took longer in the mesh where that was tried. In another
        order transfers are others, and attention is shared out otherwise, though never better if
        all of it is causal; a ring that gathers may spare all transfers and attend in fewer
        kernels. What may be spared is not counted.
        """
        local = replace(variant, capacity="local")
        other = seen.get(local) or next(iter(seen.values()))
        if other.least is None:
            held = other.memory_bytes and variant.microbatches == other.variant.microbatches
            # Another order takes no less memory.
            same = (variant.ring, variant.tp_sequence) == (other.variant.ring, False)
            if local in seen or (held and same):
                return _rejected(variant, f"{other.variant} is no better: {other.why}")
            return None
        best, takes, without = self._best[variant.capacity], other.least, ""
        if local in seen:
            takes += self._counting / 2
        else:
            spared = self._spared(variant, other.variant)
            takes *= 1 - sum(other.shares.get(kind, 0.0) * part for kind, part in spared.items())
            without = f" without some {', '.join(spared)}" if spared else ""
        if takes <= _FAR * best:
            return None
        why = (f"{other.variant} already takes {takes * 1e3:.4g} ms a step{without}, the best plan "
               f"{best * 1e3:.4g} ms")
        return replace(_rejected(variant, why), least=takes)

    def _spared(self, variant: Variant, other: Variant) -> dict[str, float]:
        """What parts of the path a form may do without that another one of the mesh has."""
        if variant.tp_sequence and not other.tp_sequence:
            return {"memory": 1 - 1 / variant.mesh.size("tp")}
        if (variant.order, variant.ring) == (other.order, other.ring):
            return {}
        transfers = dict.fromkeys(("communication", "interference", "launch", "host"), 1.0)
        causal = variant.ring == "rotate" and self.model.order == "zigzag"
        return transfers if causal else {**transfers, "attention": 1.0}

    def _impossible(self, mesh: Mesh) -> str | None:
        """Why a mesh cannot be, from its sizes alone or from one of its axes by itself."""
        batch, dp, pp = self.ask.batch, mesh.size("dp"), mesh.size("pp")
        if batch % dp:
            return f"a batch of {batch} does not divide over dp={dp}"
        stack = self.model.stack
        if stack is not None and pp > stack.num_layers + stack.first:
            return f"{stack.num_layers + stack.first} layers are fewer than pp={pp} stages"
        least = self.model.weight_bytes / (mesh.size("tp") * pp * mesh.size("ep"))
        if least > self.ask.room:
            return (f"its weights alone are at least {least / 1e9:.4g} GB a rank, there is room "
                    f"for {self.ask.room / 1e9:.4g} GB")
        refusals = (self._refused.get((axis, mesh.size(axis))) for axis in AXES)
        return next(filter(None, refusals), None)

    def _probe(self, meshes: Iterable[Mesh]) -> None:
        """Ask the compiler whether each axis of some meshes can be, on its own; a ring can."""
        asked = {(axis, mesh.size(axis)) for mesh in meshes for axis in mesh.names}
        probes = sorted((axis, size) for axis, size in asked if axis != "ring" and size > 1)
        self._refused.update(zip(probes, forks.mapped(self._probed, probes), strict=True))

    def _probed(self, probe: tuple[str, int]) -> str:
        """Empty where the axis is good for something."""
        axis, size = probe
        try:
            made = self.compile_(Variant(Mesh(((axis, size),))), self.ask.length)
            if not AXES[axis].divides_weights:
                return ""
            held = cost_of(made.rank(0), self.ask.length).weight_bytes
        except RingCompileError as error:
            return error.message
        whole = self._whole_weights(size if axis == PIPELINE else 1)
        return "" if held < whole else f"{axis}={size} finds no weights of the model to divide"

    def _whole_weights(self, stages: int) -> int:
        """The bytes of the weights of the program for so many stages, on one device."""
        stack = self.model.stack
        if stack is None or not self.model.repeats(stages):
            return self.model.weight_bytes
        return self.model.outer_bytes + stack.block_bytes * stages

    def _quickly(self, variant: Variant) -> Plan:
        best = self._best[variant.capacity]
        try:
            return self._judged(variant, self._estimator.quick(variant, _FAR * best), close=False)
        except RingCompileError as error:
            return _rejected(variant, error.message)
        except TooLargeError as error:
            # A stage of a pipeline stands for all, with what only the first and the last have.
            least = error.memory_bytes - self.model.outer_bytes
            if (variant.mesh.size(PIPELINE) > 1 and least <= self.ask.room
                    and self._estimator.can_be_close(variant)):
                return self._closely(variant)
            return self._too_large(variant, error)
        except FarError as error:
            why, found = f"{error}, the best plan {best * 1e3:.4g} ms", error.least
            return replace(_rejected(variant, why), least=found.seconds, shares=_shares(found))

    def _closely(self, variant: Variant) -> Plan:
        try:
            return self._judged(variant, self._estimator.close(variant), close=True)
        except RingCompileError as error:
            return _rejected(variant, error.message)
        except TooLargeError as error:
            return self._too_large(variant, error)

    def _overlapping(self, plans: list[Plan]) -> list[Plan]:
        """The best plans of each capacity again, with more overlap."""
        made = []
        for capacity in self._best:
            best = [p for p in plans if p.fits and p.close and p.variant.capacity == capacity]
            # Halves would count slots of experts each for itself: another result.
            exact = capacity == "exact" and self._capacities != ("exact",)
            for plan in best[:_OVERLAPPED]:
                made += [v for v in overlapping(plan.variant, self.ask.batch)
                         if not (exact and v.overlap == "halves")]
        self._estimator.prepare(made, close=True)
        return [self._closely(variant) for variant in made]

    def _fastest(self, plans: list[Plan]) -> Iterator[int]:
        """Where the best plans of each capacity are, as far as they can be estimated closely."""
        seen = dict.fromkeys(self._best, 0)
        for i, plan in enumerate(plans):
            capacity = plan.variant.capacity
            seen[capacity] += 1
            best = plan.fits and seen[capacity] <= _CLOSE
            if best and self._estimator.can_be_close(plan.variant):
                yield i

    def _judged(self, variant: Variant, found: Estimate, *, close: bool) -> Plan:
        self._best[variant.capacity] = min(self._best[variant.capacity], found.seconds)
        return Plan(variant, self.ask.tokens / found.seconds, found.seconds, found.latency,
                    found.bound, found.memory_bytes, True, _spent(found, variant), close,
                    found.seconds, _shares(found))

    def _too_large(self, variant: Variant, error: TooLargeError) -> Plan:
        memory, room = error.memory_bytes, self.ask.room
        why = f"a rank holds {memory / 1e9:.4g} GB, there is room for {room / 1e9:.4g} GB"
        return replace(_rejected(variant, why), memory_bytes=memory)

    def _nothing_fits(self, plans: list[Plan]) -> RingCompileError:
        needs = [plan.memory_bytes for plan in plans if plan.memory_bytes is not None]
        reasons = list(dict.fromkeys(plan.why for plan in plans))
        if not needs:
            return RingCompileError(
                f"no parallel spec of {self.ask.num_gpus} devices is possible: {reasons[0]}",
                hint="; ".join(reasons[1:4]) or None,
            )
        return RingCompileError(
            f"nothing fits: a rank needs at least {min(needs) / 1e9:.4g} GB, there is room for "
            f"{self.ask.room / 1e9:.4g} GB on {self.ask.cluster.device.title}",
            hint="use more devices, a shorter sequence, a smaller batch or a larger device",
        )


def _sorted(plans: list[Plan]) -> list[Plan]:
    return sorted(plans, key=lambda plan: (not plan.fits, -(plan.tps or 0.0)))


def _rejected(variant: Variant, reason: str) -> Plan:
    return Plan(variant, None, None, None, None, None, False, reason)


def _shares(found: Estimate) -> dict[str, float]:
    """What parts of the longest path are spent on what, largest first."""
    total = sum(found.path.values()) or 1.0
    parts = sorted(found.path.items(), key=lambda entry: -entry[1])
    return {kind: seconds / total for kind, seconds in parts}


def _spent(found: Estimate, variant: Variant) -> str:
    texts = [f"{kind} {share:.0%}" for kind, share in _shares(found).items() if share >= 0.01]
    text = ", ".join(texts) + " of the longest path"
    if variant.mesh.size("pp") > 1:
        text += "; steps follow one another, so that the pipeline stays full"
    return text
