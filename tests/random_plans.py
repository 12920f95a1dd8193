"""Random plans for small models: meshes over all axes, orders, capacities, stages.

`python -m tests.random_plans SEED...` (or `FIRST-LAST`) prints each plan and what became of it.
A plan is valid where the compiler takes it; then its ranks have to fit together.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from math import prod
from typing import Any, Final

import torch

from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh
from ringcompile.models import zoo
from ringcompile.models.transformer import Transformer
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.lockstep import LockStep
from ringcompile.runtime.queued import Queued
from tests.support import TOLERANCE, difference, furthest, zoo_program

Engine = Callable[[Mesh], LockStep | Queued]
MODELS: Final = (
    "dense-4l-tiny", "moe-4l-tiny", "gpt-tiny", "llama-tiny", "mixtral-tiny", "bert-tiny",
)
AXES: Final = ("dp", "pp", "ring", "ulysses", "ep", "tp")
ALONG_THE_SEQUENCE: Final = frozenset({"ring", "ulysses", "ep"})
SIZES: Final = (2, 2, 2, 3, 4)
MOST_RANKS: Final = 24
VALID, REFUSED = "fits", "refused"


@dataclass(frozen=True)
class Plan:
    """What a seed decides."""

    seed: int
    model: str
    parallel: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = " ".join(f"{k}={v}" for k, v in self.options.items())
        return f"seed {self.seed}: {self.model} {self.parallel} {options}".rstrip()


@cache
def captured(model: str) -> Program:
    return zoo_program(model, sequence=24)


def _sizes(rng: random.Random, in_time: bool) -> dict[str, int]:
    """The axes of a mesh, and their sizes."""
    while True:
        axes = [*["time"] * in_time, *rng.sample(AXES, rng.randint(1 - in_time, 4 - in_time))]
        sizes = {axis: rng.choice(SIZES) for axis in axes}
        if prod(sizes.values()) <= MOST_RANKS:
            return sizes | ({"halves": 2} if rng.random() < 0.15 else {})


def plan_of(seed: int) -> Plan:
    """The plan of a seed; any order of axes, as users may write them."""
    rng = random.Random(seed)
    model = rng.choice(MODELS)
    in_time = rng.random() < 0.3
    sizes = _sizes(rng, in_time)
    options: dict[str, Any] = {}
    if rng.random() < 0.5 and (not in_time or not ALONG_THE_SEQUENCE.isdisjoint(sizes)):
        options["order"] = rng.choice(["contiguous", "zigzag"])
    if rng.random() < 0.3 and not in_time:
        options["capacity"] = "local"
    if rng.random() < 0.3:
        options["ring"] = "gather"
    if "tp" in sizes and rng.random() < 0.5:
        options["tp_sequence"] = True
    if rng.random() < 0.2:
        options["length"] = rng.randint(5, 40)
    count = zoo.entry(model).config.num_layers
    if 1 < sizes.get("pp", 1) <= count and rng.random() < 0.5:
        starts = sorted(rng.sample(range(1, count), sizes["pp"] - 1))
        options["stages"] = tuple(f"blocks.{i}" for i in starts)
    return Plan(seed, model, ",".join(f"{k}={v}" for k, v in sizes.items()), options)


@dataclass(frozen=True)
class Outcome:
    """Whether a plan was taken, and what was wrong with it."""

    plan: Plan
    kind: str
    reason: str = ""


def checked(seed: int, numbers: bool = False, engine: Engine = LockStep) -> Outcome:
    """Compile a plan and check its ranks against each other.

    Args:
        seed: of the plan.
        numbers: also run all ranks in this process and compare with the model.
        engine: what drives them.
    """
    plan = plan_of(seed)
    try:
        parallel = transform(captured(plan.model), plan.parallel, **plan.options)
        parallel.ranks()
    except RingCompileError as error:
        return Outcome(plan, REFUSED, str(error))
    try:
        parallel.verify()
    except RingCompileError as error:
        return Outcome(plan, "false alarm", str(error))
    return Outcome(plan, *(_compared(plan, parallel, engine) if numbers else (VALID,)))


@torch.no_grad()
def _compared(plan: Plan, parallel: Any, engine: Engine) -> tuple[str, str]:
    length = plan.options.get("length", 24 + plan.seed % 7)
    replicas = parallel.mesh.size("dp,halves")
    module, one = zoo.build(plan.model, sequence=length)
    assert isinstance(module, Transformer)
    inputs = tuple(x.repeat(replicas, *[1] * (x.dim() - 1)) for x in one)
    found = run_lockstep(parallel.ranks(), parallel.mesh, parallel.source, inputs,
                         check_types=True, engine=engine).outputs
    expected = module(*one)
    # With capacity counted by each rank alone the numbers are others, as asked.
    if plan.options.get("capacity") == "local" and plan.model == "moe-4l-tiny":
        return VALID, ""
    worst = furthest(difference(part, expected) for part in found.chunk(replicas))
    return (VALID, "") if worst <= TOLERANCE else ("wrong", f"difference {worst:.1e}")


def _seeds(texts: list[str]) -> Iterator[int]:
    for text in texts:
        first, _, last = text.partition("-")
        yield from range(int(first), int(last or first) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="+")
    parser.add_argument("--numbers", action="store_true", help="compare with the model as well")
    parser.add_argument("--queued", action="store_true",
                        help="run them as NCCL may hold them up, by the plan's seed")
    arguments = parser.parse_args()
    for seed in _seeds(arguments.seeds):
        engine: Engine = partial(Queued, seed=seed) if arguments.queued else LockStep
        outcome = checked(seed, arguments.numbers or arguments.queued, engine)
        print(f"{outcome.plan}: {outcome.kind} {outcome.reason}", flush=True)


if __name__ == "__main__":
    main()
