"""Parallel specs with what they would take, or with the reason why they cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ringcompile.cost.estimate import Estimate
from ringcompile.cost.specs import Variant

# Kinds of reasons for which specs are rejected.
BATCH, STAGES = "the batch does not divide over dp", "more pipeline stages than layers"
NOTHING = "an axis divides no weights of this model"
MEMORY, SLOW = "does not fit into memory", "slower than the best plan"
REFUSED = "refused by the compiler"


class Reason(NamedTuple):
    """Why a spec cannot be: what is wrong with this one, and of which kind that is."""

    why: str
    kind: str


@dataclass(frozen=True)
class Plan:
    """A parallel spec with its estimate, or with the reason why it was rejected.

    Attributes:
        variant: the spec with its options.
        tps: tokens per second with the pipeline full; None if it was rejected.
        seconds: the time of a step of all tokens with the pipeline full; None if it was rejected.
        latency: the time from the start of a step to its end, in seconds.
        bound: the kind of work on which most of the critical path is spent.
        memory_bytes: the peak memory of the rank that holds most.
        fits: whether it can run on this cluster.
        why: the share of each kind of work on the critical path, or why it was rejected.
        reason: the kind of reason why it was rejected; empty where it was not.
        close: whether the estimate is a close one, from all ranks whose programs differ.
        least: a lower bound for the time of a step in seconds; None if there is none.
        shares: the fraction of the critical path for each kind of work.
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
    reason: str = ""

    def __str__(self) -> str:
        if self.tps is None:
            return f"{self.variant}: rejected, {self.why}"
        return f"{self.variant}: {self.tps / 1e6:.4g} M tokens/s, {self.why}"

    def to_json(self) -> dict[str, Any]:
        """The fields that `plan --json` prints."""
        return {
            "spec": str(self.variant.mesh),
            "tps": self.tps,
            "step_ms": None if self.seconds is None else self.seconds * 1e3,
            "latency_ms": None if self.latency is None else self.latency * 1e3,
            "bound": self.bound,
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "why": self.why,
            "reason": self.reason,
            "options": self.variant.options,
        }


def by_speed(plans: list[Plan]) -> list[Plan]:
    """Those that fit, fastest first, and then the rejected ones."""
    return sorted(plans, key=lambda plan: (not plan.fits, -(plan.tps or 0.0)))


def rejected(variant: Variant, why: str, reason: str) -> Plan:
    """A spec that cannot be, or is not worth it."""
    return Plan(variant, None, None, None, None, None, False, why, reason=reason)


def with_best(plan: Plan, best: float) -> Plan:
    """A plan that was too slow with the best plan's seconds beside it; others as they are."""
    if plan.reason != SLOW:
        return plan
    return replace(plan, why=f"{plan.why}, the best plan takes {best * 1e3:.4g} ms")


def shares_of(found: Estimate) -> dict[str, float]:
    """The fraction of the critical path that each kind of work takes, largest first."""
    total = sum(found.path.values()) or 1.0
    parts = sorted(found.path.items(), key=lambda entry: -entry[1])
    return {kind: seconds / total for kind, seconds in parts}


def spent_text(found: Estimate) -> str:
    """`matmul 58%, communication 31%`."""
    texts = [f"{kind} {share:.0%}" for kind, share in shares_of(found).items() if share >= 0.01]
    return ", ".join(texts)
