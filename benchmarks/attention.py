"""Ring attention alone, causal: 2 ranks x 1 thread against one process x 2 threads.

    python -m benchmarks.attention [--rounds N] [--json]

One step of each contestant in turn, N rounds; ratios are taken within a round, where both sides saw
the same machine, and their median is reported. The CPU ratio (all CPU seconds of all ranks) barely
feels other processes and tells a costly algorithm from a busy machine.
"""

import json
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import click

from benchmarks import emitted
from benchmarks.baselines import ring_by_hand, single, templated
from benchmarks.baselines.problem import Case, zigzag_unshard
from benchmarks.pool import Pool, Setup, Timing

NUM_CORES = 2
CASES = (Case(16, 64, 4096), Case(4, 512, 4096))
# Of the largest output: float32, summed in another order.
MAX_DIFFERENCE = 1e-5
# libgomp's workers spin for a moment after a parallel region; the next contestant must not feel it.
PAUSE_SECONDS = 0.02


@dataclass(frozen=True)
class Contestant:
    """`setup(rank, world, case)` returns a step that computes this rank's zigzag shard."""

    name: str
    world: int
    setup: Setup


# The first is what the others are compared with.
CONTESTANTS = (
    Contestant("one process", 1, single.setup),
    Contestant("by hand", 2, ring_by_hand.setup),
    Contestant("templated", 2, templated.setup),
    Contestant("emitted", 2, emitted.setup),
)


def run(
    num_rounds: int = 21,
    contestants: tuple[Contestant, ...] = CONTESTANTS,
    cases: tuple[Case, ...] = CASES,
) -> dict[str, list[dict[str, Any]]]:
    """Measure every contestant on every case; one JSON-able row each."""
    with ExitStack() as stack:
        pools = {
            world: stack.enter_context(Pool(world, NUM_CORES // world))
            for world in {contestant.world for contestant in contestants}
        }
        rows = [row for case in cases for row in _run_case(pools, contestants, case, num_rounds)]
    return {"attention": rows}


def _run_case(
    pools: dict[int, Pool], contestants: tuple[Contestant, ...], case: Case, num_rounds: int
) -> list[dict[str, Any]]:
    differences = _check(pools, contestants, case)
    timings: dict[str, list[Timing]] = {contestant.name: [] for contestant in contestants}
    for _ in range(num_rounds):
        for contestant in contestants:
            time.sleep(PAUSE_SECONDS)
            timings[contestant.name].append(pools[contestant.world].time(contestant.name))
    base = timings[contestants[0].name]
    return [
        {
            "case": f"{case.num_heads}x{case.head_dim}",
            "num_tokens": case.num_tokens,
            "contestant": name,
            "num_rounds": num_rounds,
            **_summary(taken, base),
            "max_difference": differences[name],
        }
        for name, taken in timings.items()
    ]


def _check(
    pools: dict[int, Pool], contestants: tuple[Contestant, ...], case: Case
) -> dict[str, float]:
    """Set every contestant up, warm it, and compare its output with the first one's."""
    outputs = {}
    for contestant in contestants:
        pool = pools[contestant.world]
        pool.load(contestant.name, contestant.setup, case)
        outputs[contestant.name] = zigzag_unshard(pool.output(contestant.name))
    expected = outputs[contestants[0].name]
    largest = expected.abs().max()
    differences = {
        name: ((output - expected).abs().max() / largest).item() for name, output in outputs.items()
    }
    wrong = {name: value for name, value in differences.items() if not value <= MAX_DIFFERENCE}
    if wrong:
        raise ValueError(f"{case}: not the single process's numbers, largest difference: {wrong}")
    return differences


def _summary(taken: list[Timing], base: list[Timing]) -> dict[str, float]:
    pairs = list(zip(taken, base, strict=True))
    return {
        "median_seconds": statistics.median(one.seconds for one in taken),
        "ratio": statistics.median(one.seconds / other.seconds for one, other in pairs),
        "cpu_ratio": statistics.median(one.cpu_seconds / other.cpu_seconds for one, other in pairs),
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Lay the rows of `run` out for people."""
    lines = [
        f"{'case':8}{'contestant':14}{'median':>10}{'ratio':>8}{'cpu ratio':>11}{'max diff':>10}"
    ]
    for row in results["attention"]:
        lines.append(
            f"{row['case']:8}{row['contestant']:14}{row['median_seconds'] * 1e3:7.1f} ms"
            f"{row['ratio']:8.3f}{row['cpu_ratio']:11.3f}{row['max_difference']:10.1e}"
        )
    return "\n".join(lines)


@click.command()
@click.option("--rounds", default=21, show_default=True, help="Steps of each contestant.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(rounds: int, as_json: bool) -> None:
    """Benchmark causal ring attention on two ranks."""
    results = run(rounds)
    click.echo(json.dumps(results, indent=2) if as_json else table(results))


if __name__ == "__main__":
    main()
