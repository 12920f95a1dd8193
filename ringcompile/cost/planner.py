"""Ranks all parallel specs for a cluster by their estimated speed.

Every mesh of the given size is considered. Specs that cannot work are rejected as early as
possible, with the reason: sizes that do not divide, weights that do not fit, a refusal of the
compiler, or a time that is far from the best. The others get a quick estimate, and the best of them
a close one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import inf

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
from ringcompile.cost.plans import (
    BATCH,
    MEMORY,
    NOTHING,
    REFUSED,
    SLOW,
    STAGES,
    Plan,
    Reason,
    by_speed,
    rejected,
    shares_of,
    spent_text,
    with_best,
)
from ringcompile.cost.rank import PIPELINE, cost_of
from ringcompile.cost.specs import (
    Variant,
    factorisations,
    in_time,
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


@dataclass
class Planner:
    """Ranks the plans of one model for one question.

    Args:
        model: the facts about the model.
        ask: the number of GPUs, the cluster, the length and the batch.
        compile_: see `estimate.Compile`.
    """

    model: Model
    ask: Ask
    compile_: Compile
    _estimator: Estimator = field(init=False)
    _refused: dict[tuple[str, int], Reason | None] = field(default_factory=dict, init=False)
    _capacities: tuple[str, ...] | None = field(default=None, init=False)
    _counting: float = field(default=0.0, init=False)
    _best: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self._estimator = Estimator(self.model, self.ask, self.compile_)
        self._best = dict.fromkeys(("exact", "local"), inf)

    def run(self) -> list[Plan]:
        """All plans: those that fit, fastest first, and then the rejected ones.

        Raises:
            RingCompileError: nothing fits.
        """
        plans = by_speed(self._all_plans())
        self._estimator.prepare([plans[i].variant for i in self._fastest(plans)], close=True)
        while rough := [i for i in self._fastest(plans) if not plans[i].close]:
            plans[rough[0]] = self._closely(plans[rough[0]].variant)
            plans = by_speed(plans)
        plans = by_speed([*plans, *self._overlapping(plans)])
        if not plans[0].fits:
            raise self._nothing_fits(plans)
        return self._held_against_best(plans)

    def _held_against_best(self, plans: list[Plan]) -> list[Plan]:
        """The plans, and each that was too slow with the time of the best plan that there is.

        Close estimates may be slower than the quick ones that specs were rejected by. A spec whose
        lower bound is below the best plan's time is then estimated closely, too.
        """
        while True:
            best = self._best_times(plans)
            found = [
                self._closely(plan.variant)
                if plan.reason == SLOW and (plan.least or inf) < best[plan.variant.capacity]
                and self._estimator.can_be_close(plan.variant) else plan
                for plan in plans
            ]
            if all(old is new for old, new in zip(plans, found, strict=True)):
                return [with_best(plan, best[plan.variant.capacity]) for plan in plans]
            plans = by_speed(found)

    def _best_times(self, plans: list[Plan]) -> dict[str, float]:
        """The seconds of the best plan by capacity mode; of all where a mode has none."""
        times = [(p.variant.capacity, p.seconds) for p in plans if p.seconds is not None]
        least = min((seconds for _, seconds in times), default=inf)
        return {
            mode: min((seconds for other, seconds in times if other == mode), default=least)
            for mode in self._best
        }

    def _meshes(self) -> list[Mesh]:
        """All meshes, even factorizations first: they are often the best and prune the others."""
        meshes = list(factorisations(self.ask.num_gpus))
        if self.ask.cluster.num_nodes > 1:
            per_node = self.ask.cluster.per_node
            meshes = [other for mesh in meshes for other in reordered(mesh, per_node)]
        return sorted(meshes, key=lambda mesh: max(size for _, size in mesh.axes))

    def _all_plans(self) -> list[Plan]:
        """Estimate the first variant of each mesh, then other variants of the fastest meshes."""
        impossible: list[Plan] = []
        forms: list[list[Variant]] = []
        meshes = self._meshes()
        self._probe(mesh for mesh in meshes if not self._impossible(mesh))
        meshes = [mesh for mesh in meshes if not self._without_experts(mesh)]
        for mesh in meshes:
            reason = self._impossible(mesh)
            if reason:
                impossible.append(rejected(Variant(mesh), *reason))
            else:
                forms.append(self._variants(mesh))
        self._estimator.prepare(first for first, *_ in forms)
        found = [(self._quickly(first), rest) for first, *rest in forms]
        found.sort(key=lambda entry: entry[0].least or inf)
        self._estimator.prepare(v for first, rest in found for v in self._promising(first, rest))
        others = [plan for first, rest in found for plan in self._others(first, rest)]
        return impossible + [first for first, _ in found] + others

    def _without_experts(self, mesh: Mesh) -> bool:
        """Whether a mesh divides experts that the model does not have."""
        refused = self._refused.get(("ep", mesh.size("ep")))
        return refused is not None and refused.kind == NOTHING

    def _promising(self, first: Plan, rest: list[Variant]) -> Iterator[Variant]:
        """The other variants of a mesh that its first variant does not rule out."""
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
        """The variants of a mesh; local capacity comes first, because it is never slower."""
        found = list(variants(mesh, self.ask.batch, self.model.order))
        if not any(size > 1 and AXES[axis].own_tokens for axis, size in mesh.axes):
            return found
        if self._capacities is None:
            self._capacities = self._told_apart(found[0])
        capacities = self._capacities or ("local", "exact")
        return [replace(v, capacity=capacity) for v in found for capacity in capacities]

    def _told_apart(self, variant: Variant) -> tuple[str, ...] | None:
        """The capacity modes whose costs differ for this model; None if that is not known."""
        plans = [self._quickly(replace(variant, capacity=c)) for c in ("local", "exact")]
        local, exact = (plan.seconds for plan in plans)
        if local is None:
            return None
        self._counting = (exact or local) - local
        return ("exact",) if exact == local else ("local", "exact")

    def _hopeless(self, seen: dict[Variant, Plan], variant: Variant) -> Plan | None:
        """Reject a variant because a related variant of the same mesh is far from the best.

        The related variant is the first one of the mesh. For exact capacity it is the one with
        local capacity, plus half of the extra time that counting took where both were tried. The
        time that the rejected variant could save is not counted against it: another order changes
        the transfers and divides attention in another way (never better if all of it is causal),
        and a ring that gathers may avoid all transfers and use fewer kernels.
        """
        local = replace(variant, capacity="local")
        other = seen.get(local) or next(iter(seen.values()))
        if other.least is None:
            held = other.memory_bytes and variant.microbatches == other.variant.microbatches
            # Another order takes no less memory.
            same = (variant.ring, variant.tp_sequence) == (other.variant.ring, False)
            if local in seen or (held and same):
                why = f"{other.variant} was rejected ({other.why}), and this spec is no better"
                return rejected(variant, why, other.reason)
            return None
        best, takes, without = self._best[variant.capacity], other.least, ""
        if local in seen:
            takes += self._counting / 2
        else:
            spared = self._spared(variant, other.variant)
            takes *= 1 - sum(other.shares.get(kind, 0.0) * part for kind, part in spared.items())
            without = f" even if it spent no time on {', '.join(spared)}" if spared else ""
        if takes <= _FAR * best:
            return None
        why = f"{other.variant} takes at least {takes * 1e3:.4g} ms a step{without}"
        return replace(rejected(variant, why, SLOW), least=takes)

    def _spared(self, variant: Variant, other: Variant) -> dict[str, float]:
        """The parts of the critical path that a variant could save, as fractions by kind."""
        if variant.tp_sequence and not other.tp_sequence:
            return {"memory": 1 - 1 / variant.mesh.size("tp")}
        same_ring = variant.mesh == other.mesh and variant.ring == other.ring
        if same_ring and variant.order == other.order:
            return {}
        transfers = dict.fromkeys(("communication", "interference", "launch", "host"), 1.0)
        causal = variant.ring == "rotate" and self.model.order == "zigzag"
        return transfers if causal else {**transfers, "attention": 1.0}

    def _impossible(self, mesh: Mesh) -> Reason | None:
        """Why a mesh cannot work, judging by its sizes or by one axis alone; None if it can."""
        batch, dp, pp = self.ask.batch, mesh.size("dp"), mesh.size("pp")
        if batch % dp:
            return Reason(f"a batch of {batch} does not divide over dp={dp}", BATCH)
        stack = self.model.stack
        if stack is not None and pp > stack.num_layers + stack.first:
            layers = stack.num_layers + stack.first
            return Reason(f"{layers} layers are fewer than the {pp} stages of pp={pp}", STAGES)
        least = self.model.weight_bytes / (mesh.size("tp") * pp * mesh.size("ep"))
        if least > self.ask.room:
            why = (f"its weights alone are at least {least / 1e9:.4g} GB a rank, there is room "
                   f"for {self.ask.room / 1e9:.4g} GB")
            return Reason(why, MEMORY)
        refusals = (self._refused.get((axis, mesh.size(axis))) for axis in AXES)
        return next(filter(None, refusals), None)

    def _probe(self, meshes: Iterable[Mesh]) -> None:
        """Compile each axis of these meshes alone to see if it can work; a ring always can."""
        asked = {(axis, mesh.size(axis)) for mesh in meshes for axis in mesh.names}
        probes = sorted((axis, size) for axis, size in asked if axis != "ring" and size > 1)
        self._refused.update(zip(probes, forks.mapped(self._probed, probes), strict=True))

    def _probed(self, probe: tuple[str, int]) -> Reason | None:
        """Why this axis is useless for the model; None if it helps."""
        axis, size = probe
        try:
            made = self.compile_(Variant(Mesh(((axis, size),))), self.ask.length)
            if not AXES[axis].divides_weights:
                return None
            held = cost_of(made.rank(0), self.ask.length).weight_bytes
        except RingCompileError as error:
            return Reason(error.message, REFUSED)
        whole = self._whole_weights(size if axis == PIPELINE else 1)
        if held < whole:
            return None
        return Reason(f"{axis}={size} divides no weights of this model", NOTHING)

    def _whole_weights(self, stages: int) -> int:
        """The weight bytes on one device of the program that has one block per stage."""
        stack = self.model.stack
        if stack is None or not self.model.repeats(stages):
            return self.model.weight_bytes
        return self.model.outer_bytes + stack.block_bytes * stages

    def _quickly(self, variant: Variant) -> Plan:
        limit = _FAR * self._best[variant.capacity]
        try:
            return self._judged(variant, self._estimator.quick(variant, limit), close=False)
        except RingCompileError as error:
            return rejected(variant, error.message, REFUSED)
        except TooLargeError as error:
            # A stage of a pipeline stands for all, with what only the first and the last have.
            least = error.memory_bytes - self.model.outer_bytes
            if (variant.mesh.size(PIPELINE) > 1 and least <= self.ask.room
                    and self._estimator.can_be_close(variant)):
                return self._closely(variant)
            return self._too_large(variant, error)
        except FarError as error:
            found = error.least
            return replace(
                rejected(variant, str(error), SLOW), least=found.seconds, shares=shares_of(found)
            )

    def _closely(self, variant: Variant) -> Plan:
        try:
            return self._judged(variant, self._estimator.close(variant), close=True)
        except RingCompileError as error:
            return rejected(variant, error.message, REFUSED)
        except TooLargeError as error:
            return self._too_large(variant, error)

    def _overlapping(self, plans: list[Plan]) -> list[Plan]:
        """The best plans of each capacity mode once more, with more overlap.

        The best of them that can be cut in time is tried along `time`, too.
        """
        made = []
        for capacity in self._best:
            best = [p for p in plans if p.fits and p.close and p.variant.capacity == capacity]
            # Halves would count slots of experts each for itself: another result.
            exact = capacity == "exact" and self._capacities != ("exact",)
            for plan in best[:_OVERLAPPED]:
                made += [v for v in overlapping(plan.variant, self.ask.batch)
                         if not (exact and v.overlap == "halves")]
            made += list(filter(None, (in_time(plan.variant) for plan in best)))[:_OVERLAPPED]
        self._estimator.prepare(made, close=True)
        return [self._closely(variant) for variant in made]

    def _fastest(self, plans: list[Plan]) -> Iterator[int]:
        """The indices of the best plans of each capacity mode that can be estimated closely."""
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
                    found.bound, found.memory_bytes, True, spent_text(found), close,
                    found.seconds, shares_of(found))

    def _too_large(self, variant: Variant, error: TooLargeError) -> Plan:
        memory, room = error.memory_bytes, self.ask.room
        why = f"a rank holds {memory / 1e9:.4g} GB, there is room for {room / 1e9:.4g} GB"
        return replace(rejected(variant, why, MEMORY), memory_bytes=memory)

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
