"""Simulated against measured on this machine: one process, ring=2, tp=2 and pp=2 at three lengths.

    python -m benchmarks.predict [--rounds N] [--model dense-4l-small] [--table FILE] [--save]

The machine's table is measured first, unless one is given. All contestants stay up and take turns,
so that what else the machine does hits all alike; medians of rounds count.

A shared machine is half as fast again at one moment as at the next. The table holds the best of
several passes; so the ranks time a matrix product before and behind each step, and the step's
seconds are taken at the speed of the fastest such product.
"""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import combinations
from math import inf
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.machine import RESULTS, environment
from benchmarks.speed import product_seconds
from ringcompile import artifact, compiler
from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.cost.hardware import Cluster, load_cluster
from ringcompile.cost.rank import cost_of
from ringcompile.cost.simulate import simulate
from ringcompile.cost.timeline import How
from ringcompile.execution import random_inputs
from ringcompile.runtime.launcher import LocalRanks

ROOT = Path(__file__).parents[1]
SPECS = ("ring=1", "ring=2", "tp=2", "pp=2")
LENGTHS = (512, 1024, 2048)
MICROBATCHES = 4  # of a pipeline, so that both stages have work at the same time
Times = dict[tuple[str, int], list[float]]
# The bar: predictions within so much, and specs in the order that was measured.
ALLOWED = 0.15



@dataclass(frozen=True)
class Row:
    """One spec at one length; seconds of a step of `tokens`.

    Attributes:
        simulated: by the table.
        measured: the median of all rounds, each at the machine's best speed.
        fastest, slowest: of the rounds, likewise.
        unscaled: the median of the seconds themselves.
    """

    spec: str
    length: int
    tokens: int
    simulated: float
    measured: float
    fastest: float
    slowest: float
    unscaled: float

    @property
    def error(self) -> float:
        """Simulated over measured, less 1."""
        return self.simulated / self.measured - 1

    @property
    def a_token(self) -> tuple[float, float]:
        """Seconds a token, simulated and measured: specs take different numbers of tokens."""
        return self.simulated / self.tokens, self.measured / self.tokens


def calibrated() -> Path:
    """This machine's table, measured now."""
    file = Path(tempfile.mkdtemp(prefix="ringcompile-")) / "cpu.json"
    subprocess.run([sys.executable, "-m", "ringcompile", "calibrate", "-o", str(file)], check=True)
    return file


def count_of(spec: str) -> int:
    """Sequences of a step."""
    return MICROBATCHES if "pp" in spec else 1


def predicted(made: compiler.ParallelProgram, length: int, spec: str, cluster: Cluster) -> float:
    """Seconds of a step."""
    costs = [cost_of(program, length) for program in made.ranks()]
    return simulate(costs, cluster, How(count_of(spec))).seconds


def run(model: str, rounds: int, cluster: Cluster) -> list[Row]:
    """All specs and lengths."""
    loaded = load_model(model)
    program = capture(loaded.module, loaded.args, loaded.kwargs, name=model)
    made = {spec: compiler.transform(program, spec) for spec in SPECS}
    times: Times = {(s, n): [] for s in SPECS for n in LENGTHS}
    products: Times = {key: [] for key in times}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ranks, best = {}, inf
        for spec, parallel in made.items():
            parallel.save(Path(folder) / spec)
            opened = LocalRanks(artifact.load, (Path(folder) / spec,), threads=1)
            ranks[spec] = stack.enter_context(opened)
        for turn in range(rounds + 1):  # the first is the warm-up
            for (spec, length), found in times.items():
                inputs = {
                    name: torch.cat([tensor] * count_of(spec))
                    for name, tensor in random_inputs(program, length).items()
                }
                before = ranks[spec].call(product_seconds)
                stats = ranks[spec].run(inputs).stats
                behind = ranks[spec].call(product_seconds)
                if turn:
                    found.append(max(one.seconds for one in stats))
                    of_ranks = zip(before, behind, strict=True)  # a step ends with the slowest
                    products[spec, length].append(max(map(statistics.mean, of_ranks)))
                    best = min(best, *before, *behind)
    scaled = {
        key: [seconds * best / product for seconds, product in zip(t, products[key], strict=True)]
        for key, t in times.items()
    }
    return [
        Row(spec, length, length * count_of(spec),
            predicted(made[spec], length, spec, cluster.sized(made[spec].world_size)),
            statistics.median(found), min(found), max(found),
            statistics.median(times[spec, length]))
        for (spec, length), found in scaled.items()
    ]


def misordered(rows: list[Row]) -> list[str]:
    """Pairs of specs that were measured the other way round than simulated, ties left out."""
    found = []
    for length in LENGTHS:
        for a, b in combinations([row for row in rows if row.length == length], 2):
            gap = a.a_token[1] / b.a_token[1] - 1
            if abs(gap) > 0.05 and gap * (a.a_token[0] - b.a_token[0]) < 0:
                found.append(f"{a.spec} and {b.spec} at {length}")
    return found


@click.command()
@click.option("--rounds", default=15, show_default=True)
@click.option("--model", default="dense-4l-small", show_default=True)
@click.option("--table", type=click.Path(path_type=Path), help="A table of this machine.")
@click.option("--save/--no-save", default=False, help="Write benchmarks/results/.")
def main(rounds: int, model: str, table: Path | None, save: bool) -> None:
    """Compare simulated and measured steps."""
    known: dict[str, Any] = {"environment": environment(), "model": model}
    cluster = load_cluster(table or calibrated())
    rows = run(model, rounds, cluster)
    click.echo("spec     length  simulated   measured   error   unscaled")
    for row in rows:
        click.echo(
            f"{row.spec:8} {row.length:6} {row.simulated * 1e3:7.1f} ms "
            f"{row.measured * 1e3:7.1f} ms {row.error:+7.1%} {row.unscaled * 1e3:7.1f} ms"
        )
    worst = max(abs(row.error) for row in rows)
    wrong = misordered(rows)
    click.echo(f"farthest off: {worst:.1%} (allowed {ALLOWED:.0%}); in another order: "
               f"{', '.join(wrong) or 'none'}")
    if save:
        known |= {"rows": [{**asdict(row), "error": row.error} for row in rows],
                  "farthest": worst, "misordered": wrong}
        file = RESULTS / f"predict-{datetime.date.today().isoformat()}.json"
        file.write_text(json.dumps(known, indent=1) + "\n")
        click.echo(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
